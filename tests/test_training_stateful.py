"""Streams: contiguous, complete, carried on from piece to piece, and shuffled whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedreg
from fusedreg.training import RandomLength, StatefulBatches, contiguous_streams


def test_contiguous_streams() -> None:
    data = torch.arange(23)
    streams = contiguous_streams(data, 4)
    assert streams.shape == (5, 4)
    assert torch.equal(streams.t().flatten(), data[:20])
    assert contiguous_streams(torch.zeros(12, 3), 2).shape == (6, 2, 3)
    assert torch.equal(contiguous_streams(data, 23), data[None])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])
def test_the_whole_stream_is_run(kind: Any, batch_first: bool) -> None:
    """Piece by piece with the state carried: the outputs of the whole; no gradient into an earlier piece."""
    torch.manual_seed(0)
    streams = torch.randn(11, 3, 2, dtype=torch.float64)
    lstm, state, outputs, targets = kind(2, 4, dtype=torch.float64, batch_first=batch_first), None, [], []
    inputs = streams.transpose(0, 1) if batch_first else streams
    batches = StatefulBatches(inputs, inputs * 2, steps=4, batch_first=batch_first)
    for batch in batches:
        carried = batch.carry(state)
        assert (carried is None) == batch.first == (batch.start == 0)
        assert carried is None or not carried[0].requires_grad
        output, state = lstm(batch.input, carried)
        outputs.append(output)
        targets.append(batch.target)
        assert batch.lengths is None and torch.equal(batch.streams, torch.arange(3))
    axis = 1 if batch_first else 0
    torch.testing.assert_close(torch.cat(outputs, axis), lstm(inputs)[0])
    assert torch.equal(torch.cat(targets, axis), inputs * 2)
    assert len(batches) == len(outputs) == 3


def seen(batches: StatefulBatches) -> dict[int, list[int]]:
    """The values that each stream gave, in the order in which they came."""
    result: dict[int, list[int]] = {}
    for batch in batches:
        for row, stream in enumerate(batch.streams.tolist()):
            length = len(batch.input) if batch.lengths is None else int(batch.lengths[row])
            result.setdefault(stream, []).extend(batch.input[:length, row].tolist())
    return result


def test_whole_streams_are_shuffled() -> None:
    streams = contiguous_streams(torch.arange(60), 6)
    expected = {stream: streams[:, stream].tolist() for stream in range(6)}
    draw = torch.Generator().manual_seed(0)
    batches = StatefulBatches(streams, steps=3, rows=2, shuffle=True, generator=draw)
    orders = []
    for _ in range(4):
        assert seen(batches) == expected  # nothing inside of a stream is out of order, nothing is missing
        orders.append([batch.streams.tolist() for batch in batches])
    assert len({str(order) for order in orders}) == 4
    unshuffled = [batch.streams.tolist() for batch in StatefulBatches(streams, steps=10, rows=2)]
    assert unshuffled == [[0, 1], [2, 3], [4, 5]]


def test_streams_of_different_length() -> None:
    torch.manual_seed(0)
    streams = [torch.randn(length, 2, dtype=torch.float64) for length in (7, 3, 5, 1, 4)]
    lstm, state = fusedreg.LSTM(2, 4, dtype=torch.float64), None
    collected: dict[int, list[Tensor]] = {}
    for batch in StatefulBatches(streams, steps=3, rows=2, shuffle=True):
        output, state = lstm(batch.input, batch.carry(state), lengths=batch.lengths)
        for row, stream in enumerate(batch.streams.tolist()):
            length = len(output) if batch.lengths is None else int(batch.lengths[row])
            collected.setdefault(stream, []).append(output[:length, row])
    for stream, value in enumerate(streams):
        torch.testing.assert_close(torch.cat(collected[stream]), lstm(value)[0])


def test_the_last_group() -> None:
    streams = contiguous_streams(torch.arange(50), 5)
    assert [len(batch.streams) for batch in StatefulBatches(streams, steps=10, rows=2)] == [2, 2, 1]
    dropping = StatefulBatches(streams, steps=10, rows=2, drop_last=True)
    assert [len(batch.streams) for batch in dropping] == [2, 2] and len(dropping) == 2


def test_lengths_drawn_for_each_piece() -> None:
    streams = contiguous_streams(torch.arange(400), 2)
    batches = StatefulBatches(streams, steps=RandomLength(20, generator=torch.Generator().manual_seed(0)))
    lengths = [len(batch.input) for batch in batches]
    assert sum(lengths) == 200 and len(set(lengths)) > 2
    assert seen(batches)[1] == list(range(200, 400))
    with pytest.raises(TypeError, match=r"len\(\): expected a number of steps"):
        len(batches)


def test_bad_arguments() -> None:
    streams = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="rows: expected at most the 3 steps of data, got 4"):
        contiguous_streams(torch.zeros(3), 4)
    with pytest.raises(TypeError, match=r"data: expected a tensor \(N, \.\.\.\), got list"):
        contiguous_streams([1, 2, 3], 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        StatefulBatches(streams, steps=1, rows=0)
    with pytest.raises(TypeError, match=r"steps: expected an int, got 2\.5"):
        StatefulBatches(streams, steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inputs: expected \(T, S, \.\.\.\).*got shape \(5,\)"):
        StatefulBatches(streams[:, 0], steps=1)
    with pytest.raises(ValueError, match="inputs: expected tensors of at least one step each"):
        StatefulBatches([torch.zeros(0, 2)], steps=1)
    with pytest.raises(ValueError, match="targets: expected as many streams, as long as those of inputs"):
        StatefulBatches(streams, streams[1:], steps=1)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        list(StatefulBatches(streams, steps=lambda: 0))
