"""The functional form, and what it shares with the module: layouts, layers and directions, packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor, nn

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization
from fusedreg.functional import LSTMResult, LSTMResultWithCells, lstm

BACKENDS = ["reference", pytest.param("cpu", marks=compiled)]
REGULARIZED = Regularization(dropout=0.2, hidden_dropout=0.3, zoneout_cell=0.4, output_dropout=0.1, weight_dropout=0.2)


def torch_lstm(**options: Any) -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(3, 4, dtype=torch.float64, **options)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_equals_nn_lstm(
    backend: str, num_layers: int, bidirectional: bool, bias: bool, batch_first: bool, stateful: bool
) -> None:
    """Values and gradients, through a flat list and through a mapping."""
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    theirs = torch_lstm(bias=bias, **options)
    input = random(5, 2, 3)
    rows = 5 if batch_first else 2
    cells = num_layers * (1 + bidirectional)
    hx = (random(cells, rows, 4), random(cells, rows, 4) + 1) if stateful else None
    parameters = list(theirs.parameters())
    output, (hidden, cell) = lstm(input, hx, parameters, backend=backend, **options)
    expected, (expected_hidden, expected_cell) = theirs(input, hx)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(hidden, expected_hidden)
    torch.testing.assert_close(cell, expected_cell)
    ours = torch.autograd.grad(output.pow(2).sum() + hidden.sum() + cell.pow(2).sum(), parameters)
    right = torch.autograd.grad(expected.pow(2).sum() + expected_hidden.sum() + expected_cell.pow(2).sum(), parameters)
    for gradient, expected_gradient in zip(ours, right, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    named = lstm(input, hx, dict(theirs.named_parameters()), backend=backend, **options)
    assert torch.equal(named.output, output)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_projection_is_read_off_the_parameters(bias: bool, bidirectional: bool) -> None:
    theirs = torch_lstm(proj_size=2, num_layers=2, bias=bias, bidirectional=bidirectional)
    input = random(5, 2, 3)
    result = lstm(
        input, None, list(theirs.parameters()), num_layers=2, bidirectional=bidirectional, backend="reference"
    )
    expected, state = theirs(input)
    torch.testing.assert_close(result.output, expected)
    torch.testing.assert_close(result.state, state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(backend: str, batch_first: bool) -> None:
    """``batch_first`` does not apply, as in ``nn.LSTM``; resets and cells lose the rows' dimension too."""
    theirs = torch_lstm(num_layers=2, batch_first=batch_first)
    input, hx = random(5, 3), (random(2, 4), random(2, 4))
    result = lstm(
        input,
        hx,
        list(theirs.parameters()),
        num_layers=2,
        batch_first=batch_first,
        return_cell_states=True,
        reset=torch.zeros(5, dtype=torch.bool),
        backend=backend,
    )
    expected, state = theirs(input, hx)
    torch.testing.assert_close(result.output, expected)
    torch.testing.assert_close(result.state, state)
    assert isinstance(result, LSTMResultWithCells)
    assert result.cell_states.shape == (5, 4)
    torch.testing.assert_close(result.cell_states[-1], state[1][-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_unpacks_as_nn_lstms(backend: str) -> None:
    parameters = list(torch_lstm().parameters())
    result = lstm(random(5, 2, 3), None, parameters, backend=backend)
    assert type(result) is LSTMResult
    output, (hidden, cell) = result
    assert (output.shape, hidden.shape, cell.shape) == ((5, 2, 4), (1, 2, 4), (1, 2, 4))
    output, _, cells = lstm(random(5, 2, 3), None, parameters, return_cell_states=True, backend=backend)
    assert cells.shape == output.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_states_in_both_layouts(backend: str) -> None:
    """Of the last layer, both directions side by side, at their position in the input, differentiable."""
    theirs = torch_lstm(num_layers=2, bidirectional=True)
    parameters = list(theirs.parameters())
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "return_cell_states": True, "backend": backend}
    lengths = torch.tensor([5, 3])
    first = lstm(random(5, 2, 3), None, parameters, lengths=lengths, **options)
    second = lstm(random(5, 2, 3).transpose(0, 1), None, parameters, lengths=lengths, batch_first=True, **options)
    torch.testing.assert_close(first.cell_states, second.cell_states.transpose(0, 1))
    torch.testing.assert_close(first.cell_states[[4, 2], [0, 1], :4], first.state[1][2])
    torch.testing.assert_close(first.cell_states[0, :, 4:], first.state[1][3])
    assert not first.cell_states[3:, 1].any()
    assert all(gradient.any() for gradient in torch.autograd.grad(first.cell_states.sum(), parameters[:2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 0, 5], [5, 5, 5]], ids=str)
def test_lengths_are_rows_cut_short(backend: str, lengths: list[int]) -> None:
    """Each row is what it would be alone; one without steps returns its initial state; padding may be NaN."""
    theirs = torch_lstm(bidirectional=True)
    parameters = list(theirs.parameters())
    input, hx = random(5, 3, 3), (random(2, 3, 4), random(2, 3, 4))
    for row, length in enumerate(lengths):
        input[length:, row] = float("nan")
    output, state = lstm(input, hx, parameters, bidirectional=True, lengths=lengths, backend=backend)
    for row, length in enumerate(lengths):
        assert not output[length:, row].any()
        given = tuple(value[:, row] for value in hx)
        expected = (None, given) if length == 0 else theirs(input[:length, row], given)
        if expected[0] is not None:
            torch.testing.assert_close(output[:length, row], expected[0])
        for ours, right in zip(state, expected[1], strict=True):
            torch.testing.assert_close(ours[:, row], right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_reset_starts_anew(backend: str, batch_first: bool) -> None:
    """Two episodes in one row are two calls, the second from zero; the layout is the input's."""
    theirs = torch_lstm(num_layers=2)
    input, hx = random(6, 2, 3), (random(2, 2, 4), random(2, 2, 4))
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[4, 0] = True
    given = (input.transpose(0, 1), reset.t()) if batch_first else (input, reset)
    options: dict[str, Any] = {"num_layers": 2, "backend": backend, "batch_first": batch_first}
    output, state = lstm(given[0], hx, list(theirs.parameters()), reset=given[1], **options)
    output = output.transpose(0, 1) if batch_first else output
    first, _ = theirs(input[:4, 0], (hx[0][:, 0], hx[1][:, 0]))
    second, end = theirs(input[4:, 0])
    torch.testing.assert_close(output[:, 0], torch.cat((first, second)))
    torch.testing.assert_close(state[0][:, 0], end[0])
    torch.testing.assert_close(output[:, 1], theirs(input[:, 1], (hx[0][:, 1], hx[1][:, 1]))[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:fusedreg runs this LSTM with its reference")
def test_float32_cell_beside_narrow_input(backend: str, dtype: torch.dtype) -> None:
    """Carried unrounded: a cell that 16 bits cannot hold comes back in cell_states as it went in."""
    module = nn.LSTM(3, 4, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0[4:8] = 30.0  # forget gates at 1
    cell = torch.full((1, 2, 4), 1.0 + 2.0**-15)
    hx = (torch.zeros(1, 2, 4, dtype=dtype), cell)
    backend = "auto" if backend == "cpu" and dtype == torch.float16 else backend
    result = lstm(
        torch.zeros(5, 2, 3, dtype=dtype), hx, list(module.parameters()), return_cell_states=True, backend=backend
    )
    assert isinstance(result, LSTMResultWithCells)
    assert result.cell_states.dtype == torch.float32
    assert torch.equal(result.cell_states[-1], cell[0])
    assert (result.output.dtype, result.state[0].dtype, result.state[1].dtype) == (dtype, dtype, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    parameters = list(torch_lstm().parameters())
    output, (hidden, cell) = lstm(torch.empty(5, 0, 3, dtype=torch.float64), None, parameters, backend=backend)
    assert (output.shape, hidden.shape, cell.shape) == ((5, 0, 4), (1, 0, 4), (1, 0, 4))
    (output.sum() + hidden.sum()).backward()


def test_dropout_only_between_layers() -> None:
    """The last layer's output is never dropped; a list may leave out the last layer."""
    parameters = list(torch_lstm(num_layers=2).parameters())
    input = random(5, 2, 3)

    def call(rate: Any, seed: int) -> Tensor:
        options = Regularization(dropout=rate)
        return lstm(input, None, parameters, num_layers=2, training=True, regularization=options, seed=seed).output

    assert torch.equal(call(0.5, 1), call([0.5], 1))
    assert torch.equal(call(0.5, 1), call([0.5, 0.9], 1))
    assert not torch.equal(call(0.5, 1), call(0.5, 2))
    assert call(0.5, 1).all()


def test_no_seed_is_drawn_for_nothing() -> None:
    """Torch's generator moves only where a mask is drawn, and a given seed never moves it."""
    parameters = list(torch_lstm().parameters())
    before = torch.get_rng_state()
    lstm(random(5, 2, 3), None, parameters, training=True)
    lstm(random(5, 2, 3), None, parameters, training=False, regularization=REGULARIZED)
    lstm(random(5, 2, 3), None, parameters, training=True, regularization=REGULARIZED, seed=1)
    lstm(random(5, 2, 3), None, parameters, training=True, regularization=Regularization(dropout=0.5))
    assert torch.equal(torch.get_rng_state(), before)
    lstm(random(5, 2, 3), None, parameters, training=True, regularization=REGULARIZED)
    assert not torch.equal(torch.get_rng_state(), before)


def test_generator_draws_the_seed() -> None:
    parameters = list(torch_lstm().parameters())
    options: dict[str, Any] = {"training": True, "regularization": REGULARIZED}
    generator = torch.Generator().manual_seed(8)
    first = lstm(random(5, 2, 3), None, parameters, generator=generator, **options).output
    second = lstm(random(5, 2, 3), None, parameters, generator=generator, **options).output
    again = lstm(random(5, 2, 3), None, parameters, generator=torch.Generator().manual_seed(8), **options).output
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_batch_norm_reads_buffers_and_writes_none() -> None:
    module = fusedreg.LSTM(3, 4, norm=BatchNorm(max_steps=5), dtype=torch.float64)
    for _ in range(3):
        module(random(5, 4, 3))
    buffers = dict(module.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    options: dict[str, Any] = {"regularization": module.regularization, "buffers": buffers}
    parameters = dict(module.named_parameters())
    trained = lstm(random(5, 4, 3), None, parameters, training=True, **options).output
    assert all(torch.equal(value, before[name]) for name, value in buffers.items())
    evaluated = lstm(random(5, 4, 3), None, list(parameters.values()), **options).output
    assert torch.equal(evaluated, module.eval()(random(5, 4, 3))[0])
    assert not torch.allclose(trained, evaluated)


@pytest.mark.parametrize("norm", [LayerNorm(), LayerNorm(cell=False), BatchNorm(max_steps=5, input=False)], ids=str)
def test_flat_list_with_a_norm(norm: Any) -> None:
    module = fusedreg.LSTM(3, 4, 2, bidirectional=True, norm=norm, dtype=torch.float64).eval()
    result = lstm(
        random(5, 4, 3),
        None,
        list(module.parameters()),
        num_layers=2,
        bidirectional=True,
        regularization=module.regularization,
        buffers=dict(module.named_buffers()),
    )
    assert torch.equal(result.output, module(random(5, 4, 3))[0])
