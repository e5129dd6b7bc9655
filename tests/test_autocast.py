"""``torch.autocast``: types as ``nn.LSTM`` has them, and the carried cell in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import compiled
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedreg

BACKENDS = ["reference", pytest.param("cpu", marks=compiled)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_autocast(backend: str, packed: bool) -> None:
    """Types as ``nn.LSTM`` has them for padded input; cells stay float32; gradients are in the parameters' type."""
    theirs = nn.LSTM(3, 4, 2)
    ours = fusedreg.LSTM.from_torch(theirs, backend=backend)
    input: Any = torch.randn(5, 2, 3)
    input = pack_sequence([input[:, 0], input[:3, 1]]) if packed else input
    hx = (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = ours(input, hx, return_cell_states=True), theirs(input, hx)
    data = [value.data if packed else value for value in (result.output, expected[0], result.cell_states)]
    assert data[0].dtype == result.state[1].dtype == torch.bfloat16
    assert packed or data[1].dtype == expected[1][1].dtype == torch.bfloat16
    assert data[2].dtype == torch.float32
    torch.testing.assert_close(data[0].float(), data[1].float(), rtol=0.02, atol=0.02)
    data[0].float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.double()(torch.randn(5, 2, 3).double()).output.dtype == torch.float64
