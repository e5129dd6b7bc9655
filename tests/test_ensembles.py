"""``torch.vmap`` where samples have weights, statistics or weight masks of their own: one call, equal to a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import REGULARIZERS, compiled
from test_batching import close, expect_calls, loop, loss_of, make, normal, parameters_of
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vjp, vmap

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization

pytestmark = compiled

MODELS = 3
SEEDS = torch.tensor([4, -9, 2**40])
BATCH_NORM = Regularization(norm=BatchNorm(max_steps=4), zoneout_cell=0.3)


def different(count: int, kind: str | Regularization, **options: Any) -> list[fusedreg.LSTM]:
    """Modules of weights of their own."""
    modules = [make(kind, **options) for _ in range(count)]
    with torch.no_grad():
        for place, module in enumerate(modules):
            for parameter in module.parameters():
                parameter.mul_(1 - 0.1 * place)
    return modules


def detached(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def stacked(modules: list[fusedreg.LSTM]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters, buffers = stack_module_state(modules)  # type: ignore[arg-type]
    return detached(parameters), buffers


def chosen(values: dict[str, Tensor], place: int) -> dict[str, Tensor]:
    return {name: value[place] for name, value in values.items()}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_loop_bit_for_bit(name: str) -> None:
    """Results, gradients and running statistics of models with seeds and lengths of their own."""
    modules = different(MODELS, name)
    parameters, buffers = stacked(modules)
    inputs, lengths = normal(MODELS, 5, 3, 2), torch.tensor([[5, 3, 5], [4, 4, 2], [1, 5, 5]])

    def results(own: dict[str, Tensor], kept: dict[str, Tensor], x: Tensor, lengths: Tensor, seed: Tensor) -> Any:
        def run(own: dict[str, Tensor], x: Tensor) -> Any:
            updated = {key: value.clone() for key, value in kept.items()}
            call = {"seed": seed, "lengths": lengths}
            output, (hidden, cell) = functional_call(modules[0], (own, updated), (x,), call)
            return (output, hidden, cell), updated

        values, pull, updated = vjp(run, own, x, has_aux=True)
        return values, pull(tuple(map(torch.ones_like, values))), updated

    arguments = parameters, buffers, inputs, lengths, SEEDS
    with expect_calls("forward", "backward"):
        values, gradients, updated = vmap(results)(*arguments)
    for place in range(MODELS):
        own = results(chosen(parameters, place), chosen(buffers, place), inputs[place], lengths[place], SEEDS[place])
        assert all(torch.equal(ours[place], right) for ours, right in zip(values, own[0], strict=True))
        assert all(torch.equal(ours[place], right) for ours, right in zip(gradients[0].values(), own[1][0].values()))  # noqa: B905
        assert torch.equal(gradients[1][place], own[1][1])
        close(chosen(updated, place), own[2])


@pytest.mark.parametrize("kind", ["none", "everything", "everything_layer_norm"])
def test_an_input_and_states_in_common(kind: str) -> None:
    """Every model sees the same data: it is expanded, and its gradient is summed over the models."""
    modules = different(MODELS, kind)
    parameters, _ = stacked(modules)
    x, state = normal(5, 2, 2), (normal(1, 2, 4, seed=1), normal(1, 2, 4, seed=2))

    def total(x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        return vmap(lambda own: loss_of(modules[0], own, x, state, seed=7))(parameters).sum()

    def looped(x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        losses = [loss_of(modules[0], chosen(parameters, place), x, state, seed=7) for place in range(MODELS)]
        return torch.stack(losses).sum()

    with expect_calls("forward", "backward"):
        ours = grad(total, argnums=(0, 1))(x, state)
    close(ours, grad(looped, argnums=(0, 1))(x, state))
    leaf = x.clone().requires_grad_()  # autograd outside of vmap, as a training step has it
    with expect_calls("forward", "backward"):
        total(leaf, state).backward()
    close(leaf.grad, ours[0])


def test_layers_and_directions() -> None:
    modules = different(MODELS, "zoneout_cell", num_layers=2, bidirectional=True)
    parameters, _ = stacked(modules)
    inputs = normal(MODELS, 4, 2, 2)
    gradient = grad(lambda own, x: functional_call(modules[0], own, (x,), {"seed": 7})[0].square().sum())
    with expect_calls(*["forward"] * 4, *["backward"] * 4):
        ours = vmap(gradient)(parameters, inputs)
    for place, module in enumerate(modules):
        close(chosen(ours, place), gradient(parameters_of(module), inputs[place]))


# ---- vmap inside vmap --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["models", "samples"])
@pytest.mark.parametrize("kind", ["everything", "everything_untied", "everything_layer_norm"])
def test_per_sample_gradients_within_an_ensemble(kind: str, outer: str) -> None:
    """Samples are folded into the rows of each model, whichever vmap is outside; seeds are the models'."""
    modules = different(MODELS, kind)
    parameters, _ = stacked(modules)
    inputs = normal(2, 4, 3, 2)
    gradient = grad(lambda own, x, seed: loss_of(modules[0], own, x, seed=seed), argnums=(0, 1))
    of_samples, of_models = (None, 0, None), (0, None, 0)
    inner, outside = (of_samples, of_models) if outer == "models" else (of_models, of_samples)
    with expect_calls("forward", "backward"):
        ours = vmap(vmap(gradient, in_dims=inner), in_dims=outside)(parameters, inputs, SEEDS)
    for model in range(MODELS):
        for sample in range(2):
            right = gradient(chosen(parameters, model), inputs[sample], SEEDS[model])
            at = (model, sample) if outer == "models" else (sample, model)
            close(torch.utils._pytree.tree_map(lambda value, at=at: value[at], ours), right)


