"""Operators on several models at once: ``result[m]`` is the operator of ``argument[m]``, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import REGULARIZERS, compiled
from test_registration import BACKWARD_ARGUMENTS, FORWARD_ARGUMENTS, faked, layout
from torch import Tensor
from torch.library import opcheck

from fusedreg import encoding
from fusedreg.layer import REVERSE
from fusedreg.testing import LayerCase, make_arguments

pytestmark = compiled

MODELS = 3
SMALL = {"steps": 4, "rows": 3, "input_size": 2, "hidden_size": 5}
# Everything that a layer can be given besides.
FULL = {"ragged": True, "resets": True, "proj_size": 3, "probes": True, "direction": REVERSE}
SAVES = {"gates": encoding.SAVE_GATES, "recompute": encoding.SAVE_RECOMPUTE}

Arguments = dict[str, Any]


class Pair(NamedTuple):
    """The operators of one backend."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


def pair_of(namespace: str, name: str = "lstm_layer") -> Pair:
    library = getattr(torch.ops, namespace)
    return Pair(getattr(library, f"{name}_forward").default, getattr(library, f"{name}_backward").default)


CPU = "fusedreg"


@pytest.fixture
def pair() -> Pair:
    """The operators under test; ``test_cuda_models.py`` runs the tests that take it with another pair."""
    return pair_of(CPU)


def case_of(name: str, **changes: Any) -> LayerCase:
    return LayerCase(name, regularization=REGULARIZERS[name], **{**SMALL, **changes})


def forward_arguments(case: LayerCase, save: int, seed: int) -> Arguments:
    encoded = encoding.encode_options(case.options, save)
    return dict(zip(FORWARD_ARGUMENTS, [*make_arguments(case, seed).tensors(), *encoded], strict=True))


def backward_arguments(pair: Pair, case: LayerCase, forward: Arguments, seed: int) -> Arguments:
    """Those that belong to a forward's, with incoming gradients of their own."""
    results = pair.forward(*forward.values())
    carried = results[4 if encoding.hidden_differs(forward["rates"], forward["options"]) else 0]
    given = make_arguments(case, seed).gradients
    incoming = [given[name] for name in ("output", "final_hidden", "final_cell", "cells")]
    needed = [forward[encoding.TENSOR_ARGUMENTS[position]] is not None for position in encoding.DIFFERENTIABLE]
    tensors = [forward[name] for name in encoding.TENSOR_ARGUMENTS]
    encoded = [forward[name] for name in ("rates", "options", "norm_eps")]
    values = [*incoming, *tensors, results[3], carried, *results[5:], *encoded, needed]
    return dict(zip(BACKWARD_ARGUMENTS, values, strict=True))


def together(each: list[Arguments]) -> Arguments:
    """The arguments of all models as those of one call."""
    return {
        name: torch.stack([own[name] for own in each]) if isinstance(value, Tensor) else value
        for name, value in each[0].items()
    }


def of_model(arguments: Arguments, model: int) -> Arguments:
    return {name: value[model] if isinstance(value, Tensor) else value for name, value in arguments.items()}


def check(operator: Callable[..., tuple[Tensor, ...]], arguments: Arguments, models: int = MODELS) -> None:
    """One call with all models against a call for each."""
    results = operator(*arguments.values())
    for model in range(models):
        for place, (ours, own) in enumerate(zip(results, operator(*of_model(arguments, model).values()), strict=True)):
            assert ours.shape[0] == models
            assert ours[model].shape == own.shape, place
            assert torch.equal(ours[model], own), place


def check_both(pair: Pair, case: LayerCase, save: int = encoding.SAVE_GATES, models: int = MODELS) -> None:
    forwards = [forward_arguments(case, save, seed) for seed in range(models)]
    check(pair.forward, together(forwards), models)
    backwards = [backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)]
    check(pair.backward, together(backwards), models)


# ---- One call against a loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regularizer(name: str) -> None:
    check_both(pair_of(CPU), case_of(name))
    check_both(pair_of(CPU), case_of(name, **FULL), encoding.SAVE_RECOMPUTE)
    check_both(pair_of(CPU), case_of(name, training=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype: torch.dtype) -> None:
    """A model's results may begin anywhere: here at odd numbers of 16-bit elements."""
    check_both(pair_of(CPU), case_of("everything", dtype=dtype, rows=1, steps=3))
    check_both(pair_of(CPU), case_of("layer_norm", dtype=dtype, **FULL))


def test_what_models_have_in_common_is_expanded(pair: Pair) -> None:
    """Each tensor in turn, and all of them: the axis of the models has no stride."""
    case = case_of("everything_batch_norm", ragged=True, resets=True, steps=3)
    every = together([forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)])
    common = {name: value[:1].expand_as(value) for name, value in every.items() if isinstance(value, Tensor)}
    for name, value in common.items():
        check(pair.forward, every | {name: value})
    check(pair.forward, every | common)


