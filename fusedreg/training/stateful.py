"""Stateful batching: contiguous streams cut into pieces, the state carried from one to the next, streams shuffled.

The cutting, detaching and resetting is :mod:`fusedreg.truncated`'s; this is the order in which pieces come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusedreg import truncated
from fusedreg.truncated import State


class StreamBatch(NamedTuple):
    """Some consecutive steps of several streams.

    ``input`` and ``target`` are ``(T, B, ...)``, or ``(B, T, ...)`` with ``batch_first``; ``target`` and ``lengths``
    are ``None`` where there are none. ``start`` is the first step's position in its stream, and ``streams``, ``(B,)``,
    says which streams these are.
    """

    input: Tensor
    target: Tensor | None
    lengths: Tensor | None
    start: int
    streams: Tensor

    @property
    def first(self) -> bool:
        """Whether the streams begin here, and the state of others is of no use."""
        return self.start == 0

    def carry(self, state: State) -> State | None:
        """The state to begin with: ``None`` where the streams begin, else what was carried, detached.

        Args:
            state: what the LSTM returned for the batch before: ``(h, c)``, or a list of such pairs.
        """
        return None if self.first else truncated.detach(state)


def contiguous_streams(data: Tensor, rows: int) -> Tensor:
    """Cut one long sequence into ``rows`` streams side by side, each of consecutive steps.

    What does not fill a stream, at most ``rows - 1`` steps at the end, is left out.

    Args:
        data: ``(N, ...)``, at least ``rows`` steps.
        rows: the batch size ``B``.

    Returns:
        ``(N // B, B, ...)``: column ``b`` holds steps ``b · (N // B)`` and on.

    Raises:
        ValueError, TypeError: ``rows`` is not an int between 1 and N, ``data`` is no tensor.

    Example:
        >>> import torch, fusedreg
        >>> fusedreg.training.contiguous_streams(torch.arange(7), 2)
        tensor([[0, 3],
                [1, 4],
                [2, 5]])
    """
    _check_count("rows", rows)
    if not isinstance(data, Tensor) or data.dim() == 0:
        got = "no dimensions" if isinstance(data, Tensor) else type(data).__name__
        raise TypeError(f"data: expected a tensor (N, ...), got {got}; convert with torch.as_tensor")
    if len(data) < rows:
        raise ValueError(f"rows: expected at most the {len(data)} steps of data, got {rows}; pass a smaller batch")
    steps = len(data) // rows
    return data[: steps * rows].reshape(rows, steps, *data.shape[1:]).transpose(0, 1)


class StatefulBatches:
    """Batches of truncated back-propagation: whole streams in groups, each group's pieces in order.

    A group of ``rows`` streams is run from its beginning to its end, piece by piece, so that each row's state is
    carried on; then the next group begins, from the zero state. ``shuffle`` draws anew, each time the batches are
    iterated over, which streams go together and in what order: whole streams, never steps inside of them.

    Args:
        inputs: the streams: ``(T, S, ...)``, time first, or ``S`` tensors ``(T_s, ...)`` of any lengths, at least 1.
            With ``batch_first`` a tensor is ``(S, T, ...)``.
        targets: the same for what is to be predicted at each step, or ``None``.
        rows: streams in a batch; the last group may have fewer. Default: all of them.
        steps: of a piece: a number, or a function that draws one for each piece, as
            :class:`~fusedreg.training.RandomLength` does.
        shuffle: the streams, at each iteration.
        drop_last: leave out a last group of fewer rows.
        batch_first: the layout of ``inputs``, ``targets`` and the batches.
        generator: shuffles; default: torch's.

    Yields:
        :class:`StreamBatch`. ``lengths`` is there where a group's streams differ in length; a row that has ended has
        length 0, and its padding is 0.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, fusedreg
        >>> streams = fusedreg.training.contiguous_streams(torch.randn(1000, 3), 4)
        >>> lstm, state = fusedreg.LSTM(3, 5), None
        >>> for batch in fusedreg.training.StatefulBatches(streams[:-1], streams[1:], steps=35):
        ...     output, state = lstm(batch.input, batch.carry(state))
        ...     output.square().mean().backward()
    """

    def __init__(
        self,
        inputs: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor] | None = None,
        *,
        steps: int | Callable[[], int],
        rows: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        batch_first: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.inputs = _streams("inputs", inputs, batch_first)
        self.targets = None if targets is None else _streams("targets", targets, batch_first)
        if self.targets is not None and [len(one) for one in self.inputs] != [len(one) for one in self.targets]:
            raise ValueError("targets: expected as many streams, as long as those of inputs, got others")
        if rows is not None:
            _check_count("rows", rows)
        if not callable(steps):
            _check_count("steps", steps)
        self.rows = len(self.inputs) if rows is None else rows
        self.steps = steps
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.batch_first = batch_first
        self.generator = generator

    def __iter__(self) -> Iterator[StreamBatch]:
        count = len(self.inputs)
        order = torch.randperm(count, generator=self.generator) if self.shuffle else torch.arange(count)
        for group in order.split(self.rows):
            if len(group) == self.rows or not self.drop_last:
                yield from self._run(group)

    def _run(self, group: Tensor) -> Iterator[StreamBatch]:
        members = group.tolist()
        counts = [len(self.inputs[member]) for member in members]
        lengths = None if len(set(counts)) == 1 else torch.tensor(counts)
        input = self._together(self.inputs, members)
        target = None if self.targets is None else self._together(self.targets, members)
        time_axis = 1 if self.batch_first else 0
        # The pieces are cut from one feature that every tensor has, time and rows: words have no others.
        clock = torch.empty(*input.shape[:2], 1, device="meta")
        for piece in truncated.pieces(clock, self.steps, lengths=lengths, batch_first=self.batch_first):
            count = piece.input.shape[time_axis]
            yield StreamBatch(
                input.narrow(time_axis, piece.start, count),
                None if target is None else target.narrow(time_axis, piece.start, count),
                piece.lengths,
                piece.start,
                group,
            )

    def _together(self, streams: Sequence[Tensor], members: list[int]) -> Tensor:
        chosen = [streams[member] for member in members]
        return pad_sequence(chosen, batch_first=self.batch_first)

    def __len__(self) -> int:
        """How many batches an iteration has, where the streams are equally long and ``steps`` is a number."""
        counts = {len(stream) for stream in self.inputs}
        if callable(self.steps) or len(counts) != 1:
            raise TypeError("len(): expected a number of steps and streams of one length; count while iterating")
        groups = len(self.inputs) // self.rows if self.drop_last else -(-len(self.inputs) // self.rows)
        return groups * -(-counts.pop() // self.steps)


def _streams(argument: str, streams: Tensor | Sequence[Tensor], batch_first: bool) -> list[Tensor]:
    if isinstance(streams, Tensor):
        if streams.dim() < 2 or 0 in streams.shape[:2]:
            raise ValueError(
                f"{argument}: expected (T, S, ...), or (S, T, ...) with batch_first, got shape "
                f"{tuple(streams.shape)}; contiguous_streams makes streams of one long sequence"
            )
        return list(streams.unbind(0 if batch_first else 1))
    result = list(streams)
    if not result or not all(isinstance(one, Tensor) and one.dim() >= 1 and len(one) > 0 for one in result):
        raise ValueError(f"{argument}: expected tensors of at least one step each, got {len(result)} of another kind")
    return result


def _check_count(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{argument}: expected at least 1, got {value}")