def test_samples_with_seeds_within_an_ensemble() -> None:
    """Samples with seeds of their own, folded before the models, after them, and on both sides."""
    modules = different(MODELS, Regularization(zoneout_cell=0.4, hidden_dropout=0.3, norm=LayerNorm()))
    parameters, _ = stacked(modules)
    inputs, seeds = normal(2, 2, 3, 2, 2), torch.tensor([[5, 6], [7, -8]])
    gradient = grad(lambda own, x, seed: loss_of(modules[0], own, x, seed=seed))
    inside = vmap(gradient, in_dims=(None, 0, 0))
    with expect_calls("forward", "backward"):
        ours = vmap(vmap(inside, in_dims=(0, None, None)), in_dims=(None, 0, 0))(parameters, inputs, seeds)
    for first in range(2):
        for model in range(MODELS):
            for second in range(2):
                right = gradient(chosen(parameters, model), inputs[first, second], seeds[first, second])
                close({name: value[first, model, second] for name, value in ours.items()}, right)


def test_models_of_models() -> None:
    """Two axes of weights, with data along one of them: one call with all combinations."""
    modules = different(2 * MODELS, "everything_layer_norm")
    parameters, _ = stacked(modules)
    parameters = {name: value.unflatten(0, (2, MODELS)) for name, value in parameters.items()}
    inputs = normal(MODELS, 4, 2, 2)
    gradient = grad(lambda own, x: loss_of(modules[0], own, x, seed=7), argnums=(0, 1))
    with expect_calls("forward", "backward"):
        ours = vmap(vmap(gradient), in_dims=(0, None))(parameters, inputs)
    for place, module in enumerate(modules):
        at = divmod(place, MODELS)
        right = gradient(parameters_of(module), inputs[at[1]])
        close(torch.utils._pytree.tree_map(lambda value, at=at: value[at], ours), right)


# ---- Batch norm in training --------------------------------------------------------------------------------------


def of_batch_norm(module: fusedreg.LSTM) -> Callable[..., Tensor]:
    """A loss of a module's parameters and an input, which reads the buffers and updates none."""
    buffers = dict(module.named_buffers())

    def loss(own: dict[str, Tensor], x: Tensor, seed: Tensor | int = 7) -> Tensor:
        result = fusedreg.functional.lstm(
            x, None, own, training=True, regularization=module.regularization, seed=seed, buffers=buffers
        )
        return result.output.square().sum() + (result.state[1] + 1).pow(3).sum()

    return loss


def test_per_sample_gradients_of_a_batch_norm() -> None:
    """A sample is a batch of its own: its statistics, and the gradients through them."""
    (module,) = different(1, BATCH_NORM)
    inputs, gradient = normal(MODELS, 4, 3, 2), grad(of_batch_norm(module), argnums=(0, 1))
    parameters = parameters_of(module)
    with expect_calls("forward", "backward"):
        ours = vmap(gradient, in_dims=(None, 0), randomness="same")(parameters, inputs)
    close(ours, loop(gradient, (None, 0), parameters, inputs))


def test_per_sample_gradients_of_a_batch_norm_within_an_ensemble() -> None:
    modules = different(2, BATCH_NORM)
    parameters, _ = stacked(modules)
    inputs, gradient = normal(MODELS, 4, 3, 2), grad(of_batch_norm(modules[0]))
    with expect_calls("forward", "backward"):
        ours = vmap(vmap(gradient, in_dims=(None, 0)), in_dims=(0, None))(parameters, inputs)
    for model in range(2):
        for sample in range(MODELS):
            right = gradient(chosen(parameters, model), inputs[sample])
            close({name: value[model, sample] for name, value in ours.items()}, right)


