"""``torch.vmap`` over a layer: equal to a loop over the samples, and one operator call where samples can be folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import REGULARIZERS, compiled
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization

pytestmark = compiled

SAMPLES = 3
KINDS = ["none", "everything", "everything_untied", "zoneout_candidate", "layer_norm", "everything_layer_norm"]


class Count(TorchDispatchMode):
    """How many times each of the operators runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith("fusedreg::lstm_layer"):
            self.calls.append(name.removeprefix("fusedreg::lstm_layer_"))
        return function(*args, **(kwargs or {}))


@contextmanager
def expect_calls(*expected: str) -> Iterator[None]:
    with Count() as count:
        yield
    assert count.calls == list(expected)


def make(kind: str | Regularization, **options: Any) -> fusedreg.LSTM:
    torch.manual_seed(3)
    regularization = REGULARIZERS[kind] if isinstance(kind, str) else kind
    if regularization.dropout:
        regularization = Regularization(**{**regularization.changed(), "dropout": 0.0})  # type: ignore[arg-type]
    module = fusedreg.LSTM(2, 4, regularization=regularization, dtype=torch.float64, backend="cpu", **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.7, 0.7)
    return module


def parameters_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


def loss_of(module: fusedreg.LSTM, parameters: dict[str, Tensor], *arguments: Any, **keywords: Any) -> Tensor:
    result = torch.func.functional_call(module, parameters, arguments, {**keywords, "return_cell_states": True})
    output, (hidden, cell), cells = result
    total: Tensor = output.square().sum() + (hidden + 1).pow(3).sum() + cell.square().sum() + (cells - 1).square().sum()
    return total


def loop(function: Callable[..., Any], in_dims: Any, *arguments: Any) -> Any:
    """What ``torch.vmap(function, in_dims)`` is to give, by one call a sample."""
    samples = []
    for sample in range(SAMPLES):
        chosen = [
            value if dim is None else value.select(dim, sample) for value, dim in zip(arguments, in_dims, strict=True)
        ]
        samples.append(function(*chosen))
    return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *samples)


