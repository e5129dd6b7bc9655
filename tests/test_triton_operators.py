"""Triton's pair of operators as torch sees it: its schemas, compilation, transforms, second derivatives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton_support  # noqa: F401  (first: it switches Triton's interpreter on)
from helpers import compiled
from test_ops import SAVES, backward_arguments, make_case, operator_arguments
from torch import Tensor
from torch.library import opcheck

import fusedreg
from fusedreg.backends import OPERATORS, availability

pytestmark = [
    compiled,
    pytest.mark.skipif(not availability("triton"), reason=f"not run: {availability('triton').reason}"),
]


def modules() -> tuple[fusedreg.LSTM, fusedreg.LSTM]:
    torch.manual_seed(0)
    ours = fusedreg.LSTM(3, 8, zoneout_cell=0.3, hidden_dropout=0.2, backend="triton")
    right = fusedreg.LSTM(3, 8, zoneout_cell=0.3, hidden_dropout=0.2, backend="cpu")
    right.load_state_dict(ours.state_dict())
    return ours, right


@pytest.mark.parametrize("end", ["forward", "backward"])
def test_the_schema_is_the_compiled_pairs(end: str) -> None:
    names = [OPERATORS[backend].partition("::")[2] for backend in ("triton", "cpu")]
    ours, right = (str(getattr(torch.ops.fusedreg, f"{name}_{end}").default._schema) for name in names)
    assert ours.replace(names[0], names[1]) == right


def test_opcheck() -> None:
    case = make_case("everything")
    operators = torch.ops.fusedreg
    arguments = operator_arguments(case, SAVES["gates"], requires_grad=True)
    opcheck(operators.triton_lstm_layer_forward.default, arguments)
    opcheck(operators.triton_lstm_layer_backward.default, backward_arguments(case, SAVES["gates"]))


def test_transforms_and_second_derivatives() -> None:
    ours, right = modules()
    xs = torch.randn(2, 3, 2, 3)

    def loss(module: fusedreg.LSTM, x: Tensor) -> Tensor:
        return module(x, seed=3)[0].square().sum()

    def second(module: fusedreg.LSTM) -> Tensor:
        leaf = xs[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(module, leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    gradients = [torch.vmap(torch.func.grad(lambda x, module=module: loss(module, x)))(xs) for module in (ours, right)]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(second(ours), second(right))


FIRST_CALL = """
import torch, fusedreg
module = fusedreg.LSTM(3, 8, zoneout_cell=0.3, backend="triton")
right = fusedreg.LSTM(3, 8, zoneout_cell=0.3, backend="cpu")
right.load_state_dict(module.state_dict())
x = torch.randn(3, 2, 3)
output = torch.compile(lambda x: module(x, seed=3)[0], backend="aot_eager", fullgraph=True)(x)
expected = right(x, seed=3)[0]
torch.testing.assert_close(output, expected)
found = torch.autograd.grad(output.square().sum(), list(module.parameters()))
torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), list(right.parameters())))
"""


@pytest.mark.compile
def test_the_very_first_call_may_be_compiled() -> None:
    """In a process of its own, where nothing has loaded Triton yet: it is found while the graph is traced."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, check=True, timeout=300)
