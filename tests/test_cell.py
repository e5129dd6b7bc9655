"""``LSTMCell``: ``nn.LSTMCell`` where nothing is regularised, and step by step what ``LSTM`` is over a sequence."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from helpers import REGULARIZERS, compiled
from torch import Tensor, nn

import fusedreg
from fusedreg import BatchNorm, CellSequence, LayerNorm, Regularization
from fusedreg.masks import masks

STEPS, ROWS, INPUTS, HIDDEN = 5, 4, 3, 6


def without_dropout(regularization: Regularization) -> Regularization:
    return Regularization(**{**regularization.changed(), "dropout": 0.0})  # type: ignore[arg-type]


KINDS = {
    name: without_dropout(value)
    for name, value in REGULARIZERS.items()
    if name != "dropout" and not (isinstance(value.norm, BatchNorm) and value.norm.input_statistics == "sequence")
}
PAIRS = [
    *(pytest.param(kind, "cpu", marks=compiled) for kind in KINDS),
    *((kind, "reference") for kind in ("everything", "everything_batch_norm")),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_pair(kind: str, backend: str) -> tuple[fusedreg.LSTMCell, fusedreg.LSTM]:
    """A cell and an LSTM of the same weights."""
    options: dict[str, Any] = {"regularization": KINDS[kind], "dtype": torch.float64, "backend": backend}
    lstm = fusedreg.LSTM(INPUTS, HIDDEN, **options)
    with torch.no_grad():
        for number, parameter in enumerate(lstm.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number) * 0.4)
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, **options)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    return cell, lstm


def step_through(
    cell: fusedreg.LSTMCell, input: Tensor, state: Any, sequence: CellSequence, reset: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    outputs = []
    for step, x in enumerate(input):
        output, state = cell(
            x, state, sequence.at(step), reset=None if reset is None else reset[step], return_output=True
        )
        outputs.append(output)
    return torch.stack(outputs), state


@pytest.mark.parametrize(("kind", "backend"), PAIRS)
def test_steps_are_the_sequence(kind: str, backend: str) -> None:
    """The same masks to the bit; equal outputs, states, gradients and running statistics; resets by row."""
    cell, lstm = make_pair(kind, backend)
    input, reset = normal(STEPS, ROWS, INPUTS), normal(STEPS, ROWS, seed=5) > 0.6
    state = normal(1, ROWS, HIDDEN, seed=6), normal(1, ROWS, HIDDEN, seed=7)
    leaves = [input, *state]

    def gradients(module: nn.Module, run: Any) -> tuple[Any, list[Tensor]]:
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        output, (hidden, carried) = run(*own)
        loss = output.square().sum() + (hidden + 1).pow(3).sum() + carried.square().sum()
        return (output, hidden, carried), list(torch.autograd.grad(loss, [*own, *module.parameters()]))

    def whole(x: Tensor, h: Tensor, c: Tensor) -> Any:
        output, (hidden, carried) = lstm(x, (h, c), reset=reset, seed=7)
        return output, (hidden[0], carried[0])

    sequence = cell.begin(7)
    results, ours = gradients(cell, lambda x, h, c: step_through(cell, x, (h[0], c[0]), sequence, reset))
    expected_results, expected = gradients(lstm, whole)
    for result, right in zip(results, expected_results, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-11, atol=1e-11)
        assert torch.equal(result == 0, right == 0)
    for gradient, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-10)
    if kind == "batch_norm_shared":
        return  # a cell cannot wait for the mean over the steps, and updates at each of them
    for name, buffer in cell.named_buffers():
        torch.testing.assert_close(buffer, lstm.get_buffer(f"{name}_l0"), rtol=1e-11, atol=1e-11)
    cell.eval()
    lstm.eval()
    evaluated, _ = step_through(cell, input, None, cell.begin())
    torch.testing.assert_close(evaluated, lstm(input).output, rtol=1e-11, atol=1e-11)


@compiled
def test_masks_are_those_of_the_sequence() -> None:
    """Read off the states: where the cell is zoned out it is the one before, bit for bit."""
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, zoneout_cell=0.5, zoneout_hidden=0.3)
    made = masks(11, cell.regularization, input_size=INPUTS, hidden_size=HIDDEN, batch_size=ROWS, steps=STEPS)["l0"]
    state = normal(ROWS, HIDDEN, dtype=torch.float32), normal(ROWS, HIDDEN, seed=1, dtype=torch.float32)
    sequence = cell.begin(11)
    for step in range(STEPS):
        before = state
        state = cell(normal(ROWS, INPUTS, seed=step, dtype=torch.float32), state, sequence)
        sequence = sequence.next()
        assert torch.equal(state[0] == before[0], made.zoneout_hidden[step])  # type: ignore[index]
        assert torch.equal(state[1] == before[1], made.zoneout_cell[step])  # type: ignore[index]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_plain_is_torchs(bias: bool, batched: bool, dtype: torch.dtype) -> None:
    """The same weights from one manual_seed, state dicts both ways, outputs, states and gradients."""
    torch.manual_seed(4)
    theirs = nn.LSTMCell(INPUTS, HIDDEN, bias=bias, dtype=dtype)
    torch.manual_seed(4)
    ours = fusedreg.LSTMCell(INPUTS, HIDDEN, bias=bias, dtype=dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert (ours.bias_ih is None) == (theirs.bias_ih is None)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    theirs.load_state_dict(ours.state_dict())
    # In 16 bits torch rounds at every operation, and not alike in all versions: its float64 cell is the measure there.
    measure, wide = theirs, dtype
    if dtype == torch.bfloat16:
        measure, wide = nn.LSTMCell(INPUTS, HIDDEN, bias=bias, dtype=torch.float64), torch.float64
        measure.load_state_dict(theirs.state_dict())
    shape = (ROWS,) if batched else ()
    input = normal(*shape, INPUTS, dtype=dtype)
    state = normal(*shape, HIDDEN, seed=1, dtype=dtype), normal(*shape, HIDDEN, seed=2, dtype=dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for hx in (None, state):
        results = []
        for module, to in ((ours, dtype), (measure, wide)):
            hidden, carried = module(input.to(to), None if hx is None else (hx[0].to(to), hx[1].to(to)))
            assert hidden.dtype == carried.dtype == to
            loss = hidden.square().sum() + carried.square().sum()
            results.append((hidden, carried, *torch.autograd.grad(loss, list(module.parameters()))))
        for mine, right in zip(*results, strict=True):
            torch.testing.assert_close(mine, right.to(dtype), **tolerance)
    assert repr(ours) == repr(theirs)


def test_a_plain_call_draws_anew_and_can_be_replayed() -> None:
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, hidden_dropout=0.5, zoneout_cell=0.3)
    input, state = torch.randn(ROWS, INPUTS), (torch.randn(ROWS, HIDDEN), torch.randn(ROWS, HIDDEN))
    first = cell(input, state)
    seed = cell.last_seed
    assert not torch.equal(cell(input, state)[0], first[0])
    assert torch.equal(cell(input, state, seed=seed)[0], first[0])
    sequence = cell.begin(generator=torch.Generator().manual_seed(2))
    assert torch.equal(cell(input, state, sequence.at(3))[0], cell(input, state, sequence.at(3))[0])
    assert not torch.equal(cell(input, state, sequence.at(3))[1], cell(input, state, sequence.at(4))[1])
    assert torch.equal(cell.last_seed, sequence.seed)


def test_a_float32_cell_beside_16_bit_inputs_comes_back_unrounded() -> None:
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, dtype=torch.bfloat16)
    input = normal(ROWS, INPUTS, dtype=torch.bfloat16)
    hidden, carried = cell(input, (torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16), torch.zeros(ROWS, HIDDEN)))
    assert (hidden.dtype, carried.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(carried, carried.bfloat16().float())
    assert torch.equal(carried.bfloat16(), cell(input)[1])


def test_copies_and_torchs_cells() -> None:
    theirs = nn.LSTMCell(INPUTS, HIDDEN).eval()
    theirs.weight_hh.requires_grad_(False)
    ours = fusedreg.LSTMCell.from_torch(theirs, hidden_dropout=0.3, norm=LayerNorm())
    assert not ours.training
    assert not ours.weight_hh.requires_grad
    assert torch.equal(ours.weight_ih, theirs.weight_ih)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        input = torch.randn(ROWS, INPUTS)
        assert torch.equal(other(input)[0], ours(input)[0])
    with pytest.raises(ValueError, match=r"norm.*LayerNorm"):
        ours.to_torch()
    plain = fusedreg.LSTMCell.from_torch(theirs, hidden_dropout=0.3)
    assert torch.equal(plain.to_torch()(input)[0], theirs(input)[0])
    with pytest.raises(TypeError, match=r"nn\.LSTMCell.*Linear"):
        fusedreg.LSTMCell.from_torch(nn.Linear(1, 1))  # type: ignore[arg-type]
    assert repr(plain) == f"LSTMCell({INPUTS}, {HIDDEN}, hidden_dropout=0.3)"


def test_regularization_may_be_assigned() -> None:
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, zoneout_cell=0.5)
    cell.regularization = Regularization()
    assert cell.begin().seed is None
    with pytest.raises(ValueError, match="dropout"):
        cell.regularization = Regularization(dropout=0.5)


@compiled
@pytest.mark.compile
def test_compiled_over_a_loop_and_by_step() -> None:
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, hidden_dropout=0.4, zoneout_cell=0.3, dtype=torch.float64)
    input, sequence = normal(3, ROWS, INPUTS), cell.begin(3)

    def loop(x: Tensor) -> Tensor:
        state, begun = None, cell.begin(3)
        for step in range(3):
            state = cell(x[step], state, begun.at(step))
        assert state is not None
        return state[0]

    whole = torch.compile(loop, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(input), loop(input))
    ours, expected = (torch.autograd.grad(run(input).sum(), list(cell.parameters())) for run in (whole, loop))
    torch.testing.assert_close(ours, expected)
    one = torch.compile(lambda x, state, place: cell(x, state, place), backend="aot_eager", fullgraph=True)
    state: Any = (torch.zeros(ROWS, HIDDEN, dtype=torch.float64),) * 2
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for step in range(7):
            expected_state = cell(input[0], state, sequence.at(step))
            state = one(input[0], state, sequence.at(step))
            torch.testing.assert_close(state, expected_state)


@compiled
def test_under_vmap() -> None:
    """Samples with seeds of their own, at one step, as a loop over them."""
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, hidden_dropout=0.4, zoneout_cell=0.3, dtype=torch.float64)
    inputs, seeds = normal(3, ROWS, INPUTS), torch.tensor([1, 2, 3])
    step = lambda x, seed: cell(x, None, CellSequence(seed, 2))[0]  # noqa: E731
    expected = torch.stack([step(x, seed) for x, seed in zip(inputs, seeds, strict=True)])
    torch.testing.assert_close(torch.vmap(step)(inputs, seeds), expected)


OF_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no tensor": ({"input": 3}, r"input: expected a tensor, got int"),
    "three dimensions": ({"input": torch.zeros(2, 2, INPUTS)}, r"input: expected shape .*got \(2, 2, 3\).*LSTM"),
    "features": ({"input": torch.zeros(2, 9)}, r"input_size=3.*got shape \(2, 9\)"),
    "type": ({"input": torch.zeros(2, INPUTS).double()}, r"input: expected torch.float32.*float64"),
    "state": ({"hx": torch.zeros(2)}, r"hx: expected a tuple \(h, c\)"),
    "state's shape": ({"hx": (torch.zeros(1, 2, HIDDEN),) * 2}, r"hx: expected h of shape \(2, 6\), got \(1, 2, 6\)"),
    "state's type": ({"hx": (torch.zeros(2, HIDDEN).double(),) * 2}, r"hx: expected h of torch.float32"),
    "reset's type": ({"reset": torch.zeros(2)}, r"reset: expected a bool tensor"),
    "reset's shape": ({"reset": torch.zeros(3, dtype=torch.bool)}, r"reset: expected shape \(2,\).*got \(3,\)"),
    "sequence": ({"sequence": 5}, r"sequence: expected what cell.begin\(\) returns, got int"),
    "two seeds": ({"sequence": CellSequence(torch.tensor(3)), "seed": 3}, r"seed: expected None beside a sequence"),
    "no seed": ({"sequence": CellSequence(None)}, r"sequence: expected one with a seed.*cell.train\(\)"),
    "before": ({"sequence": CellSequence(torch.tensor(3), -1)}, r"sequence: expected a step in \[0, .*\), got -1"),
    "after": (
        {"sequence": CellSequence(torch.tensor(3), 2**32 - 5)},
        r"sequence: expected a step in \[0, 4294967291\)",
    ),
    "a tensor": (
        {"sequence": CellSequence(torch.tensor(3), torch.tensor(1.5))},
        "sequence: expected an int for its ste",
    ),
    "seed": ({"seed": 0.5}, r"seed: expected an int"),
}


@pytest.mark.parametrize("case", OF_CALLS)
def test_bad_calls(case: str) -> None:
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, zoneout_cell=0.3)
    arguments, message = OF_CALLS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        cell(**{"input": torch.zeros(2, INPUTS), **arguments})


OF_CONSTRUCTION: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"regularization": Regularization(dropout=0.5)}, r"dropout: expected 0 for a cell.*got 0.5"),
    "pooled": (
        {"norm": BatchNorm(max_steps=3, input_statistics="sequence")},
        r"input_statistics='step'.*fusedreg.LSTM",
    ),
    "rates": ({"zoneout_cell": (0.1, 0.2)}, r"zoneout_cell: expected one number"),
    "size": ({"hidden_size": 0}, r"hidden_size: expected a positive int"),
    "backend": ({"backend": "gpu"}, r"backend: expected one of"),
}


@pytest.mark.parametrize("case", OF_CONSTRUCTION)
def test_bad_construction(case: str) -> None:
    options, message = OF_CONSTRUCTION[case]
    with pytest.raises((ValueError, TypeError), match=message):
        fusedreg.LSTMCell(**{"input_size": INPUTS, "hidden_size": HIDDEN, **options})


@pytest.mark.parametrize("options", [{"output_dropout": 0.3}, {"zoneout_hidden": 0.3, "zoneout_output": "candidate"}])
def test_an_output_that_is_not_h_is_asked_for(options: dict[str, Any]) -> None:
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, **options)
    with pytest.raises(ValueError, match=r"return_output: expected True with"):
        cell(torch.zeros(ROWS, INPUTS))
    output, (hidden, _) = cell(torch.randn(ROWS, INPUTS), return_output=True)
    assert not torch.equal(output, hidden)


def test_a_batch_of_one_with_batch_norm_changes_nothing() -> None:
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, norm=BatchNorm(max_steps=3))
    before = copy.deepcopy(cell.state_dict())
    with pytest.raises(ValueError, match=r"at least 2 rows.*LayerNorm"):
        cell(torch.randn(1, INPUTS))
    for name, value in cell.state_dict().items():
        assert torch.equal(value, before[name])


def test_batch_norm_counts_by_step() -> None:
    cell = fusedreg.LSTMCell(INPUTS, HIDDEN, norm=BatchNorm(max_steps=3))
    sequence = cell.begin()
    for step in (0, 2, 2, 7):  # past max_steps nothing is tracked
        cell(torch.randn(ROWS, INPUTS), None, sequence.at(step))
    assert cell.num_batches_tracked.tolist() == [1, 0, 2]
    shared = fusedreg.LSTMCell(INPUTS, HIDDEN, norm=BatchNorm(statistics="shared"))
    for step in (0, 1, 5):
        shared(torch.randn(ROWS, INPUTS), None, shared.begin().at(step))
    assert shared.num_batches_tracked.tolist() == [3]


def test_docstring_mentions_every_argument() -> None:
    text = (fusedreg.LSTMCell.__doc__ or "") + (fusedreg.LSTMCell.forward.__doc__ or "")
    of_regularization = {field.name for field in dataclasses.fields(Regularization)}  # described there
    for function in (fusedreg.LSTMCell.__init__, fusedreg.LSTMCell.forward):
        for name in [*inspect.signature(function).parameters][1:]:
            assert name in of_regularization or re.search(rf"\b{name}\b", text), name