def close(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_in_one_call(kind: str, recompute: bool) -> None:
    module = make(kind, recompute=recompute)
    inputs, parameters = normal(SAMPLES, 5, 2, 2), parameters_of(module)
    gradient = torch.func.grad(lambda own, x: loss_of(module, own, x, seed=7), argnums=(0, 1))
    with expect_calls("forward", "backward"):
        ours = torch.vmap(gradient, in_dims=(None, 0))(parameters, inputs)
    close(ours, loop(gradient, (None, 0), parameters, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_has_rows_may_be_batched(kind: str) -> None:
    """Input, states, lengths and resets, each along another axis, and seeds where weights are not masked."""
    module = make(kind)
    arguments = [
        normal(5, 2, SAMPLES, 2),
        normal(1, SAMPLES, 2, 4, seed=1),
        normal(SAMPLES, 1, 2, 4, seed=2),
        torch.tensor([[5, 0, 3], [2, 4, 1]]),
        normal(5, SAMPLES, 2, seed=3) > 0.5,
        torch.tensor([4, -9, 2**40]),
    ]
    weights_shared = module.regularization.weight_dropout == 0.0
    dims = (2, 1, 0, 1, 1, 0 if weights_shared else None)
    if not weights_shared:
        arguments[-1] = arguments[-1][0]

    def loss(x: Tensor, h: Tensor, c: Tensor, lengths: Tensor, reset: Tensor, seed: Tensor) -> Tensor:
        return loss_of(module, {}, x, (h, c), lengths=lengths, reset=reset, seed=seed)

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    with expect_calls("forward", "backward"):
        ours = torch.vmap(gradient, in_dims=dims)(*arguments)
    close(ours, loop(gradient, dims, *arguments))


@pytest.mark.parametrize("chosen", range(5), ids=["h_0", "c_0", "lengths", "reset", "seed"])
def test_one_batched_argument_beside_common_ones(chosen: int) -> None:
    module = make(Regularization(zoneout_cell=0.4, hidden_dropout=0.3))
    arguments = [
        normal(SAMPLES, 1, 2, 4, seed=1),
        normal(SAMPLES, 1, 2, 4, seed=2),
        torch.tensor([[5, 2], [0, 4], [3, 1]]),
        normal(SAMPLES, 5, 2, seed=3) > 0.5,
        torch.tensor([4, -9, 2**40]),
    ]
    dims = tuple(0 if place == chosen else None for place in range(5))
    arguments = [value if place == chosen else value[0] for place, value in enumerate(arguments)]
    x = normal(5, 2, 2)

    def function(h: Tensor, c: Tensor, lengths: Tensor, reset: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        output, (hidden, cell) = module(x, (h, c), lengths=lengths, reset=reset, seed=seed)
        return output, hidden + cell

    with expect_calls("forward"):
        ours = torch.vmap(function, in_dims=dims)(*arguments)
    close(ours, loop(function, dims, *arguments))


@pytest.mark.parametrize("kind", ["everything", "none"])
def test_gradients_of_what_samples_share(kind: str) -> None:
    """grad over vmap: the parameters' gradients summed over the samples, still in one call each way."""
    module = make(kind)
    inputs, parameters = normal(SAMPLES, 5, 2, 2), parameters_of(module)

    def loss(own: dict[str, Tensor]) -> Tensor:
        return torch.vmap(lambda x: loss_of(module, own, x, seed=7))(inputs).sum()

    with expect_calls("forward", "backward"):
        ours = torch.func.grad(loss)(parameters)
    expected = torch.func.grad(lambda own: sum(loss_of(module, own, x, seed=7) for x in inputs))(parameters)
    close(ours, expected)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    loss(leaves).backward()
    close({name: leaf.grad for name, leaf in leaves.items()}, expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_randomness_is_a_loops(randomness: str) -> None:
    """With "different" each sample draws a seed in turn, as a loop would; with "same" there is one for all."""
    module = make(Regularization(zoneout_hidden=0.3, output_dropout=0.4, update_dropout=0.2))
    inputs = normal(SAMPLES, 5, 2, 2)
    torch.manual_seed(11)
    with expect_calls("forward"):
        ours = torch.vmap(lambda x: module(x)[0], randomness=randomness)(inputs)
    torch.manual_seed(11)
    seeds = [fusedreg.seeds.draw_seed("cpu") for _ in range(SAMPLES if randomness == "different" else 1)]
    close(ours, torch.stack([module(x, seed=seeds[place % len(seeds)])[0] for place, x in enumerate(inputs)]))


def test_nested() -> None:
    """Groups of groups, with per-sample gradients of both levels and seeds by the outer one."""
    module = make(Regularization(zoneout_cell=0.4, hidden_dropout=0.3, norm=LayerNorm()))
    inputs, parameters, seeds = normal(2, 5, SAMPLES, 2), parameters_of(module), torch.tensor([3, 2**35])
    row = torch.func.grad(lambda own, x, seed: loss_of(module, own, x.unsqueeze(1), seed=seed))
    both = torch.vmap(torch.vmap(row, in_dims=(None, 1, None)), in_dims=(None, 0, 0))
    with expect_calls("forward", "backward"):
        ours = both(parameters, inputs, seeds)
    for outer in range(2):
        for inner in range(SAMPLES):
            own = row(parameters, inputs[outer, :, inner], seeds[outer])
            close({name: value[outer, inner] for name, value in ours.items()}, own)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_jacobians(chunk_size: int | None) -> None:
    """jacrev maps over the gradients that come in alone: what was saved is common to all samples."""
    module = make("everything")
    x = normal(4, 2, 2)
    function = lambda value: module(value, seed=3)[0]  # noqa: E731
    ours = torch.func.jacrev(function, chunk_size=chunk_size)(x)
    close(ours, torch.autograd.functional.jacobian(function, x))


def test_second_derivatives() -> None:
    """A double backward through folded calls: of per-sample gradients, and a Hessian by jacrev twice."""
    module = make(Regularization(zoneout_cell=0.4, hidden_dropout=0.3, weight_dropout=0.2))
    inputs, parameters = normal(SAMPLES, 3, 2, 2), parameters_of(module)
    gradient = torch.func.grad(lambda own, x: loss_of(module, own, x, seed=7))

    def norms(own: dict[str, Tensor]) -> Tensor:
        each = torch.vmap(gradient, in_dims=(None, 0))(own, inputs)
        return sum(value.flatten(1).norm(dim=1).sum() for value in each.values())  # type: ignore[return-value]

    def expected_norms(own: dict[str, Tensor]) -> Tensor:
        return sum(value.norm() for x in inputs for value in gradient(own, x).values())  # type: ignore[return-value]

    close(torch.func.grad(norms)(parameters), torch.func.grad(expected_norms)(parameters))
    loss = lambda x: loss_of(module, {}, x, seed=7)  # noqa: E731
    hessians = torch.vmap(torch.func.jacrev(torch.func.grad(loss)))(inputs)
    close(hessians, torch.stack([torch.autograd.functional.hessian(loss, x) for x in inputs]))


LOOPED: dict[str, tuple[Regularization, bool]] = {
    "weights by seed": (Regularization(weight_dropout=0.3), True),
    "batch norm": (Regularization(norm=BatchNorm(max_steps=5)), False),
}


@pytest.mark.parametrize("case", LOOPED)
def test_what_cannot_be_folded_loops(case: str) -> None:
    regularization, seeded = LOOPED[case]
    module = make(regularization)
    inputs, seeds = normal(SAMPLES, 5, 3, 2), torch.tensor([1, 2, 3])
    buffers = dict(module.named_buffers())

    def function(x: Tensor, seed: Tensor) -> Tensor:
        parameters = list(module.parameters())
        result = fusedreg.functional.lstm(
            x, None, parameters, training=True, regularization=regularization, seed=seed, buffers=buffers
        )
        return result.output

    dims = (0, 0 if seeded else None)
    arguments = inputs, (seeds if seeded else seeds[0])
    with expect_calls("forward"):
        ours = torch.vmap(function, in_dims=dims)(*arguments)
    close(ours, loop(function, dims, *arguments))


@pytest.mark.parametrize("kind", [fusedreg.LSTM, fusedreg.LSTMCell])
def test_batch_norm_in_training_updates_buffers_of_each_samples_own(kind: Any) -> None:
    modules = [kind(2, 3, norm=BatchNorm(4)).double() for _ in range(SAMPLES)]
    parameters, buffers = torch.func.stack_module_state(modules)
    inputs = normal(SAMPLES, 5, 4, 2) if kind is fusedreg.LSTM else normal(SAMPLES, 4, 2)
    torch.vmap(lambda *own: torch.func.functional_call(modules[0], own[:2], (own[2],))[0])(parameters, buffers, inputs)
    for module, sample in zip(modules, inputs, strict=True):
        module(sample)
    _, expected = torch.func.stack_module_state(modules)
    torch.testing.assert_close(buffers, expected)
    with pytest.raises(RuntimeError, match="expected running statistics of each sample's own inside"):
        torch.vmap(lambda sample: modules[0](sample)[0])(inputs)
    torch.testing.assert_close(dict(modules[0].named_buffers()), {name: value[0] for name, value in expected.items()})


def test_batch_norm_in_evaluation_folds() -> None:
    module = make(Regularization(norm=BatchNorm(max_steps=5)))
    module(normal(4, 6, 2))
    module.eval()
    inputs, parameters = normal(SAMPLES, 5, 2, 2), parameters_of(module)
    gradient = torch.func.grad(lambda own, x: loss_of(module, own, x), argnums=(0, 1))
    with expect_calls("forward", "backward"):
        ours = torch.vmap(gradient, in_dims=(None, 0))(parameters, inputs)
    close(ours, loop(gradient, (None, 0), parameters, inputs))


@pytest.mark.parametrize("inputs_too", [True, False])
def test_ensembles(inputs_too: bool) -> None:
    """Models of their own weights, by functional_call over stacked parameters: a loop of calls, with gradients."""
    models = [make("everything") for _ in range(SAMPLES)]
    with torch.no_grad():
        for place, model in enumerate(models):
            for parameter in model.parameters():
                parameter.mul_(1 + place)
    stacked, _ = torch.func.stack_module_state(models)
    stacked = {name: value.detach() for name, value in stacked.items()}
    inputs = normal(SAMPLES, 5, 2, 2) if inputs_too else normal(5, 2, 2)
    dims = (0, 0 if inputs_too else None)
    gradient = torch.func.grad(lambda own, x: loss_of(models[0], own, x, seed=7))
    ours = torch.vmap(gradient, in_dims=dims)(stacked, inputs)
    for place, model in enumerate(models):
        own = gradient(parameters_of(model), inputs[place] if inputs_too else inputs)
        close({name: value[place] for name, value in ours.items()}, own)


def test_two_layers_in_both_directions() -> None:
    """Several calls of the operator a sample become as many for all samples."""
    module = make(Regularization(zoneout_cell=0.4, input_dropout=0.3), num_layers=2, bidirectional=True)
    inputs, parameters = normal(SAMPLES, 5, 2, 2), parameters_of(module)
    gradient = torch.func.grad(lambda own, x: module_output(module, own, x).square().sum())
    with expect_calls(*["forward"] * 4, *["backward"] * 4):
        ours = torch.vmap(gradient, in_dims=(None, 0), randomness="same")(parameters, inputs)
    close(ours, loop(gradient, (None, 0), parameters, inputs))


def module_output(module: fusedreg.LSTM, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    output: Tensor = torch.func.functional_call(module, parameters, (x,), {"seed": 7})[0]
    return output


def test_projections() -> None:
    """weight_hr's gradient comes by sample too."""
    module = make(Regularization(zoneout_hidden=0.3, weight_dropout=0.2), proj_size=3)
    inputs, parameters = normal(SAMPLES, 5, 2, 2), parameters_of(module)
    gradient = torch.func.grad(lambda own, x: loss_of(module, own, x, seed=7))
    with expect_calls("forward", "backward"):
        ours = torch.vmap(gradient, in_dims=(None, 0))(parameters, inputs)
    close(ours, loop(gradient, (None, 0), parameters, inputs))


def test_no_rows_and_one_sample() -> None:
    module = make("everything")
    function = lambda x: module(x, seed=3)[0]  # noqa: E731
    assert torch.vmap(function)(normal(SAMPLES, 5, 0, 2)).shape == (SAMPLES, 5, 0, 4)
    one, parameters = normal(1, 5, 2, 2), parameters_of(module)
    gradient = torch.func.grad(lambda own, x: loss_of(module, own, x, seed=7))
    close(
        torch.vmap(gradient, in_dims=(None, 0))(parameters, one),
        {name: value.unsqueeze(0) for name, value in gradient(parameters, one[0]).items()},
    )


@pytest.mark.parametrize("make_one", [make, lambda kind: fusedreg.LSTMCell(2, 4, dtype=torch.float64)])
def test_forward_mode_names_the_remedy(make_one: Any) -> None:
    """jvp, jacfwd and hessian, by themselves and inside vmap, and dual numbers: refused, never without tangents."""
    module = make_one("none")
    inputs = normal(SAMPLES, 2, 2) if isinstance(module, fusedreg.LSTMCell) else normal(SAMPLES, 3, 2, 2)
    function = lambda x: module(x)[0].sum()  # noqa: E731
    x = inputs[0]
    calls: list[Callable[[], Any]] = [
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: torch.func.hessian(function)(x),
        lambda: torch.vmap(lambda each: torch.func.jvp(function, (each,), (each,))[1])(inputs),
        lambda: torch.func.linearize(function, x),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"jacrev.*backend='reference'"):
            call()
    with pytest.raises(NotImplementedError, match="reference"), forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))
    assert torch.func.jacrev(function)(x).shape == x.shape
