"""``torch.autocast``: types as ``nn.LSTM`` has them, and the carried cell in float32."""

from __future__ import annotations

import copy
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
    """Types as ``nn.LSTM`` has them; cells stay float32; gradients are in the parameters' type."""
    theirs = nn.LSTM(3, 4, 2)
    ours = fusedreg.LSTM.from_torch(theirs, backend=backend)
    input: Any = torch.randn(5, 2, 3)
    input = pack_sequence([input[:, 0], input[:3, 1]]) if packed else input
    hx = (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = ours(input, hx, return_cell_states=True), theirs(input, hx)
    data = [value.data if packed else value for value in (result.output, expected[0], result.cell_states)]
    assert data[0].dtype == data[1].dtype == (torch.float32 if packed else torch.bfloat16)
    assert result.state[1].dtype == expected[1][1].dtype == data[0].dtype
    assert data[2].dtype == torch.float32
    torch.testing.assert_close(data[0].float(), data[1].float(), rtol=0.02, atol=0.02)
    data[0].float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.double()(torch.randn(5, 2, 3).double()).output.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_an_autocast_call_is_the_narrow_modules(backend: str, dtype: torch.dtype) -> None:
    """Inputs and parameters are cast, the seed is not: bitwise what a module of that type computes with its masks."""
    torch.manual_seed(0)
    module = fusedreg.LSTM(3, 4, 2, zoneout_cell=0.2, hidden_dropout=0.3, weight_dropout=0.2, backend=backend)
    narrow = copy.deepcopy(module).to(dtype)
    input = torch.randn(5, 2, 3)
    seed = 2**40 + 1  # which a 16-bit type cannot hold
    with torch.autocast("cpu", dtype):
        output, state = module(input, seed=seed)
    right, right_state = narrow(input.to(dtype), seed=seed)
    assert torch.equal(output, right)
    assert all(map(torch.equal, state, right_state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_statistics_stay_wide(backend: str) -> None:
    torch.manual_seed(0)
    module = fusedreg.LSTM(3, 4, norm=fusedreg.BatchNorm(max_steps=5), backend=backend)
    wide, input = copy.deepcopy(module), torch.randn(5, 9, 3)
    wide(input)
    with torch.autocast("cpu", torch.bfloat16):
        module(input)
    for name, value in wide.named_buffers():
        found = module.get_buffer(name)
        assert found.dtype == value.dtype
        if value.is_floating_point():
            assert not torch.equal(found, found.bfloat16().float())
            torch.testing.assert_close(found, value, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_scaler_skips_the_step_that_overflows(backend: str) -> None:
    """A training loop in float16; in its second step a gradient is infinite."""
    torch.manual_seed(0)
    module = fusedreg.LSTM(3, 4, zoneout_cell=0.2, hidden_dropout=0.3, backend=backend)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for step in range(12):
        before = [value.detach().clone() for value in module.parameters()]
        with torch.autocast("cpu", torch.float16):
            loss = module(torch.ones(5, 2, 3), seed=1)[0].float().sub(0.5).square().mean()
        scaler.scale(loss * float("inf") if step == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed = not all(map(torch.equal, before, module.parameters()))
        assert changed == (step != 1)
        losses.append(loss.item())
    assert scaler.get_scale() == 512.0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_parameters_of_16_bits(backend: str, dtype: torch.dtype) -> None:
    """Types of results and gradients as those of ``nn.LSTM``; the cells are wide."""
    theirs = nn.LSTM(3, 4, dtype=dtype)
    ours = fusedreg.LSTM.from_torch(theirs, backend=backend)
    input = torch.randn(5, 2, 3, dtype=dtype)
    result, expected = ours(input, return_cell_states=True), theirs(input)
    for found, right in zip((result.output, *result.state), (expected[0], *expected[1]), strict=True):
        assert found.dtype == right.dtype
        torch.testing.assert_close(found, right, rtol=0.03, atol=0.03)
    assert result.cell_states.dtype == torch.float32
    result.output.sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in ours.parameters())
