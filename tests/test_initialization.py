"""Initial values: the forget gate's bias is a sum, and each gate's recurrent matrix is orthogonal on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fusedreg
from fusedreg.initialization import orthogonal_recurrent, set_forget_bias

CLASSES = pytest.mark.parametrize("cls", [fusedreg.LSTM, nn.LSTM])


@CLASSES
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 3}], ids=str)
def test_forget_bias_is_set_in_the_sum(cls: Any, options: dict[str, Any]) -> None:
    module = cls(4, 5, **options)
    before = {name: value.clone() for name, value in module.named_parameters()}
    assert set_forget_bias(module, 1.5) is module
    for name, value in module.named_parameters():
        if not name.startswith("bias"):
            assert torch.equal(value, before[name])
            continue
        assert torch.equal(value[:5], before[name][:5])
        assert torch.equal(value[10:], before[name][10:])
        if name.startswith("bias_ih"):
            other = getattr(module, name.replace("bias_ih", "bias_hh"))
            assert torch.equal(value[5:10] + other[5:10], torch.full((5,), 1.5))
    assert all(value.requires_grad for value in module.parameters())


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_recurrent_blocks_are_orthogonal(cls: Any, dtype: torch.dtype) -> None:
    module = cls(4, 6, num_layers=2, bidirectional=True, dtype=dtype)
    before = {name: value.clone() for name, value in module.named_parameters()}
    assert orthogonal_recurrent(module, gain=2.0) is module
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for name, value in module.named_parameters():
        if not name.startswith("weight_hh"):
            assert torch.equal(value, before[name])
            continue
        blocks = value.detach().double().chunk(4)
        for block in blocks:
            product = block @ block.t()
            torch.testing.assert_close(product, 4 * torch.eye(6, dtype=torch.float64), atol=tolerance, rtol=0)
        assert not torch.equal(blocks[0], blocks[1])


def test_projection_has_orthonormal_columns() -> None:
    module = orthogonal_recurrent(fusedreg.LSTM(4, 6, proj_size=3))
    for block in module.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(block.t() @ block, torch.eye(3), atol=1e-5, rtol=0)


def test_generator() -> None:
    first = orthogonal_recurrent(fusedreg.LSTM(4, 6), generator=torch.Generator().manual_seed(1))
    second = orthogonal_recurrent(fusedreg.LSTM(4, 6), generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.weight_hh_l0, second.weight_hh_l0)


@pytest.mark.parametrize("function", [set_forget_bias, orthogonal_recurrent])
@pytest.mark.parametrize(
    "module", [nn.GRU(4, 5), nn.Linear(4, 5), nn.Sequential(nn.LSTM(4, 5))], ids=lambda m: type(m).__name__
)
def test_other_modules_are_refused(function: Any, module: nn.Module) -> None:
    with pytest.raises(TypeError, match=rf"module: expected .*LSTM, got {type(module).__name__}"):
        function(module)


@CLASSES
def test_forget_bias_needs_biases(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"module: expected biases, got bias=False; .*bias=True"):
        set_forget_bias(cls(4, 5, bias=False))
