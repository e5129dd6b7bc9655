"""Sequences of many steps, and results of more elements than 32 bits count."""

from __future__ import annotations

import os

import pytest
import torch
import torch.utils.deterministic
from helpers import compiled

import fusedreg


def free_gigabytes() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@compiled
@pytest.mark.parametrize("recompute", [False, True])
def test_two_hundred_thousand_steps(recompute: bool) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, 8)
    ours = fusedreg.LSTM.from_torch(theirs, recompute=recompute)
    input = torch.randn(200_000, 1, 3)
    results = []
    for module in (theirs, ours):
        leaf = input.clone().requires_grad_()
        output, (h_n, c_n) = module(leaf)
        loss = output[::1000].square().sum() + c_n.sum()
        results.append((output, h_n, c_n, *torch.autograd.grad(loss, [leaf, *module.parameters()])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.slow
@pytest.mark.skipif(free_gigabytes() < 12, reason="needs 12 GB of free memory")
def test_more_elements_than_32_bits_count() -> None:
    """Only the last row lives, so that what it computes stands beyond element 2**31 of every result."""
    # 4 GB of NaN would take longer than the layer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(0)
    steps, rows, hidden = 16_500, 128, 1024
    assert steps * rows * hidden > 2**31
    lstm = fusedreg.LSTM(1, hidden, dtype=torch.bfloat16)
    one = torch.randn(steps, 1, 1).bfloat16()
    lengths = torch.zeros(rows, dtype=torch.int64)
    lengths[-1] = steps
    with torch.no_grad():
        output, (h_n, c_n) = lstm(one.expand(steps, rows, 1), lengths=lengths)
        expected, (expected_h, expected_c) = lstm(one)
    assert torch.equal(output[:, -1], expected[:, 0])
    assert torch.equal(h_n[:, -1], expected_h[:, 0])
    assert torch.equal(c_n[:, -1], expected_c[:, 0])
    assert output[-1, :-1].eq(0).all()
    assert output[:, 0].eq(0).all()
