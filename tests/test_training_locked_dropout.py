"""Locked dropout: one mask a row, the same at every step, and rows' own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedreg.training import LockedDropout


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_mask_a_row(batch_first: bool) -> None:
    torch.manual_seed(0)
    input = torch.rand(9, 50, 40, dtype=torch.float64) + 0.5
    laid = input.transpose(0, 1) if batch_first else input
    dropped = LockedDropout(0.3, batch_first=batch_first)(laid)
    masks = dropped.transpose(0, 1) / input if batch_first else dropped / input
    torch.testing.assert_close(masks, masks[:1].expand_as(masks))
    values = masks[0].round(decimals=6).unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7], dtype=torch.float64), atol=1e-6, rtol=0)
    kept = (masks[0] > 0).double().mean()
    assert abs(kept - 0.7) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert not torch.equal(masks[0, 0], masks[0, 1])


def test_anew_at_each_call_and_nothing_in_evaluation() -> None:
    locked, input = LockedDropout(0.5), torch.ones(3, 4, 50)
    assert not torch.equal(locked(input), locked(input))
    torch.manual_seed(1)
    first = locked(input)
    torch.manual_seed(1)
    assert torch.equal(first, locked(input))
    assert locked.eval()(input) is input
    assert LockedDropout(0.0)(input) is input


def test_unbatched() -> None:
    for batch_first in (False, True):
        dropped = LockedDropout(0.5, batch_first=batch_first)(torch.ones(7, 30))
        assert torch.equal(dropped, dropped[:1].expand(7, 30)) and dropped.unique().numel() == 2


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed(enforce_sorted: bool) -> None:
    torch.manual_seed(0)
    lengths = [5, 3, 3, 1] if enforce_sorted else [3, 1, 5, 3]
    packed = pack_padded_sequence(torch.ones(5, 4, 30), torch.tensor(lengths), enforce_sorted=enforce_sorted)
    dropped, counts = pad_packed_sequence(LockedDropout(0.5)(packed))
    assert counts.tolist() == lengths
    for row, length in enumerate(lengths):
        assert torch.equal(dropped[:length, row], dropped[:1, row].expand(length, 30))
    assert not torch.equal(dropped[0, 0], dropped[0, 1])


def test_the_gradient_has_the_same_mask() -> None:
    input = torch.ones(4, 2, 20, requires_grad=True)
    dropped = LockedDropout(0.5)(input)
    (gradient,) = torch.autograd.grad(dropped.sum(), input)
    assert torch.equal(gradient, dropped.detach())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"rate: expected a probability of dropping in \[0, 1\), got 1\.0"):
        LockedDropout(1.0)
    with pytest.raises(TypeError, match=r"rate: expected a number, got '0\.5'"):
        LockedDropout("0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input: expected \(T, B, F\).*got shape \(3,\)"):
        LockedDropout(0.5)(torch.ones(3))
