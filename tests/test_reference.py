"""The reference against torch.nn.LSTM and against a second, naive statement of the semantics."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import Naive
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedreg.layer import LayerOptions, LayerParameters, LayerResult, RunningStatistics
from fusedreg.masks import layer_masks
from fusedreg.reference import lstm_layer
from fusedreg.regularization import BatchNorm, LayerNorm

STEPS, ROWS, INPUTS, HIDDEN, PROJECTED = 6, 4, 3, 5, 2
LENGTHS = [4, 6, 0, 1]
NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make_parameters(
    norm: BatchNorm | LayerNorm | None = None, proj_size: int = 0, bias: bool = True
) -> LayerParameters:
    gates, output = 4 * HIDDEN, proj_size or HIDDEN
    values: dict[str, Tensor] = {"weight_ih": normal(gates, INPUTS), "weight_hh": normal(gates, output) / 2}
    if bias:
        values |= {"bias_ih": normal(gates, seed=1), "bias_hh": normal(gates, seed=2)}
    if proj_size:
        values["weight_hr"] = normal(proj_size, HIDDEN)
    for position, name in enumerate(("input", "recurrent", "cell")):
        if norm is not None and getattr(norm, name):
            size = HIDDEN if name == "cell" else gates
            values[f"norm_{name}_weight"] = 1 + normal(size, seed=3 + position) / 4
            if name == "cell" or isinstance(norm, LayerNorm):
                values[f"norm_{name}_bias"] = normal(size, seed=6 + position) / 4
    return LayerParameters(**{name: value.requires_grad_() for name, value in values.items()})


def make_running(norm: BatchNorm | LayerNorm | None, steps: int = STEPS) -> RunningStatistics | None:
    if not isinstance(norm, BatchNorm):
        return None
    rows = 3
    index = torch.tensor([-1, 0, 0, 1, 2, 2])[:steps]
    pooled = norm.input_statistics == "sequence"
    values = {}
    for position, name in enumerate(("input", "recurrent", "cell")):
        if getattr(norm, name):
            shape = (1 if pooled and name == "input" else rows, HIDDEN if name == "cell" else 4 * HIDDEN)
            values[f"{name}_mean"] = normal(*shape, seed=10 + position) / 4
            values[f"{name}_var"] = 0.5 + normal(*shape, seed=13 + position).square()
    return RunningStatistics(index, torch.zeros_like(index) if pooled else index, **values)


EVERYTHING: dict[str, Any] = {
    "dropout": 0.2,
    "input_dropout": 0.3,
    "hidden_dropout": 0.4,
    "output_dropout": 0.3,
    "update_dropout": 0.3,
    "cell_dropout": 0.2,
    "weight_dropout": 0.3,
    "zoneout_hidden": 0.4,
    "zoneout_cell": 0.5,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: {name: rate} for name, rate in EVERYTHING.items()},
    "untied": {"gate_masks": "untied", "input_dropout": 0.4, "hidden_dropout": 0.4},
    "update_sequence": {"update_mask": "sequence", "update_dropout": 0.5},
    "weight_row": {"weight_mask": "row", "weight_dropout": 0.5},
    "candidate": {"zoneout_output": "candidate", "zoneout_hidden": 0.5, "output_dropout": 0.25},
    "layer_norm": {"norm": LayerNorm()},
    "layer_norm_cell": {"norm": LayerNorm(input=False, recurrent=False)},
    "batch_norm": {"norm": BatchNorm(3)},
    "batch_norm_input": {"norm": BatchNorm(3, recurrent=False, cell=False)},
    "batch_norm_recurrent": {"norm": BatchNorm(3, input=False, cell=False, eps=1e-2)},
    "batch_norm_sequence": {"norm": BatchNorm(3, input_statistics="sequence")},
    "everything": EVERYTHING,
    "everything_untied_layer_norm": {**EVERYTHING, "gate_masks": "untied", "norm": LayerNorm()},
    "everything_batch_norm": {**EVERYTHING, "norm": BatchNorm(3), "weight_mask": "row", "update_mask": "sequence"},
}
VARIANTS = {
    "all_rows": {},
    "lengths": {"ragged": True},
    "resets": {"resets": True},
    "reverse": {"direction": 1},
    "reverse_lengths_resets": {"direction": 1, "ragged": True, "resets": True},
}


def make_reset() -> Tensor:
    """Resets that no reversal maps onto themselves, some of them in the padding of ``LENGTHS``."""
    reset = torch.zeros(STEPS, ROWS, dtype=torch.bool)
    for row, steps in enumerate(((1, 5), (0, 2, 3), (4,), (3,))):
        reset[list(steps), row] = True
    return reset


def sizes(proj_size: int) -> dict[str, int]:
    return {
        "steps": STEPS,
        "rows": ROWS,
        "input_size": INPUTS,
        "hidden_size": HIDDEN,
        "output_size": proj_size or HIDDEN,
    }


def gradients(results: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([(result * normal(*result.shape, seed=20)).sum() for result in results]).sum()
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("case", "proj_size"), [*((case, 0) for case in CASES), ("everything", PROJECTED), ("batch_norm", PROJECTED)]
)
def test_against_the_naive_statement(case: str, proj_size: int, variant: str, training: bool) -> None:
    choice = {"direction": 0, "ragged": False, "resets": False, **VARIANTS[variant]}
    options = LayerOptions(
        layer=1, direction=int(choice["direction"]), training=training, return_cells=True, **CASES[case]
    )  # fmt: skip
    parameters, running = make_parameters(options.norm, proj_size), make_running(options.norm)
    x = normal(STEPS, ROWS, INPUTS).requires_grad_()
    h0 = normal(ROWS, proj_size or HIDDEN).requires_grad_()
    c0 = normal(ROWS, HIDDEN, seed=1).requires_grad_()
    lengths = LENGTHS if choice["ragged"] else [STEPS] * ROWS
    reset, seed = (make_reset() if choice["resets"] else None), torch.tensor(99)
    wanted = [x, h0, c0, *(value for value in parameters if value is not None)]

    naive = Naive(parameters, options, layer_masks(seed, options, **sizes(proj_size)), running)
    expected = naive.run(x, h0, c0, lengths, reset)
    padding = torch.arange(STEPS).unsqueeze(1) >= torch.tensor(lengths)
    poisoned = torch.where(padding.unsqueeze(-1), NAN, x)
    result = lstm_layer(
        poisoned,
        h0,
        c0,
        parameters,
        options,
        lengths=torch.tensor(lengths) if choice["ragged"] else None,
        reset=reset,
        seed=seed,
        running=running,
    )
    assert result.cells is not None
    own = (result.output, result.final_hidden, result.final_cell, result.cells)
    for left, right in zip(own, expected, strict=True):
        torch.testing.assert_close(left, right)
    assert bool((result.output[padding] == 0).all())
    assert bool((result.cells[padding] == 0).all())
    own_gradients = gradients(own, wanted)
    for left, right in zip(own_gradients, gradients(expected, wanted), strict=True):
        torch.testing.assert_close(left, right)
    assert bool((own_gradients[0][padding] == 0).all())
    check_statistics(result, naive, training)


def check_statistics(result: LayerResult, naive: Naive, training: bool) -> None:
    if not isinstance(naive.o.norm, BatchNorm) or not training:
        assert result.statistics is None
        return
    assert result.statistics is not None
    for name, values in result.statistics._asdict().items():
        if not getattr(naive.o.norm, name):
            assert values is None
            continue
        assert not values.requires_grad
        used = naive.used[name]
        for s in range(values.shape[0]):
            torch.testing.assert_close(values[s], used.get(s, torch.zeros_like(values[s])))


@pytest.mark.parametrize("case", ["plain", "everything", "everything_untied_layer_norm"])
@pytest.mark.parametrize("direction", [0, 1])
def test_a_row_of_a_ragged_batch_is_that_row_alone(case: str, direction: int) -> None:
    options = LayerOptions(training=False, direction=direction, **CASES[case])
    parameters = make_parameters(options.norm)
    x = normal(STEPS, ROWS, INPUTS)
    result = lstm_layer(x, None, None, parameters, options, lengths=torch.tensor(LENGTHS))
    for b, length in enumerate(LENGTHS):
        if length:
            alone = lstm_layer(x[:length, b : b + 1], None, None, parameters, options)
            torch.testing.assert_close(result.output[:length, b], alone.output[:, 0])
            torch.testing.assert_close(result.final_cell[b], alone.final_cell[0])


def test_a_reset_starts_the_row_anew() -> None:
    parameters, options = make_parameters(), LayerOptions(training=False, zoneout_cell=0.3, zoneout_hidden=0.2)
    x = normal(STEPS, ROWS, INPUTS)
    reset = torch.zeros(STEPS, ROWS, dtype=torch.bool)
    reset[3, 1] = True
    h0 = normal(ROWS, HIDDEN).requires_grad_()
    result = lstm_layer(x, h0, None, parameters, options, reset=reset)
    anew = lstm_layer(x[3:], None, None, parameters, options)
    torch.testing.assert_close(result.output[3:, 1], anew.output[:, 1])
    (gradient,) = torch.autograd.grad(result.final_cell.sum(), h0)
    assert bool((gradient[1] == 0).all())
    assert bool((gradient[0] != 0).any())


def run_stack(
    module: nn.LSTM, x: Tensor, hx: tuple[Tensor, Tensor] | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every layer and direction of ``module`` through the reference."""
    hiddens, cells = [], []
    directions = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            fields = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            parameters = LayerParameters._make(
                [getattr(module, field + suffix, None) for field in fields] + [None] * 6
            )  # fmt: skip
            place = layer * directions + direction
            result = lstm_layer(
                x,
                None if hx is None else hx[0][place],
                None if hx is None else hx[1][place],
                parameters,
                LayerOptions(layer=layer, direction=direction),
                lengths=lengths,
            )
            outputs.append(result.output)
            hiddens.append(result.final_hidden)
            cells.append(result.final_cell)
        x = torch.cat(outputs, -1)
    return x, torch.stack(hiddens), torch.stack(cells)


