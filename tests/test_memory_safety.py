"""What a backend may read, write and return: aliasing, saved tensors, strides, edges of shapes, absent gradients."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import REGULARIZERS, compiled
from torch import Tensor

from fusedreg.layer import REVERSE, LayerParameters, LayerResult
from fusedreg.regularization import BatchNorm
from fusedreg.testing import LayerArguments, LayerCase, implementation, make_arguments, run_layer

BACKENDS = ["reference", pytest.param("cpu", marks=compiled)]
NAMES = [
    "none",
    "zoneout_candidate",
    "everything",
    "everything_untied",
    "everything_batch_norm",
    "everything_layer_norm",
    "projected",
]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_name = pytest.mark.parametrize("name", NAMES)


def case_of(name: str, **changes: Any) -> LayerCase:
    regularization = REGULARIZERS["everything" if name == "projected" else name]
    case = LayerCase(name, regularization=regularization, ragged=True, resets=True)
    return replace(case, proj_size=4 if name == "projected" else 0, **changes)


def called(
    backend: str, case: LayerCase, arguments: LayerArguments, needed: Callable[[str], bool] = lambda name: True
) -> tuple[LayerResult, dict[str, Tensor]]:
    """The result with its graph, and the leaves that require grad, by name."""
    leaves = {"input": arguments.input, "initial_hidden": arguments.initial_hidden}
    leaves |= {"initial_cell": arguments.initial_cell, **arguments.parameters._asdict()}
    present = {
        name: value.detach().clone().requires_grad_(needed(name)) for name, value in leaves.items() if value is not None
    }
    result = implementation(backend)(
        present["input"],
        present.get("initial_hidden"),
        present.get("initial_cell"),
        LayerParameters(*(present.get(name) for name in LayerParameters._fields)),  # type: ignore[arg-type]
        case.options,
        lengths=arguments.lengths,
        reset=arguments.reset,
        seed=arguments.seed,
        running=arguments.running,
    )
    return result, {name: leaf for name, leaf in present.items() if leaf.requires_grad}


def pulled(
    result: LayerResult, leaves: dict[str, Tensor], arguments: LayerArguments, **options: Any
) -> dict[str, Tensor]:
    outputs = {name: getattr(result, name) for name in arguments.gradients if getattr(result, name) is not None}
    gradients = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [arguments.gradients[name] for name in outputs], **options
    )
    return dict(zip(leaves, gradients, strict=True))


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Bitwise the same, NaN included."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value.nan_to_num(7.25), two[name].nan_to_num(7.25)), name


# ---- The poison itself -------------------------------------------------------------------------------------------


def test_uninitialized_memory_is_poisoned() -> None:
    like = torch.zeros(3)
    for made in (
        torch.empty(3),
        torch.empty_like(like),
        like.new_empty(3),
        torch.empty_strided((3,), (2,)),
        torch.empty(3, dtype=torch.bfloat16),
        torch.zeros(0).resize_(3),
    ):
        assert made.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


# ---- Saved tensors and aliasing ----------------------------------------------------------------------------------


@every_backend
@every_name
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_two_backwards_over_one_graph_are_equal(backend: str, name: str, recompute: bool) -> None:
    case = case_of(name, recompute=recompute)
    arguments = make_arguments(case, 0)
    result, leaves = called(backend, case, arguments)
    first = pulled(result, leaves, arguments, retain_graph=True)
    kept = {key: value.clone() for key, value in first.items()}
    for value in first.values():
        value.fill_(float("nan"))  # were one of them a saved tensor, the next backward would see this
    same(pulled(result, leaves, arguments, retain_graph=True), kept)
    same(pulled(result, leaves, arguments), kept)


@every_backend
@every_name
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_saved_tensors_are_not_written(backend: str, name: str, recompute: bool) -> None:
    saved: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor, tensor.detach().clone()))
        return tensor

    case = case_of(name, recompute=recompute)
    arguments = make_arguments(case, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result, leaves = called(backend, case, arguments)
    assert saved
    gradients = pulled(result, leaves, arguments, retain_graph=True)
    for tensor, before in saved:
        same({"saved": tensor.detach()}, {"saved": before})
    storages = {tensor.untyped_storage().data_ptr() for tensor, _ in saved if tensor.numel()}
    for key, gradient in gradients.items():
        assert gradient.untyped_storage().data_ptr() not in storages, f"the gradient of {key} is a saved tensor"


@every_backend
@every_name
@pytest.mark.parametrize("steps", [1, 4])
def test_results_share_no_memory(backend: str, name: str, steps: int) -> None:
    case = case_of(name, steps=steps, resets=False, ragged=False)
    arguments = make_arguments(case, 0)
    result, leaves = called(backend, case, arguments)
    tensors = {field: getattr(result, field) for field in ("output", "final_hidden", "final_cell", "cells")}
    tensors |= {f"argument {key}": leaf for key, leaf in leaves.items()}
    tensors |= {f"grad {key}": value for key, value in pulled(result, leaves, arguments).items()}
    for (one, first), (two, second) in itertools.combinations(tensors.items(), 2):
        if backend == "reference" and not (one.startswith("grad") or two.startswith("grad")):
            continue  # views of one another are how plain torch works; autograd keeps them safe
        if backend == "reference" and {one, two} == {"grad bias_ih", "grad bias_hh"}:
            continue  # the gradient of a sum, handed to both by autograd itself
        assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr(), f"{one} and {two}"


@every_backend
@every_name
def test_arguments_are_not_written(backend: str, name: str) -> None:
    case = case_of(name)
    arguments = make_arguments(case, 0)
    tensors = [
        *(value for value in arguments[:3] if value is not None),
        *(value for value in arguments.parameters if value is not None),
        *(value for value in (arguments.lengths, arguments.reset, arguments.seed) if value is not None),
        *(value for value in arguments.running or () if value is not None),
        *arguments.gradients.values(),
    ]
    before = [value.clone() for value in tensors]
    run_layer(implementation(backend), case, arguments)
    assert all(torch.equal(one, two) for one, two in zip(tensors, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_workspace_of_one_call_does_not_show_in_the_next(backend: str) -> None:
    """Large, small and large again, in other types and with other options: whatever is pooled is not trusted."""
    cases = [
        case_of("everything", hidden_size=70, rows=9),
        case_of("none", hidden_size=1, rows=1, resets=False),
        case_of("everything_untied", hidden_size=33, dtype=torch.float64),
        case_of("everything_batch_norm", hidden_size=40, rows=9),
        case_of("everything_layer_norm", hidden_size=5, dtype=torch.bfloat16),
    ]
    arguments = [make_arguments(case, 0) for case in cases]
    first = [run_layer(implementation(backend), case, each) for case, each in zip(cases, arguments, strict=True)]
    order = [*range(len(cases)), *reversed(range(len(cases)))]
    for place in order:
        same(run_layer(implementation(backend), cases[place], arguments[place]), first[place])


# ---- Strides -----------------------------------------------------------------------------------------------------


def _transposed(value: Tensor) -> Tensor:
    return value.transpose(0, 1).contiguous().transpose(0, 1)


def _every_other(value: Tensor) -> Tensor:
    wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), float("nan"), dtype=value.dtype)
    wide[..., ::2] = value
    return wide[..., ::2]


def _offset(value: Tensor) -> Tensor:
    """Not aligned to anything but its own elements."""
    flat = torch.full((value.numel() + 1,), float("nan"), dtype=value.dtype)
    flat[1:] = value.reshape(-1)
    return flat[1:].view(value.shape)


STRIDES = {"transposed": _transposed, "every_other": _every_other, "offset": _offset}


@every_backend
@every_name
@pytest.mark.parametrize("strides", STRIDES)
def test_strides_do_not_matter(backend: str, name: str, strides: str) -> None:
    """Input, states, weights, gradients, lengths and resets laid out in any way."""
    # Torch's own products choose their order of summation by the strides; kernels do not.
    exact = backend != "reference"
    case = case_of(name, dtype=torch.float32 if exact else torch.float64)
    arguments = make_arguments(case, 0)
    expected = run_layer(implementation(backend), case, arguments)

    def check(key: str, value: Tensor) -> None:
        if exact:
            assert torch.equal(value, expected[key]), key
        else:
            torch.testing.assert_close(value, expected[key], msg=key)

    def lay(value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point() or (value.dim() < 2 and strides == "transposed"):
            return value
        return STRIDES[strides](value)

    assert arguments.lengths is not None and arguments.reset is not None
    laid = arguments._replace(
        input=lay(arguments.input),
        initial_hidden=lay(arguments.initial_hidden),
        initial_cell=lay(arguments.initial_cell),
        parameters=LayerParameters(*(lay(value) for value in arguments.parameters)),
        lengths=torch.stack([arguments.lengths, arguments.lengths - 1], dim=1)[:, 0],
        reset=arguments.reset.t().contiguous().t(),
        gradients={key: lay(value) for key, value in arguments.gradients.items()},
    )
    result = implementation(backend)(
        *laid[:4], case.options, lengths=laid.lengths, reset=laid.reset, seed=laid.seed, running=laid.running
    )
    check("output", result.output)
    leaves = {
        key: value.requires_grad_()
        for key, value in (
            ("input", laid.input),
            ("initial_hidden", laid.initial_hidden),
            ("initial_cell", laid.initial_cell),
            *laid.parameters._asdict().items(),
        )
        if value is not None
    }
    result = implementation(backend)(
        *laid[:4], case.options, lengths=laid.lengths, reset=laid.reset, seed=laid.seed, running=laid.running
    )
    for key, gradient in pulled(result, leaves, laid).items():
        check(f"grad {key}", gradient)


@every_backend
@every_name
def test_expanded_gradients_and_inputs(backend: str, name: str) -> None:
    """``y.sum().backward()`` hands over a gradient without strides; an expanded input has none either."""
    case = case_of(name, rows=9)
    arguments = make_arguments(case, 0)
    ones = {key: torch.ones_like(value) for key, value in arguments.gradients.items()}
    arguments = arguments._replace(input=arguments.input[:1, :1].expand(case.steps, 9, -1), gradients=ones)
    packed = arguments._replace(input=arguments.input.contiguous())
    expected = run_layer(implementation(backend), case, packed)
    expanded = {key: torch.ones(()).expand(value.shape) for key, value in ones.items()}
    leaf = arguments.input.detach().requires_grad_()
    result = implementation(backend)(
        leaf,
        *arguments[1:4],
        case.options,
        lengths=arguments.lengths,
        reset=arguments.reset,
        seed=arguments.seed,
        running=arguments.running,
    )
    assert torch.equal(result.output, expected["output"])
    gradient = pulled(result, {"input": leaf}, arguments._replace(gradients=expanded))["input"]
    torch.testing.assert_close(gradient, expected["grad input"], rtol=1e-5, atol=1e-6)


# ---- Edges of shapes ---------------------------------------------------------------------------------------------


@every_backend
@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_empty_batch(backend: str, name: str, dtype: torch.dtype) -> None:
    """No rows: empty results, and zeros for every parameter's gradient."""
    case = case_of(name, rows=0, dtype=dtype)
    arguments = make_arguments(case, 0)
    values = run_layer(implementation(backend), case, arguments)
    assert values["output"].shape == (case.steps, 0, case.proj_size or case.hidden_size)
    assert values["final_cell"].shape == (0, case.hidden_size)
    assert values["grad input"].shape == (case.steps, 0, case.input_size)
    for key in ("grad weight_ih", "grad weight_hh", "grad bias_ih", "grad bias_hh"):
        assert (values[key] == 0).all(), key


