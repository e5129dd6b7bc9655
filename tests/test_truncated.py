"""Truncated back-propagation: chained pieces are the whole sequence; detached ones stop where they begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fusedreg
from fusedreg import truncated

T, B = 11, 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    {"num_layers": 2, "zoneout_cell": 0.4, "zoneout_hidden": 0.1, "cell_dropout": 0.2},
    {"norm": fusedreg.LayerNorm(), "recompute": True},
]


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    input = torch.randn(T, B, 3, generator=generator, dtype=dtype)
    reset = torch.rand(T, B, generator=generator) < 0.2
    return input, torch.tensor([11, 0, 4, 7]), reset


def run(lstm: fusedreg.LSTM, steps: int, batch_first: bool, stops: bool = False) -> tuple[Tensor, ...]:
    """Output, final state and gradients, of a run in pieces; one piece of T steps is the plain run."""
    input, lengths, reset = data()
    if batch_first:
        input, reset = input.transpose(0, 1), reset.transpose(0, 1)
    input.requires_grad_()
    state: Any = None
    outputs = []
    for piece in truncated.pieces(input, steps, lengths=lengths, reset=reset, batch_first=batch_first):
        begin = truncated.detach(state) if stops else state
        output, state = lstm(piece.input, begin, lengths=piece.lengths, reset=piece.reset)
        outputs.append(output)
    whole = torch.cat(outputs, 1 if batch_first else 0)
    loss = whole.square().sum() + state[0].sum() + state[1].square().sum()
    return (whole, *state, *torch.autograd.grad(loss, [input, *lstm.parameters()]))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 10, 20])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chained_pieces_are_the_whole_sequence(options: dict[str, Any], steps: int, batch_first: bool) -> None:
    torch.manual_seed(0)
    lstm = fusedreg.LSTM(3, 5, batch_first=batch_first, dtype=torch.float64, **options).eval()
    for value, expected in zip(run(lstm, steps, batch_first), run(lstm, T, batch_first), strict=True):
        torch.testing.assert_close(value, expected)


def test_detached_pieces_stop_where_they_begin() -> None:
    torch.manual_seed(0)
    lstm = fusedreg.LSTM(3, 5, dtype=torch.float64)
    input = data()[0].requires_grad_()
    state: Any = None
    for piece in truncated.pieces(input, 4):
        output, state = lstm(piece.input, truncated.detach(state))
        last = output
    (gradient,) = torch.autograd.grad(last.sum(), input)
    assert gradient[8:].ne(0).any(-1).all()
    assert gradient[:8].eq(0).all()
    torch.testing.assert_close(run(lstm, 4, False, stops=True)[0], run(lstm, T, False)[0])


def test_states() -> None:
    state = torch.full((2, 3, 4), float("nan")), torch.ones(2, 3, 4, requires_grad=True)
    hidden, cell = truncated.reset_rows(state, torch.tensor([True, False, True]))
    assert torch.equal(hidden.isnan().any(-1), torch.tensor([[False, True, False]] * 2))
    cell.sum().backward()
    assert state[1].grad is not None
    assert torch.equal(state[1].grad[0, :, 0], torch.tensor([0.0, 1.0, 0.0]))
    assert truncated.reset_rows(None, torch.tensor([True])) is None
    assert truncated.detach(None) is None
    assert not any(one.requires_grad for one in truncated.detach((cell, cell)))


def test_pieces_without_lengths_or_batch() -> None:
    found = list(truncated.pieces(torch.arange(10.0).reshape(5, 2), 2, batch_first=True))
    assert [piece.start for piece in found] == [0, 2, 4]
    assert [len(piece.input) for piece in found] == [2, 2, 1]
    assert all(piece.lengths is None and piece.reset is None for piece in found)


def test_steps_from_a_function() -> None:
    draws = iter([3, 1, 20])
    found = list(truncated.pieces(torch.zeros(9, 2, 1), lambda: next(draws), lengths=[9, 3]))
    assert [(piece.start, len(piece.input)) for piece in found] == [(0, 3), (3, 1), (4, 5)]
    assert [piece.lengths.tolist() for piece in found if piece.lengths is not None] == [[3, 3], [1, 0], [5, 0]]


def test_the_states_of_several_layers() -> None:
    states = [(torch.ones(1, 2, size, requires_grad=True) * 2, torch.ones(1, 2, size)) for size in (3, 4)]
    assert [part.requires_grad for pair in truncated.detach(states) for part in pair] == [False] * 4
    rows = truncated.reset_rows(states, torch.tensor([True, False]))
    assert [part.sum().item() for pair in rows for part in pair] == [6.0, 3.0, 8.0, 4.0]


def test_bad_arguments() -> None:
    input = torch.zeros(5, 2, 3)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        truncated.pieces(input, 0)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        list(truncated.pieces(input, lambda: 0))
    with pytest.raises(TypeError, match=r"steps: expected an int, got 2\.5"):
        truncated.pieces(input, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reset: expected shape \(5, 2\).*got \(2, 5\)"):
        truncated.pieces(input, 2, reset=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"input: expected a padded batch.*PackedSequence.*pad_packed_sequence"):
        truncated.pieces(pack_sequence([input[:, 0]]), 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rows: expected a bool tensor.*float32"):
        truncated.reset_rows(input, torch.zeros(2))
    with pytest.raises(ValueError, match=r"rows: expected shape \(B,\) = \(2,\), got \(3,\)"):
        truncated.reset_rows(input, torch.zeros(3, dtype=torch.bool))
