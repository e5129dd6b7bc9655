"""The operators as torch sees them: schemas, fakes, opcheck, and every order and kind of differentiation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import REGULARIZERS, compiled
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization, ops, reference
from fusedreg.encoding import DIFFERENTIABLE, NUMBER_OF_TENSORS, TENSOR_ARGUMENTS, decode_options, encode_options
from fusedreg.layer import REVERSE, LayerOptions, LayerParameters
from fusedreg.testing import LayerCase, make_arguments

SAVES = {"nothing": ops.SAVE_NOTHING, "gates": ops.SAVE_GATES, "recompute": ops.SAVE_RECOMPUTE}
NAMED = ["none", "everything", "everything_untied", "zoneout_candidate", "everything_batch_norm", "layer_norm"]
SMALL = {"steps": 4, "rows": 3, "input_size": 2, "hidden_size": 3}


def make_case(name: str, **changes: Any) -> LayerCase:
    return LayerCase(name, regularization=REGULARIZERS[name], **{**SMALL, **changes})


def operator_arguments(case: LayerCase, save: int, requires_grad: bool = False) -> list[Any]:
    """The arguments of the forward operator for a case."""
    arguments = make_arguments(case, seed=1)
    tensors: list[Any] = list(arguments.tensors())
    for position in DIFFERENTIABLE if requires_grad else ():
        if tensors[position] is not None:
            tensors[position] = tensors[position].clone().requires_grad_()
    return [*tensors, *encode_options(case.options, save)]


def backward_arguments(case: LayerCase, save: int) -> list[Any]:
    """The arguments of the backward operator, with what the forward saved."""
    forward = operator_arguments(case, save)
    results = torch.ops.fusedreg.lstm_layer_forward.default(*forward)
    hidden = results[4] if results[4].dim() == 3 else results[0]
    grads = make_arguments(case, seed=1).gradients
    cells = grads["cells"] if case.return_cells else None
    needed = [forward[position] is not None for position in DIFFERENTIABLE]
    incoming = [grads["output"], grads["final_hidden"], grads["final_cell"], cells]
    tensors, encoded = forward[:NUMBER_OF_TENSORS], forward[NUMBER_OF_TENSORS:]
    return [*incoming, *tensors, results[3], hidden, *results[5:], *encoded, needed]


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("training", [True, False])
def test_options_survive_their_encoding(name: str, save: int, training: bool) -> None:
    options = REGULARIZERS[name].layer_options(1, 3, REVERSE, training, save == ops.SAVE_RECOMPUTE, True)
    rates, flags, eps = encode_options(options, save)
    decoded, decoded_save = decode_options(rates, flags, eps)
    assert decoded_save == save
    assert encode_options(decoded, save) == (rates, flags, eps)
    assert dataclasses.replace(decoded, norm=None) == dataclasses.replace(options, norm=None)


def test_encoding_is_the_order_of_the_structs() -> None:
    """Written out once, as csrc/common/params.h has it."""
    options = LayerOptions(
        layer=2,
        direction=REVERSE,
        dropout=0.1,
        zoneout_cell=0.9,
        update_mask="sequence",
        zoneout_output="candidate",
        norm=BatchNorm(max_steps=3, recurrent=False, input_statistics="sequence", eps=0.25),
    )
    rates, flags, eps = encode_options(options, ops.SAVE_RECOMPUTE)
    assert rates == [0.1, 0, 0, 0, 0, 0, 0, 0, 0.9]
    assert flags == [2, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 2, 1]
    assert eps == 0.25


@compiled
@pytest.mark.parametrize("operator", ["lstm_layer_forward", "lstm_layer_backward"])
def test_schema_has_the_order_of_the_encoding(operator: str) -> None:
    names = [argument.name for argument in getattr(torch.ops.fusedreg, operator).default._schema.arguments]
    first = 0 if operator == "lstm_layer_forward" else 4
    assert tuple(names[first : first + NUMBER_OF_TENSORS]) == TENSOR_ARGUMENTS
    results = [result.name for result in torch.ops.fusedreg.lstm_layer_backward.default._schema.returns]
    assert results == ["grad_" + TENSOR_ARGUMENTS[position] for position in DIFFERENTIABLE]


def _description(tensors: Any) -> list[Any]:
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]


@compiled
@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fakes_are_like_the_kernels(name: str, save: int, training: bool, dtype: torch.dtype) -> None:
    """Shapes, strides and types, forward and backward."""
    extras = {"proj_size": 2, "probes": True} if training else {}
    case = make_case(name, training=training, dtype=dtype, return_cells=training, **extras)
    arguments = operator_arguments(case, save)
    calls = [(torch.ops.fusedreg.lstm_layer_forward.default, arguments)]
    if save != ops.SAVE_NOTHING:
        backward = backward_arguments(case, save)
        calls.append((torch.ops.fusedreg.lstm_layer_backward.default, backward))
        backward = [*backward[:-1], [position % 2 == 0 for position in range(16)]]
        calls.append((torch.ops.fusedreg.lstm_layer_backward.default, backward))
    for operator, real in calls:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in real]
            described = [(shape, stride, dtype) for shape, stride, dtype, _ in _description(operator(*fakes))]
        assert described == [(shape, stride, dtype) for shape, stride, dtype, _ in _description(operator(*real))]


@compiled
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("shape", ["plain", "ragged and projected"])
def test_opcheck_forward(name: str, save: int, shape: str) -> None:
    case = make_case(name)
    if shape != "plain":
        case = dataclasses.replace(case, ragged=True, resets=True, proj_size=2, probes=True)
    arguments = operator_arguments(case, save, requires_grad=save != ops.SAVE_NOTHING)
    opcheck(torch.ops.fusedreg.lstm_layer_forward.default, arguments)


@compiled
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("save", [ops.SAVE_GATES, ops.SAVE_RECOMPUTE], ids=["gates", "recompute"])
def test_opcheck_backward(name: str, save: int) -> None:
    case = make_case(name, proj_size=2, probes=True) if save == ops.SAVE_RECOMPUTE else make_case(name)
    opcheck(torch.ops.fusedreg.lstm_layer_backward.default, backward_arguments(case, save))


@compiled
def test_gradient_of_an_operator_that_saved_nothing_names_the_remedy() -> None:
    results = torch.ops.fusedreg.lstm_layer_forward.default(
        *operator_arguments(make_case("none"), ops.SAVE_NOTHING, requires_grad=True)
    )
    with pytest.raises(RuntimeError, match=r"options.*save = 0.*SAVE_GATES"):
        results[0].sum().backward()


def run(function: Any, case: LayerCase, tensors: list[Tensor], arguments: Any) -> tuple[Tensor, ...]:
    """A layer as a function of its differentiable tensors alone: input, states, parameters."""
    given = iter(tensors[3:])
    parameters = LayerParameters(*(None if value is None else next(given) for value in arguments.parameters))  # type: ignore[arg-type]
    result = function(
        *tensors[:3],
        parameters,
        case.options,
        lengths=arguments.lengths,
        reset=arguments.reset,
        seed=arguments.seed,
        running=arguments.running,
        probes=None if arguments.probes is None else tuple(given),
    )
    return tuple(value for value in result[:4] if value is not None)


def prepare(case: LayerCase) -> tuple[list[Tensor], Any]:
    arguments = make_arguments(case, seed=2)
    leaves = [arguments.input, arguments.initial_hidden, arguments.initial_cell, *arguments.parameters]
    leaves += arguments.probes or ()
    return [leaf.clone().requires_grad_() for leaf in leaves if leaf is not None], arguments


def objective(results: tuple[Tensor, ...]) -> Tensor:
    """A scalar in which every result counts, none of them linearly."""
    return torch.stack([(factor + value).pow(3).sum() for factor, value in enumerate(results)]).sum()


@compiled
@pytest.mark.parametrize("name", ["none", *[name for name in NAMED if name != "none"], "batch_norm_sequence"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", ["plain", "ragged and projected"])
def test_double_backward_is_the_references(name: str, training: bool, shape: str) -> None:
    """First and second derivatives, in training and evaluation; with lengths, resets, a projection and probes."""
    case = make_case(name, dtype=torch.float64, training=training)
    if shape != "plain":
        case = dataclasses.replace(case, ragged=True, resets=True, direction=REVERSE, proj_size=2, probes=True)
    tensors, arguments = prepare(case)

    def derivatives(function: Any) -> list[Tensor]:
        first = torch.autograd.grad(objective(run(function, case, tensors, arguments)), tensors, create_graph=True)
        penalty = torch.stack([(gradient + 0.5).pow(2).sum() for gradient in first]).sum()
        second = torch.autograd.grad(penalty, tensors)
        return [*first, *second]

    for ours, expected in zip(derivatives(ops.lstm_layer), derivatives(reference.lstm_layer), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@compiled
@pytest.mark.parametrize("name", ["none", "everything"])
def test_gradgradcheck(name: str) -> None:
    case = make_case(name, dtype=torch.float64, steps=3, rows=2, input_size=2, hidden_size=2)
    tensors, arguments = prepare(case)
    function = lambda *leaves: run(ops.lstm_layer, case, list(leaves), arguments)  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@compiled
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("recompute", [False, True])
def test_two_backwards_over_one_graph(name: str, recompute: bool) -> None:
    """Saved tensors are neither overwritten nor handed out as gradients."""
    case = make_case(name, recompute=recompute)
    tensors, arguments = prepare(case)
    loss = objective(run(ops.lstm_layer, case, tensors, arguments))
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(float("nan"))
    for again, expected in zip(torch.autograd.grad(loss, tensors), kept, strict=True):
        assert torch.equal(again, expected)


@compiled
@pytest.mark.parametrize("name", NAMED)
def test_the_same_numbers_without_gradients(name: str) -> None:
    case = make_case(name)
    tensors, arguments = prepare(case)
    tracked = run(ops.lstm_layer, case, tensors, arguments)
    with torch.no_grad():
        untracked = run(ops.lstm_layer, case, tensors, arguments)
    with torch.inference_mode():
        inferred = run(ops.lstm_layer, case, tensors, arguments)
    for first, second, third in zip(tracked, untracked, inferred, strict=True):
        assert (first.requires_grad, second.requires_grad) == (True, False)
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@compiled
def test_only_what_is_asked_for_is_differentiated() -> None:
    case = make_case("everything", dtype=torch.float64)
    tensors, arguments = prepare(case)
    everything = torch.autograd.grad(objective(run(ops.lstm_layer, case, tensors, arguments)), tensors)
    for chosen in range(len(tensors)):
        some = [tensor.detach().requires_grad_(position == chosen) for position, tensor in enumerate(tensors)]
        loss = objective(run(ops.lstm_layer, case, some, arguments))
        (gradient,) = torch.autograd.grad(loss, [some[chosen]])
        torch.testing.assert_close(gradient, everything[chosen])


@compiled
@pytest.mark.parametrize("used", range(4), ids=["output", "final_hidden", "final_cell", "cells"])
def test_gradient_of_one_result_alone(used: int) -> None:
    case = make_case("everything", dtype=torch.float64)
    tensors, arguments = prepare(case)
    ours = torch.autograd.grad(objective(run(ops.lstm_layer, case, tensors, arguments)[used : used + 1]), tensors)
    expected = torch.autograd.grad(
        objective(run(reference.lstm_layer, case, tensors, arguments)[used : used + 1]), tensors
    )
    for gradient, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, right)


MODULES = {
    "plain": Regularization(),
    "regularised": Regularization(zoneout_cell=0.4, hidden_dropout=0.3, dropout=0.2, weight_dropout=0.3),
    "layer_norm": Regularization(norm=LayerNorm()),
}


def make_module(name: str) -> fusedreg.LSTM:
    torch.manual_seed(3)
    return fusedreg.LSTM(2, 3, num_layers=2, regularization=MODULES[name], dtype=torch.float64, backend="cpu")


def loss_of(module: fusedreg.LSTM, input: Tensor) -> Tensor:
    output, (hidden, cell) = module(input, seed=7)
    return output.pow(2).sum() + hidden.pow(3).sum() + cell.pow(2).sum()


@compiled
@pytest.mark.parametrize("name", MODULES)
def test_torch_func(name: str) -> None:
    """grad, grad of grad, vmap, both orders of grad and vmap, and a Hessian, each against a plain loop."""
    module = make_module(name)
    inputs = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    function = lambda x: loss_of(module, x)  # noqa: E731
    gradient = torch.func.grad(function)
    expected = []
    for input in inputs:
        leaf = input.clone().requires_grad_()
        expected.append(torch.autograd.grad(function(leaf), leaf)[0])
    torch.testing.assert_close(gradient(inputs[0]), expected[0])
    torch.testing.assert_close(torch.vmap(function)(inputs), torch.stack([function(x).detach() for x in inputs]))
    torch.testing.assert_close(torch.vmap(gradient)(inputs), torch.stack(expected))
    over_vmap = torch.func.grad(lambda xs: torch.vmap(function)(xs).sum())(inputs)
    torch.testing.assert_close(over_vmap, torch.stack(expected))

    leaf = inputs[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: gradient(x).pow(2).sum())(inputs[0]), second)
    hessian = torch.func.jacrev(gradient)(inputs[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(function, inputs[0]))


@compiled
def test_per_sample_gradients() -> None:
    module = make_module("regularised")
    inputs = torch.randn(3, 4, 2, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], input: Tensor) -> Tensor:
        output = torch.func.functional_call(module, parameters, (input.unsqueeze(1),), {"seed": 5})[0]
        return output.pow(2).sum()

    parameters = {name: value.detach() for name, value in module.named_parameters()}
    batched = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    for sample, input in enumerate(inputs):
        for name, gradient in torch.func.grad(loss)(parameters, input).items():
            torch.testing.assert_close(batched[name][sample], gradient)


@compiled
@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_vmap_honours_randomness(randomness: str) -> None:
    module = make_module("regularised")
    inputs = torch.ones(3, 4, 2, 2, dtype=torch.float64)
    call = torch.vmap(lambda x: module(x)[0], randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            call(inputs)
        return
    outputs = call(inputs)
    assert torch.equal(outputs[0], outputs[1]) == (randomness == "same")


@compiled
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_refused(grad_mode: bool) -> None:
    """Never silently without tangents; the reference has them."""
    module = make_module("plain")
    input = torch.randn(4, 2, 2, dtype=torch.float64)
    tangent = torch.randn_like(input)
    with torch.set_grad_enabled(grad_mode):
        with pytest.raises(NotImplementedError, match=r"jacrev.*backend='reference'"), forward_ad.dual_level():
            module(forward_ad.make_dual(input, tangent))
        with forward_ad.dual_level():
            module(input)  # nothing to differentiate
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.jvp(lambda x: module(x)[0], (input,), (tangent,))
    module.backend = "reference"
    _, derivative = torch.func.jvp(lambda x: module(x)[0], (input,), (tangent,))
    _, pullback = torch.func.vjp(lambda x: module(x)[0], input)
    cotangent = torch.randn_like(derivative)
    torch.testing.assert_close((derivative * cotangent).sum(), (pullback(cotangent)[0] * tangent).sum())


@compiled
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_masks(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    module = make_module("regularised")
    input = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(11)
    expected = torch.autograd.grad(module(input)[0].pow(2).sum(), input)[0]
    torch.manual_seed(11)
    output = checkpoint(lambda x: module(x)[0], input, use_reentrant=reentrant)
    output.pow(2).sum().backward()
    assert torch.equal(input.grad, expected)  # type: ignore[arg-type]
