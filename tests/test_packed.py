"""``PackedSequence`` in and out: ``nn.LSTM``'s numbers and packing, and the caller's rows for the masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from fusedreg import Regularization
from fusedreg.functional import LSTMResultWithCells, lstm

BACKENDS = ["reference", pytest.param("cpu", marks=compiled)]
REGULARIZED = Regularization(dropout=0.2, hidden_dropout=0.3, zoneout_cell=0.4, output_dropout=0.1, weight_dropout=0.2)


def torch_lstm(**options: Any) -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(3, 4, dtype=torch.float64, **options)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_packed_sequences(backend: str, enforce_sorted: bool, bidirectional: bool, stateful: bool) -> None:
    """The same as ``nn.LSTM``, packed alike, for sorted and unsorted rows, with equal lengths among them."""
    lengths = [5, 4, 4, 1] if enforce_sorted else [4, 1, 5, 4]
    packed = pack_padded_sequence(random(5, 4, 3), torch.tensor(lengths), enforce_sorted=enforce_sorted)
    theirs = torch_lstm(bidirectional=bidirectional)
    cells = 1 + bidirectional
    hx = (random(cells, 4, 4), random(cells, 4, 4) - 1) if stateful else None
    result = lstm(
        packed,
        hx,
        list(theirs.parameters()),
        bidirectional=bidirectional,
        backend=backend,
        batch_first=True,
        return_cell_states=True,
    )
    expected, state = theirs(packed, hx)
    assert isinstance(result, LSTMResultWithCells)
    for ours in (result.output, result.cell_states):
        assert isinstance(ours, PackedSequence)
        assert torch.equal(ours.batch_sizes, expected.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            assert getattr(ours, name) is getattr(packed, name)
    torch.testing.assert_close(result.output.data, expected.data)
    torch.testing.assert_close(result.state, state)
    unpacked, _ = pad_packed_sequence(result.cell_states)
    last = torch.tensor(lengths) - 1
    torch.testing.assert_close(unpacked[last, torch.arange(4), :4], result.state[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_and_padded_draw_the_same_masks(backend: str, enforce_sorted: bool) -> None:
    """Row b of the masks is the caller's row b, sorted or not."""
    lengths = [5, 4, 4, 1] if enforce_sorted else [4, 1, 5, 4]
    input = random(5, 4, 3)
    packed = pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    options: dict[str, Any] = {"training": True, "regularization": REGULARIZED, "seed": 3, "backend": backend}
    parameters = list(torch_lstm(num_layers=2).parameters())
    from_packed = lstm(packed, None, parameters, num_layers=2, **options)
    from_padded = lstm(input, None, parameters, num_layers=2, lengths=lengths, **options)
    assert torch.equal(pad_packed_sequence(from_packed.output)[0], from_padded.output)
    for first, second in zip(from_packed.state, from_padded.state, strict=True):
        assert torch.equal(first, second)


def test_packed_gradients() -> None:
    rows = [random(4, 3).requires_grad_(), random(2, 3).requires_grad_()]
    theirs = torch_lstm()
    result = lstm(pack_sequence(rows), None, list(theirs.parameters()))
    ours = torch.autograd.grad(result.output.data.pow(2).sum(), rows)
    right = torch.autograd.grad(theirs(pack_sequence(rows))[0].data.pow(2).sum(), rows)
    for gradient, expected in zip(ours, right, strict=True):
        torch.testing.assert_close(gradient, expected)