@every_backend
@pytest.mark.parametrize("name", ["none", "zoneout_candidate", "everything", "everything_layer_norm"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_rows_of_no_steps_return_their_initial_state(backend: str, name: str, recompute: bool) -> None:
    """For all rows at once, and whatever the input holds; the state's gradient passes through untouched."""
    case = case_of(name, recompute=recompute, resets=False)
    arguments = make_arguments(case, 0)
    arguments = arguments._replace(
        lengths=torch.zeros(case.rows, dtype=torch.int64), input=torch.full_like(arguments.input, float("nan"))
    )
    values = run_layer(implementation(backend), case, arguments)
    assert arguments.initial_hidden is not None and arguments.initial_cell is not None
    assert torch.equal(values["final_hidden"], arguments.initial_hidden)
    assert torch.equal(values["final_cell"], arguments.initial_cell)
    assert torch.equal(values["grad initial_hidden"], arguments.gradients["final_hidden"])
    assert torch.equal(values["grad initial_cell"], arguments.gradients["final_cell"])
    for key in ("output", "cells", *(key for key in values if key.startswith("grad ") and "initial" not in key)):
        assert (values[key] == 0).all(), key


@every_backend
@pytest.mark.parametrize("lengths", [[9, -4, 3, 100, 0], [7, 0, 3, 7, 0]], ids=["out of range", "clamped"])
def test_lengths_are_clamped(backend: str, lengths: list[int]) -> None:
    """On a device nobody has looked at them, so a layer must be safe with any number."""
    case = case_of("everything", resets=False)
    arguments = make_arguments(case, 0)
    values = run_layer(implementation(backend), case, arguments._replace(lengths=torch.tensor(lengths)))
    clamped = arguments._replace(lengths=torch.tensor(lengths).clamp(0, case.steps))
    same(values, run_layer(implementation(backend), case, clamped))


@every_backend
@every_name
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("direction", [0, REVERSE], ids=["forward", "reverse"])
def test_padding_may_hold_anything(backend: str, name: str, direction: int, recompute: bool) -> None:
    """NaN and infinity in the padding of the input and of the incoming gradients, and resets there."""
    case = case_of(name, rows=9, direction=direction, recompute=recompute)
    arguments = make_arguments(case, 0)
    assert arguments.lengths is not None and arguments.reset is not None
    padding = torch.arange(case.steps)[:, None] >= arguments.lengths
    clean = {
        key: torch.where(padding[..., None], 0.0, value) if value.dim() == 3 else value
        for key, value in arguments.gradients.items()
    }
    expected = run_layer(
        implementation(backend),
        case,
        arguments._replace(
            input=torch.where(padding[..., None], 0.0, arguments.input),
            reset=arguments.reset & ~padding,
            gradients=clean,
        ),
    )
    for junk in (float("nan"), float("inf"), -3e38):
        dirty = {
            key: torch.where(padding[..., None], junk, value) if value.dim() == 3 else value
            for key, value in arguments.gradients.items()
        }
        values = run_layer(
            implementation(backend),
            case,
            arguments._replace(
                input=torch.where(padding[..., None], junk, arguments.input),
                reset=arguments.reset | padding,
                gradients=dirty,
            ),
        )
        same(values, expected)
        assert (values["grad input"][padding] == 0).all()
        assert (values["output"][padding] == 0).all()
        assert (values["cells"][padding] == 0).all()


@every_backend
@pytest.mark.parametrize("name", ["none", "everything", "everything_layer_norm"])
def test_one_bad_row_stays_alone(backend: str, name: str) -> None:
    """A NaN in a valid input spreads within its own row only (and into the weights' gradients, as it must)."""
    case = case_of(name, rows=6, ragged=False, resets=False)
    arguments = make_arguments(case, 0)
    expected = run_layer(implementation(backend), case, arguments)
    input = arguments.input.clone()
    input[2, 3, :] = float("nan")
    values = run_layer(implementation(backend), case, arguments._replace(input=input))
    others = [0, 1, 2, 4, 5]
    for key in ("output", "cells", "grad input"):
        assert torch.equal(values[key][:, others], expected[key][:, others]), key
    assert values["output"][2:, 3].isnan().any()


# ---- Which gradients are asked for -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[1:])
@every_name
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_any_subset_of_gradients(backend: str, name: str, recompute: bool) -> None:
    """Each alone, all but one, and some at random: what is asked for is bitwise what all at once gives."""
    case = case_of(name, rows=8, recompute=recompute)
    arguments = make_arguments(case, 0)
    result, leaves = called(backend, case, arguments)
    expected = pulled(result, leaves, arguments)
    names = list(leaves)
    chooser = random.Random(0)
    subsets = [{one} for one in names] + [set(names) - {one} for one in names]
    subsets += [set(chooser.sample(names, chooser.randint(2, len(names) - 2))) for _ in range(6)]
    for subset in subsets:
        result, leaves = called(backend, case, arguments, needed=subset.__contains__)
        same(pulled(result, leaves, arguments), {key: expected[key] for key in leaves})


@every_backend
@every_name
@pytest.mark.parametrize("used", ["output", "final_hidden", "final_cell", "cells"])
def test_one_result_used(backend: str, name: str, used: str) -> None:
    """The gradient of one result is that of all of them with zeros for the rest."""
    case = case_of(name, rows=8)
    arguments = make_arguments(case, 0)
    gradients = {key: value if key == used else torch.zeros_like(value) for key, value in arguments.gradients.items()}
    expected = run_layer(implementation(backend), case, arguments._replace(gradients=gradients))
    result, leaves = called(backend, case, arguments)
    values = torch.autograd.grad(
        getattr(result, used), list(leaves.values()), arguments.gradients[used], allow_unused=True
    )
    for (key, leaf), value in zip(leaves.items(), values, strict=True):
        value = torch.zeros_like(leaf) if value is None else value
        torch.testing.assert_close(value, expected[f"grad {key}"], rtol=1e-6, atol=1e-7, msg=key)


@every_backend
def test_layer_without_gradients_needed(backend: str) -> None:
    case = case_of("everything_batch_norm", rows=8)
    assert isinstance(case.regularization.norm, BatchNorm)
    result, leaves = called(backend, case, make_arguments(case, 0), needed=lambda name: False)
    assert not leaves and not result.output.requires_grad
    assert result.statistics is not None and result.statistics.recurrent is not None
    assert not result.statistics.recurrent.requires_grad
