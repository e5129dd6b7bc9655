"""Truncated back-propagation through time: a long sequence in pieces, the state carried from one to the next.

Without :func:`detach` between them the pieces compute what the whole sequence computes, gradients included; with it,
each piece's gradient stops where the piece begins (Williams and Peng 1990). Masks are drawn anew for each call, so the
pieces of a training run with dropout have masks of their own.

Example:
    >>> import torch, fusedreg
    >>> from fusedreg import truncated
    >>> lstm, input, state = fusedreg.LSTM(3, 4), torch.randn(100, 2, 3), None
    >>> for piece in truncated.pieces(input, 35):
    ...     output, state = lstm(piece.input, truncated.detach(state), lengths=piece.lengths)
    ...     output.square().mean().backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["Piece", "detach", "pieces", "reset_rows"]

State = TypeVar("State", Tensor, tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]], None)


class Piece(NamedTuple):
    """Some consecutive steps of a sequence, with what the LSTM is told about them.

    ``start`` is the position of its first step in the whole sequence. ``lengths`` and ``reset`` are ``None`` where the
    whole sequence had none.
    """

    start: int
    input: Tensor
    lengths: Tensor | None
    reset: Tensor | None


def pieces(
    input: Tensor,
    steps: int | Callable[[], int],
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    batch_first: bool = False,
) -> Iterator[Piece]:
    """Cut a sequence into pieces of ``steps`` steps, the last one as long as what remains.

    A row that has ended has length 0 in the pieces that follow: its state is carried unchanged and its output is 0.

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, or ``(T, I)``.
        steps: of a piece, at least 1; or a function that gives the next piece's.
        lengths: ``(B,)`` of the whole sequence.
        reset: bool, of the whole sequence: the input's shape without its features.
        batch_first: the input's layout; not for an unbatched input.

    Returns:
        The pieces in order; views of ``input`` and ``reset``.

    Raises:
        ValueError: ``steps`` below 1, or a ``reset`` of another shape. TypeError: ``steps`` is not an int, ``input``
            not a tensor. What a function gives is checked when its piece is cut.

    Example:
        >>> import torch
        >>> from fusedreg import truncated
        >>> [(piece.start, len(piece.input)) for piece in truncated.pieces(torch.zeros(8, 2, 3), 3)]
        [(0, 3), (3, 3), (6, 2)]
    """
    if not isinstance(input, Tensor):
        raise TypeError(
            f"input: expected a padded batch in a tensor, got {type(input).__name__}; for a PackedSequence pass what "
            f"torch.nn.utils.rnn.pad_packed_sequence gives, batch and lengths"
        )
    if not callable(steps):
        _check_steps(steps)
    if reset is not None and reset.shape != input.shape[:-1]:
        raise ValueError(
            f"reset: expected shape {tuple(input.shape[:-1])}, the input's without its features, got "
            f"{tuple(reset.shape)}"
        )
    axis = 1 if batch_first and input.dim() == 3 else 0
    whole = None if lengths is None else torch.as_tensor(lengths)
    return _cut(input, steps, axis, whole, reset)


def _check_steps(steps: object) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {steps!r} of type {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    return steps


def _cut(
    input: Tensor, steps: int | Callable[[], int], axis: int, lengths: Tensor | None, reset: Tensor | None
) -> Iterator[Piece]:
    start = 0
    while start < input.shape[axis]:
        count = min(_check_steps(steps()) if callable(steps) else steps, input.shape[axis] - start)
        yield Piece(
            start,
            input.narrow(axis, start, count),
            None if lengths is None else (lengths - start).clamp(0, count),
            None if reset is None else reset.narrow(axis, start, count),
        )
        start += count


def detach(state: State) -> State:
    """The same state, through which no gradient passes: where a piece begins. ``None``, the zero state, stays.

    Args:
        state: ``(h, c)`` as an LSTM returns it, one of its tensors, a list of such pairs (the layers of a model), or
            ``None``.

    Example:
        >>> import torch
        >>> from fusedreg import truncated
        >>> truncated.detach(torch.zeros(2, requires_grad=True) * 3).requires_grad
        False
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, list):
        return [detach(pair) for pair in state]
    hidden, cell = state
    return hidden.detach(), cell.detach()


def reset_rows(state: State, rows: Tensor) -> State:
    """The state with some rows set to zero: rows whose next piece belongs to another sequence.

    Selected, not multiplied: a state of NaN becomes zero too, and no gradient passes. Resets *inside* a piece are the
    LSTM's own ``reset``.

    Args:
        state: ``(h, c)`` of shapes ``(L * D, B, ·)``, one of them, a list of such pairs, or ``None``.
        rows: ``(B,)`` bool, true for the rows to reset.

    Raises:
        TypeError: ``rows`` is not bool. ValueError: not one value a row.

    Example:
        >>> import torch
        >>> from fusedreg import truncated
        >>> truncated.reset_rows(torch.ones(1, 2, 3), torch.tensor([True, False]))[0, :, 0]
        tensor([0., 1.])
    """
    if state is None:
        return None
    if rows.dtype != torch.bool:
        raise TypeError(f"rows: expected a bool tensor, true for the rows to reset, got {rows.dtype}")
    if isinstance(state, list):
        return [reset_rows(pair, rows) for pair in state]
    if not isinstance(state, Tensor):
        hidden, cell = state
        return reset_rows(hidden, rows), reset_rows(cell, rows)
    if rows.shape != state.shape[1:2]:
        raise ValueError(f"rows: expected shape (B,) = {tuple(state.shape[1:2])}, got {tuple(rows.shape)}")
    return torch.where(
        rows.to(state.device)[None, :, None], torch.zeros((), dtype=state.dtype, device=state.device), state
    )