def test_any_strides(pair: Pair) -> None:
    """The axis of the models last in memory, for every tensor, gradients and saved tensors too."""

    def laid(arguments: Arguments) -> Arguments:
        return {
            name: value.movedim(0, -1).contiguous().movedim(-1, 0) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }

    case = case_of("everything_layer_norm", ragged=True, resets=True)
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)]
    check(pair.forward, laid(together(forwards)))
    backwards = [backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)]
    check(pair.backward, laid(together(backwards)))


@pytest.mark.parametrize("name", ["everything", "everything_layer_norm"])
def test_groups_of_rows_within_models(name: str, pair: Pair) -> None:
    """Seeds ``(M, S, 2)``, and gradients of parameters by group: ``(M, S, ...)``."""
    case = case_of(name, rows=4)
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)]
    for seed, own in enumerate(forwards):
        own["seed"] = torch.tensor([[seed, 0], [2**40 - seed, 3]])
    check(pair.forward, together(forwards))
    every = together([backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)])
    every["options"] = [*every["options"][: encoding.GRADIENT_GROUPS], 2]
    check(pair.backward, every)
    assert pair.backward(*every.values())[2].shape == (MODELS, 2, 20, 5)


def test_a_subset_of_gradients(pair: Pair) -> None:
    """Either bias alone, and every other result."""
    case = case_of("everything_untied", bias=True)
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)]
    every = together([backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)])
    for needed in ([place == 3 for place in range(16)], [place % 2 == 0 for place in range(16)]):
        check(pair.backward, every | {"needed": needed})
    biases = pair.backward(*every.values())[3:5]
    assert torch.equal(*biases)
    assert biases[0].data_ptr() != biases[1].data_ptr()


@pytest.mark.parametrize("models", [0, 1])
def test_no_model_and_one(models: int, pair: Pair) -> None:
    case = case_of("everything_batch_norm", ragged=True)
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(1)]
    backwards = [backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)]
    for operator, one in ((pair.forward, forwards), (pair.backward, backwards)):
        arguments = together(one)
        arguments = {key: value[:models] if isinstance(value, Tensor) else value for key, value in arguments.items()}
        check(operator, arguments, models)
        expected = [(models, *own.shape) for own in operator(*one[0].values())]
        assert [tuple(result.shape) for result in operator(*arguments.values())] == expected


def test_models_without_rows(pair: Pair) -> None:
    case = case_of("everything_layer_norm", rows=0)
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)]
    check(pair.forward, together(forwards))
    backwards = [backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)]
    results = pair.backward(*together(backwards).values())
    assert results[2].shape == (MODELS, 20, 5)
    assert not any(result.any() for result in results)


@pytest.mark.parametrize("models", [3, 9])
@pytest.mark.parametrize("name", ["everything", "everything_batch_norm"])
def test_results_do_not_depend_on_threads(name: str, models: int) -> None:
    """More models than threads, which share them out, and fewer, which run one after another with all threads."""
    case = case_of(name, steps=9, rows=8, input_size=12, hidden_size=25)
    pair, threads = pair_of(CPU), torch.get_num_threads()
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(models)]
    backwards = [backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)]
    found = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for operator, each in ((pair.forward, forwards), (pair.backward, backwards)):
                found.append(operator(*together(each).values()))
    finally:
        torch.set_num_threads(threads)
    for again in (found[2:4], found[4:6]):
        for one, two in zip(found[:2], again, strict=True):
            assert all(map(torch.equal, one, two))
    for one, each, operator in zip(found[:2], (forwards, backwards), pair, strict=True):
        own = operator(*each[-1].values())
        assert all(torch.equal(result[-1], alone) for result, alone in zip(one, own, strict=True))


# ---- Memory ------------------------------------------------------------------------------------------------------


def test_arguments_are_not_written_and_results_are_new(pair: Pair) -> None:
    case = case_of("everything_untied", **FULL)
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)]
    backwards = [backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)]
    for operator, each in ((pair.forward, forwards), (pair.backward, backwards)):
        arguments = together(each)
        given = [value for value in arguments.values() if isinstance(value, Tensor)]
        before = [value.clone() for value in given]
        results = operator(*arguments.values())
        assert all(map(torch.equal, given, before))
        pointers = [value.untyped_storage().data_ptr() for value in (*given, *results) if value.numel()]
        assert len(set(pointers)) == len(pointers)


LEADING = {
    "one more": lambda value: torch.cat([value, value[:1]]),
    "one less": lambda value: value[:-1],
    "no axis": lambda value: value[0],
}


def refused(operator: Callable[..., Any], arguments: Arguments, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operator(*arguments.values())


@pytest.mark.parametrize("wrong", LEADING)
def test_an_axis_of_models_that_does_not_fit_is_refused(wrong: str, pair: Pair) -> None:
    """Of each tensor there is, by its name; without an axis a tensor has some other number of rows in front."""
    for name in ("everything_batch_norm", "everything_layer_norm"):
        case = case_of(name, **FULL)
        forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)]
        backwards = [backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)]
        for operator, each in ((pair.forward, forwards), (pair.backward, backwards)):
            every = together(each)
            for key, value in every.items():
                if isinstance(value, Tensor) and key != "input":
                    changed = LEADING[wrong](value)
                    if changed.dim() and changed.shape[0] == MODELS:
                        continue  # an axis of the same size by chance: its other sizes are refused below
                    refused(operator, every | {key: changed}, f"{key}: expected an axis of {MODELS} models in front")


