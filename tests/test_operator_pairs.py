"""Operators of another name under the layer's schemas: as complete as the compiled pair.

The second pair here is defined in Python, as a backend with kernels of its own does it, over the CPU kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import compiled
from test_ops import SAVES, backward_arguments, make_case, objective, operator_arguments, prepare, run
from torch import Tensor
from torch.library import opcheck

from fusedreg import ops, reference
from fusedreg.layer import LayerOptions, LayerParameters
from fusedreg.schemas import backward_schema, define_operators, forward_schema

pytestmark = compiled

NAME = "fusedreg_second::lstm_layer"
LAYER = functools.partial(ops.lstm_layer, operators=NAME)


@pytest.fixture(autouse=True, scope="module")
def second_pair() -> None:
    if not hasattr(torch.ops.fusedreg_second, "lstm_layer_forward"):
        define_operators(
            NAME,
            lambda *arguments: torch.ops.fusedreg.lstm_layer_forward.default(*arguments),
            lambda *arguments: torch.ops.fusedreg.lstm_layer_backward.default(*arguments),
            ["CPU"],
        )
    ops.register_operators(NAME)
    ops.register_operators(NAME)  # the second time does nothing


@pytest.mark.parametrize(
    ("operator", "schema"), [("lstm_layer_forward", forward_schema), ("lstm_layer_backward", backward_schema)]
)
def test_the_schemas_of_all_pairs_are_one(operator: str, schema: Callable[[str], str]) -> None:
    in_cpp = str(getattr(torch.ops.fusedreg, operator).default._schema)
    second = str(getattr(torch.ops.fusedreg_second, operator).default._schema)
    assert second == in_cpp.replace("fusedreg::", "fusedreg_second::")
    assert in_cpp == "fusedreg::" + schema(operator)


def test_each_pair_has_functions_of_its_own() -> None:
    compiled_pair, second = ops._pairs[ops.COMPILED], ops._pairs[NAME]
    assert compiled_pair.layer is not second.layer
    case = make_case("everything", dtype=torch.float64)
    tensors, arguments = prepare(case)
    graph = run(LAYER, case, tensors, arguments)[0].grad_fn
    assert isinstance(graph, second.layer._backward_cls)  # type: ignore[attr-defined]
    seen = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listen():
        torch.autograd.grad(objective(run(LAYER, case, tensors, arguments)), tensors)
    seen = [name for name in seen if "lstm_layer" in name]
    assert seen == ["fusedreg_second.lstm_layer_forward.default", "fusedreg_second.lstm_layer_backward.default"]


@pytest.mark.parametrize("name", ["everything", "everything_batch_norm"])
def test_opcheck(name: str) -> None:
    case = make_case(name)
    opcheck(
        torch.ops.fusedreg_second.lstm_layer_forward.default,
        operator_arguments(case, SAVES["gates"], requires_grad=True),
    )
    opcheck(torch.ops.fusedreg_second.lstm_layer_backward.default, backward_arguments(case, SAVES["gates"]))


def test_second_derivatives() -> None:
    case = make_case("everything", dtype=torch.float64)
    tensors, arguments = prepare(case)

    def second(layer: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(objective(run(layer, case, tensors, arguments)), tensors, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors)

    for ours, right in zip(second(LAYER), second(reference.lstm_layer), strict=True):
        torch.testing.assert_close(ours, right)


def test_a_gradient_that_was_not_saved_for_names_the_pair() -> None:
    arguments = operator_arguments(make_case("none"), ops.SAVE_NOTHING, requires_grad=True)
    results = torch.ops.fusedreg_second.lstm_layer_forward.default(*arguments)
    with pytest.raises(RuntimeError, match=r"fusedreg_second::lstm_layer_forward: expected options"):
        results[0].sum().backward()


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["forward", "grad", "vmap", "vmap_of_grad", "grad_of_grad"])
def test_compiled(name: str) -> None:
    parameters = LayerParameters(torch.randn(16, 3), torch.randn(16, 4), torch.randn(16), torch.randn(16))
    options, seed = LayerOptions(zoneout_cell=0.4), torch.tensor(3)
    forward = lambda x: LAYER(x, None, None, parameters, options, seed=seed).output  # noqa: E731
    loss = lambda x: forward(x).square().sum()  # noqa: E731
    grad, row = torch.func.grad, lambda x: loss(x.unsqueeze(1))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "forward": forward,
        "grad": grad(loss),
        "vmap": torch.vmap(row, in_dims=1),
        "vmap_of_grad": torch.vmap(grad(row), in_dims=1),
        "grad_of_grad": grad(lambda x: grad(loss)(x).square().sum()),
    }
    input = torch.randn(5, 3, 3)
    whole = torch.compile(lambda x: functions[name](x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(input), functions[name](input))