def test_jacobians_of_a_batch_norm() -> None:
    """Only the incoming gradients are batched: what was saved is expanded."""
    (module,) = different(1, BATCH_NORM)
    parameters, x = parameters_of(module), normal(3, 3, 2)

    def function(x: Tensor) -> Tensor:
        buffers = dict(module.named_buffers())
        return fusedreg.functional.lstm(
            x, None, parameters, training=True, regularization=BATCH_NORM, seed=7, buffers=buffers
        ).output

    with expect_calls("forward", "backward"):
        ours = torch.func.jacrev(function)(x)
    close(ours, torch.autograd.functional.jacobian(function, x))


# ---- Masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_weight_dropout_draws_as_a_loop_does(randomness: Any) -> None:
    """Each sample has weights of its own under "different": masked by its own seed, drawn in turn."""
    module = make(Regularization(weight_dropout=0.5, zoneout_hidden=0.3))
    inputs = normal(MODELS, 4, 2, 2)
    torch.manual_seed(11)
    with expect_calls("forward"):
        ours = vmap(lambda x: module(x)[0], randomness=randomness)(inputs)
    torch.manual_seed(11)
    seeds = [fusedreg.seeds.draw_seed("cpu") for _ in range(MODELS if randomness == "different" else 1)]
    close(ours, torch.stack([module(x, seed=seeds[place % len(seeds)])[0] for place, x in enumerate(inputs)]))


# ---- Derivatives, compilation, edges -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["everything", BATCH_NORM], ids=["everything", "batch_norm"])
def test_second_derivatives(kind: Any) -> None:
    """A gradient penalty of each model, by the reference over all of them."""
    modules = different(2, kind)
    parameters, _ = stacked(modules)
    inputs = normal(2, 2, 2, 2)
    loss = of_batch_norm(modules[0]) if kind is BATCH_NORM else lambda own, x: loss_of(modules[0], own, x, seed=7)

    def penalty(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.stack([value.square().sum() for value in grad(loss)(own, x).values()]).sum()

    ours = vmap(grad(penalty, argnums=(0, 1)))(parameters, inputs)
    for place in range(2):
        right = grad(penalty, argnums=(0, 1))(chosen(parameters, place), inputs[place])
        close(torch.utils._pytree.tree_map(lambda value, place=place: value[place], ours), right)


def test_second_derivatives_of_samples_within_models() -> None:
    modules = different(2, Regularization(zoneout_cell=0.4, weight_dropout=0.2))
    parameters, _ = stacked(modules)
    inputs = normal(2, 2, 2, 2)
    gradient = grad(lambda own, x: loss_of(modules[0], own, x, seed=7))

    def norms(own: dict[str, Tensor]) -> Tensor:
        each = vmap(gradient, in_dims=(None, 0))(own, inputs)
        return torch.stack([value.flatten(1).norm(dim=1).sum() for value in each.values()]).sum()

    ours = vmap(grad(norms))(parameters)
    for place in range(2):
        expected = grad(lambda own: sum(v.norm() for x in inputs for v in gradient(own, x).values()))
        close(chosen(ours, place), expected(chosen(parameters, place)))


def test_the_reference_goes_through_vmap() -> None:
    for kind in ("everything", "everything_layer_norm"):
        modules = different(2, kind)
        parameters, _ = stacked(modules)
        inputs = normal(2, 3, 2, 2)
        found = []
        for backend in ("cpu", "reference"):
            modules[0].backend = backend
            found.append(vmap(grad(lambda own, x: loss_of(modules[0], own, x, seed=7)))(parameters, inputs))  # noqa: B023
        close(*found)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    """Gradients of each model, in one graph for two lengths of the sequence."""
    modules = different(MODELS, Regularization(zoneout_cell=0.4, weight_dropout=0.3))
    parameters, _ = stacked(modules)

    def function(parameters: dict[str, Tensor], inputs: Tensor) -> Any:
        loss = grad(lambda own, x: functional_call(modules[0], own, (x,), {"seed": 7})[0].square().sum())
        return vmap(loss)(parameters, inputs)

    whole = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for steps in (4, 6):
        inputs = normal(MODELS, steps, 2, 2)
        close(whole(parameters, inputs), function(parameters, inputs))


def test_no_samples_and_no_rows() -> None:
    modules = different(MODELS, "everything")
    parameters, _ = stacked(modules)
    output = lambda own, x: functional_call(modules[0], own, (x,), {"seed": 7})[0]  # noqa: E731
    assert vmap(output)(parameters, normal(MODELS, 4, 0, 2)).shape == (MODELS, 4, 0, 4)
    none = {name: value[:0] for name, value in parameters.items()}
    assert vmap(output)(none, normal(0, 4, 2, 2)).shape == (0, 4, 2, 4)
    folded = vmap(output, in_dims=(None, 0))(parameters_of(modules[0]), normal(0, 4, 2, 2))
    assert folded.shape == (0, 4, 2, 4)
    both = vmap(vmap(output, in_dims=(0, None)), in_dims=(None, 0))(parameters, normal(0, 4, 2, 2))
    assert both.shape == (0, MODELS, 4, 2, 4)
