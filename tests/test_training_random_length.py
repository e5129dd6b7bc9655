"""Lengths drawn as the paper draws them, and learning rates scaled and put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedreg.training import RandomLength, scaled_learning_rate


def test_the_distribution() -> None:
    draw = RandomLength(70, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([draw() for _ in range(4000)], dtype=torch.float64)
    short = lengths < 52.5  # 3.5 deviations from either mean
    assert abs(short.double().mean() - 0.05) < 0.012
    # int() rounds towards 0: half a step less than the mean
    assert abs(lengths[~short].mean() - 69.5) < 0.4 and abs(lengths[~short].std() - 5) < 0.3
    assert abs(lengths[short].mean() - 34.5) < 1.5


def test_never_too_short_and_repeatable() -> None:
    draw = RandomLength(6, deviation=10.0, minimum=3)
    assert min(draw() for _ in range(200)) == 3
    one, other = (RandomLength(generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert [one() for _ in range(5)] == [other() for _ in range(5)]
    assert RandomLength(35, deviation=0.0, shortened=0.0)() == 35
    halved = RandomLength(35, deviation=0.0, shortened=1.0)
    assert halved.scale == 1.0
    assert halved() == 17 and halved.last == 17 and halved.scale == 17 / 35


def test_the_rate_is_scaled_within_the_block() -> None:
    lstm = nn.LSTM(2, 3)
    groups = [{"params": [lstm.weight_ih_l0], "lr": 4.0}, {"params": [lstm.weight_hh_l0]}]
    optimizer = torch.optim.SGD(groups, lr=2.0)
    lstm.weight_hh_l0.grad = torch.ones_like(lstm.weight_hh_l0)
    before = lstm.weight_hh_l0.detach().clone()
    with scaled_learning_rate(optimizer, 0.5):
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [2.0, 1.0]
    torch.testing.assert_close(lstm.weight_hh_l0.detach(), before - 1.0)
    with pytest.raises(KeyError), scaled_learning_rate(optimizer, 0.5):
        raise KeyError
    assert [group["lr"] for group in optimizer.param_groups] == [4.0, 2.0]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"length: expected an int, got 70\.0"):
        RandomLength(70.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="minimum: expected at least 1, got 0"):
        RandomLength(minimum=0)
    with pytest.raises(ValueError, match=r"shortened: expected a probability in \[0, 1\], got 2"):
        RandomLength(shortened=2)
    with pytest.raises(ValueError, match="deviation: expected a non-negative"):
        RandomLength(deviation=-1.0)
    optimizer = torch.optim.SGD(nn.LSTM(2, 3).parameters(), lr=1.0)
    with pytest.raises(ValueError, match="scale: expected a non-negative"), scaled_learning_rate(optimizer, -1.0):
        pass