@pytest.mark.parametrize(
    ("layers", "bidirectional", "proj_size", "bias"),
    list(itertools.product((1, 3), (False, True), (0, 2), (True, False))),
)
@pytest.mark.parametrize("ragged", [False, True])
def test_against_torch(layers: int, bidirectional: bool, proj_size: int, bias: bool, ragged: bool) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(
        INPUTS, HIDDEN, layers, bias=bias, bidirectional=bidirectional, proj_size=proj_size, dtype=torch.float64
    )  # fmt: skip
    places = layers * (2 if bidirectional else 1)
    x = normal(STEPS, ROWS, INPUTS).requires_grad_()
    h0 = normal(places, ROWS, proj_size or HIDDEN).requires_grad_()
    c0 = normal(places, ROWS, HIDDEN, seed=1).requires_grad_()
    wanted = [x, h0, c0, *module.parameters()]
    lengths = torch.tensor([4, 6, 2, 1]) if ragged else None
    if lengths is None:
        output, state = module(x, (h0, c0))
    else:
        packed, state = module(pack_padded_sequence(x, lengths, enforce_sorted=False), (h0, c0))
        output, _ = pad_packed_sequence(packed, total_length=STEPS)
    expected = (output, *state)
    own = run_stack(module, x, (h0, c0), lengths)
    for left, right in zip(own, expected, strict=True):
        torch.testing.assert_close(left, right)
    for left, right in zip(gradients(own, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("case", ["everything", "everything_untied_layer_norm", "everything_batch_norm", "candidate"])
def test_gradcheck_to_second_order(case: str) -> None:
    options = LayerOptions(direction=1, **CASES[case])
    parameters, running = make_parameters(options.norm), make_running(options.norm, 4)
    names = [name for name, value in zip(parameters._fields, parameters, strict=True) if value is not None]
    reset, lengths, seed = make_reset()[:4], torch.tensor([3, 4, 0, 2]), torch.tensor(5)

    def function(x: Tensor, h0: Tensor, c0: Tensor, *values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = lstm_layer(
            x,
            h0,
            c0,
            LayerParameters(**dict(zip(names, values, strict=True))),
            options,
            lengths=lengths,
            reset=reset,
            seed=seed,
            running=running,
        )
        return result.output, result.final_hidden, result.final_cell

    values = [normal(4, ROWS, INPUTS), normal(ROWS, HIDDEN), normal(ROWS, HIDDEN, seed=1)]
    values += [value.detach() for value in parameters if value is not None]
    arguments = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("direction", [0, 1])
def test_lengths_are_clamped(direction: int) -> None:
    parameters, options, x = make_parameters(), LayerOptions(direction=direction), normal(STEPS, ROWS, INPUTS)
    wild = lstm_layer(x, None, None, parameters, options, lengths=torch.tensor([99, 6, -3, 1]))
    tame = lstm_layer(x, None, None, parameters, options, lengths=torch.tensor([6, 6, 0, 1]))
    assert torch.equal(wild.output, tame.output)
    assert torch.equal(wild.final_cell, tame.final_cell)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_types_of_the_results(dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = LayerParameters._make(None if p is None else p.detach().to(dtype) for p in make_parameters())
    c0 = torch.full((ROWS, HIDDEN), 1 + 2.0**-20, dtype=compute)
    options = LayerOptions(return_cells=True)
    x = normal(STEPS, ROWS, INPUTS).to(dtype)
    result = lstm_layer(x, None, c0, parameters, options, lengths=torch.tensor(LENGTHS))
    assert result.output.dtype == result.final_hidden.dtype == dtype
    assert result.cells is not None
    assert result.final_cell.dtype == result.cells.dtype == compute
    assert torch.equal(result.final_cell[2], c0[2])  # no steps: carried unrounded


def test_16_bit_state_is_rounded_each_step_and_gates_are_not() -> None:
    narrow = LayerParameters._make(None if p is None else p.detach().bfloat16() for p in make_parameters())
    wide = LayerParameters._make(None if p is None else p.float() for p in narrow)
    x = normal(STEPS, ROWS, INPUTS).bfloat16()
    result = lstm_layer(x, None, None, narrow, LayerOptions())
    hidden, cell = torch.zeros(ROWS, HIDDEN), torch.zeros(ROWS, HIDDEN)
    for t in range(STEPS):
        step = lstm_layer(x[t : t + 1].float(), hidden, cell, wide, LayerOptions())
        hidden, cell = step.final_hidden.bfloat16().float(), step.final_cell
        torch.testing.assert_close(result.output[t].float(), hidden, rtol=2**-8, atol=0)
    torch.testing.assert_close(result.final_cell, cell)


def test_autocast_around_it_changes_nothing() -> None:
    parameters = LayerParameters._make(None if p is None else p.detach().float() for p in make_parameters())
    x = normal(STEPS, ROWS, INPUTS).float()
    expected = lstm_layer(x, None, None, parameters, LayerOptions())
    with torch.autocast("cpu", torch.bfloat16):
        result = lstm_layer(x, None, None, parameters, LayerOptions())
    assert torch.equal(result.output, expected.output)


def test_strided_input_and_an_empty_batch() -> None:
    parameters, options = make_parameters(), LayerOptions(**EVERYTHING)
    x, seed = normal(ROWS, STEPS, 2 * INPUTS), torch.tensor(3)
    strided = x.transpose(0, 1)[:, :, ::2]
    plain = lstm_layer(strided.contiguous(), None, None, parameters, options, seed=seed)
    assert torch.equal(lstm_layer(strided, None, None, parameters, options, seed=seed).output, plain.output)
    for direction in (0, 1):
        empty = lstm_layer(
            x.new_zeros(STEPS, 0, INPUTS), None, None, parameters, replace(options, direction=direction), seed=seed
        )
        assert empty.output.shape == (STEPS, 0, HIDDEN)