@pytest.mark.parametrize("name", ["everything_batch_norm", "everything_layer_norm"])
def test_a_models_own_sizes_are_checked(name: str, pair: Pair) -> None:
    """As without models: by name, types too."""
    case = case_of(name, **FULL)
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)]
    every = together([backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)])
    for key, value in every.items():
        if not isinstance(value, Tensor) or key in ("input", "weight_hh", "seed") or value.dim() < 2:
            continue
        if (key.startswith("running") and value.dim() == 3) or not value.numel():
            continue  # their rows are as many as they are; what was not saved is not looked at
        longer = torch.cat([value, value[:, -1:]], 1)
        refused(pair.backward, every | {key: longer}, f"{key}: expected shape")
        other = value.to(torch.float64 if value.dtype != torch.float64 else torch.float32)
        refused(pair.backward, every | {key: other}, f"{key}: expected dtype")


def test_inputs_of_other_ranks_are_refused(pair: Pair) -> None:
    every = together([forward_arguments(case_of("none"), encoding.SAVE_GATES, seed) for seed in range(MODELS)])
    for input in (every["input"][None], every["input"][0, 0], torch.zeros(())):
        refused(pair.forward, every | {"input": input}, r"input: expected shape .*of several models \(M, T, B, I\)")
    refused(pair.forward, every | {"input": every["input"][:, :0]}, "input: expected shape .* with T >= 1")
    # One layer's input beside models' weights.
    refused(pair.forward, every | {"input": every["input"][0]}, "weight_hh: expected shape")


def test_values_of_every_model_are_checked() -> None:
    """What is read from a tensor and used as an index, in the last model alone."""
    forward = pair_of(CPU).forward
    case = case_of("everything_batch_norm", ragged=True)
    every = together([forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)])
    for row, message in ((-2, "expected row numbers or -1, got -2"), (99, "expected at least 100 rows")):
        index = every["running_index"].clone()
        index[-1, 0] = row
        refused(forward, every | {"running_index": index}, message)
    seed = torch.zeros(MODELS, 1, 2, dtype=torch.int64)
    seed[-1, 0, 1] = -1
    refused(forward, every | {"seed": seed}, "seed: expected first steps of 0 to .*, got -1")


# ---- As torch sees them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["nothing", *SAVES])
@pytest.mark.parametrize("name", ["none", "zoneout_candidate", "batch_norm", "batch_norm_sequence", "layer_norm"])
def test_fakes_are_what_comes(name: str, save: str) -> None:
    pair, kept = pair_of(CPU), SAVES.get(save, encoding.SAVE_NOTHING)
    for extras in ({}, FULL | {"dtype": torch.bfloat16}):
        case = case_of(name, **extras)
        forwards = [forward_arguments(case, kept, seed) for seed in range(MODELS)]
        every = together(forwards)
        assert faked(pair.forward, every) == layout(pair.forward(*every.values()))
        if save == "nothing":
            continue
        every = together([backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)])
        assert faked(pair.backward, every) == layout(pair.backward(*every.values()))
        if not name.startswith("batch_norm"):
            every["options"] = [*every["options"][: encoding.GRADIENT_GROUPS], case.rows]
            assert faked(pair.backward, every) == layout(pair.backward(*every.values()))


def test_opcheck() -> None:
    pair, case = pair_of(CPU), case_of("everything_batch_norm")
    forwards = [forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)]
    backwards = [backward_arguments(pair, case, own, seed) for seed, own in enumerate(forwards)]
    arguments = together(forwards)
    for position in encoding.DIFFERENTIABLE:
        key = encoding.TENSOR_ARGUMENTS[position]
        if arguments[key] is not None:
            arguments[key] = arguments[key].requires_grad_()
    opcheck(pair.forward, list(arguments.values()))
    opcheck(pair.backward, list(together(backwards).values()))


@pytest.mark.parametrize("name", ["everything_batch_norm", "layer_norm"])
def test_derivatives_of_the_operator(name: str) -> None:
    """First and second ones, of an operator called directly: those of a loop over the models."""
    pair, case = pair_of(CPU), case_of(name, dtype=torch.float64, steps=2, hidden_size=2)
    every = together([forward_arguments(case, encoding.SAVE_GATES, seed) for seed in range(MODELS)])
    places = [encoding.TENSOR_ARGUMENTS[position] for position in encoding.DIFFERENTIABLE]
    leaves = {key: every[key].requires_grad_() for key in places if every[key] is not None}

    def loss(arguments: Arguments) -> Tensor:
        results = pair.forward(*arguments.values())[:4]
        return torch.stack([(place + value).pow(3).sum() for place, value in enumerate(results)]).sum()

    def derivatives(total: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        penalty = torch.stack([(gradient + 0.5).pow(2).sum() for gradient in first]).sum()
        return *first, *torch.autograd.grad(penalty, list(leaves.values()))

    looped = torch.stack([loss(of_model(every, model)) for model in range(MODELS)]).sum()
    for ours, expected in zip(derivatives(loss(every)), derivatives(looped), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
