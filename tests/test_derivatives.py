"""What training programs do with gradients: penalties on them, products with a Hessian, deterministic runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor

import fusedreg

BACKENDS = ["reference", pytest.param("cpu", marks=compiled)]


def critic(backend: str) -> tuple[fusedreg.LSTM, Tensor]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"zoneout_cell": 0.2, "hidden_dropout": 0.3, "weight_dropout": 0.2}
    module = fusedreg.LSTM(3, 4, 2, dtype=torch.float64, backend=backend, **options)
    return module, torch.randn(5, 2, 3, dtype=torch.float64)


def score(module: fusedreg.LSTM, input: Tensor) -> Tensor:
    result: Tensor = module(input, seed=3).output[-1].pow(2).sum()
    return result


def penalty(module: fusedreg.LSTM, input: Tensor) -> Tensor:
    """That of a Wasserstein critic: the norm of the score's gradient is to be 1."""
    leaf = input.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(module, leaf), leaf, create_graph=True)
    return (gradient.norm() - 1).pow(2)


@compiled
def test_a_gradient_penalty_trains_the_weights() -> None:
    """Its gradients are the reference's and those of differences; going along them makes it smaller."""
    module, input = critic("cpu")
    law, _ = critic("reference")
    found = torch.autograd.grad(penalty(module, input), list(module.parameters()))
    right = torch.autograd.grad(penalty(law, input), list(law.parameters()))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)
    weight, step = module.weight_hh_l0, 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            weight[3, 1] += sign * step
            with torch.enable_grad():
                values.append(penalty(module, input).item())
        weight[3, 1] += step
    position = [name for name, _ in module.named_parameters()].index("weight_hh_l0")
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), found[position][3, 1].item(), rtol=1e-5, atol=1e-8)
    optimizer, first = torch.optim.SGD(module.parameters(), 0.05), penalty(module, input).item()
    for _ in range(5):
        optimizer.zero_grad()
        penalty(module, input).backward()
        optimizer.step()
    assert penalty(module, input).item() < first


@compiled
def test_products_with_a_hessian() -> None:
    """By ``torch.autograd.functional`` and by ``torch.func``, against the reference's Hessian."""
    module, input = critic("cpu")
    law, _ = critic("reference")
    direction = torch.randn_like(input)
    hessian = torch.autograd.functional.hessian(lambda x: score(law, x), input)
    expected = torch.tensordot(hessian, direction, 3)
    _, product = torch.autograd.functional.hvp(lambda x: score(module, x), input, direction)
    torch.testing.assert_close(product, expected)
    gradient = torch.func.grad(lambda x: score(module, x))
    _, pullback = torch.func.vjp(gradient, input)
    torch.testing.assert_close(pullback(direction)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [None, fusedreg.BatchNorm(max_steps=5), fusedreg.LayerNorm()], ids=type)
def test_deterministic_algorithms(backend: str, norm: Any) -> None:
    """Nothing is used that torch knows to have no deterministic form, and two runs are bitwise one."""
    torch.use_deterministic_algorithms(True)  # an error, not a warning
    torch.manual_seed(0)
    module = fusedreg.LSTM(3, 4, 2, bidirectional=True, norm=norm, zoneout_cell=0.2, dropout=0.2, backend=backend)
    input, lengths = torch.randn(5, 3, 3), torch.tensor([5, 3, 4])
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        own = copy.deepcopy(module)  # running statistics are read where one row is left
        output, _ = own(input, lengths=lengths)
        runs.append([output, *torch.autograd.grad(output.sum(), list(own.parameters()))])
    assert all(map(torch.equal, *runs))
