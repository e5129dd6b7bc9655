"""Triton's kernels on groups of rows, under the interpreter: seeds and first steps, and gradients, of each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_support  # noqa: F401  # before the kernels
from helpers import REGULARIZERS
from test_triton_backward import use_kernels
from triton_switching import switching_programs

from fusedreg.backends.triton.layer import backward, forward
from fusedreg.encoding import DIFFERENTIABLE, SAVE_GATES, TENSOR_ARGUMENTS, encode_options, hidden_differs
from fusedreg.layer import REVERSE
from fusedreg.testing import LayerArguments, LayerCase, implementation, make_arguments, run_layer

GROUPS, ROWS = 3, 2
SEEDS = torch.tensor([[7, 0], [-(2**62), 3], [2**40 + 1, 2**31]])
BY_ROW = ("initial_hidden", "initial_cell", "lengths")
BY_POSITION = ("input", "reset", "hidden_probe", "cell_probe")


def case_of(name: str, **changes: Any) -> LayerCase:
    case = LayerCase(name, steps=3, rows=GROUPS * ROWS, regularization=REGULARIZERS[name], ragged=True, resets=True)
    return replace(case, **changes)


def grouped(case: LayerCase) -> LayerArguments:
    """A case's arguments with a seed for each group; all rows share the weights, and so their mask."""
    return make_arguments(case, 0)._replace(seed=SEEDS if case.options.draws else None)


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("everything", "step", {}),
        ("everything", "persistent", {}),
        ("everything_untied", "step", {"direction": REVERSE, "proj_size": 4, "recompute": True}),
        ("everything_layer_norm", "persistent", {"direction": REVERSE}),
    ],
)
def test_each_group_draws_as_the_reference_says(
    name: str, kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name, **changes)
    use_kernels(monkeypatch, persistent=kind == "persistent", programs=2)
    arguments = grouped(case)
    with switching_programs(seed=3):
        ours = run_layer(implementation("triton"), case, arguments)
    exact = run_layer(implementation("reference"), case, arguments)
    for key, value in exact.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def gradients(case: LayerCase, arguments: LayerArguments, groups: int) -> dict[str, torch.Tensor]:
    """Every gradient that the backward operator gives, by name."""
    tensors = arguments.tensors()
    rates, options, eps = encode_options(case.options, SAVE_GATES)
    options = [*options[:14], groups]
    output, _, _, cells, hidden, *saved = forward(*tensors, rates, options, eps)
    carried = hidden if hidden_differs(rates, options) else output
    incoming = [arguments.gradients[key] for key in ("output", "final_hidden", "final_cell", "cells")]
    needed = [tensors[place] is not None for place in DIFFERENTIABLE]
    found = backward(*incoming, *tensors, cells, carried, *saved, rates, options, eps, needed)
    named = zip((TENSOR_ARGUMENTS[place] for place in DIFFERENTIABLE), found, needed, strict=True)
    return {name: value for name, value, wanted in named if wanted}


def group_of(arguments: LayerArguments, group: int) -> LayerArguments:
    """One group's rows of a call, as a call of their own."""
    rows = slice(group * ROWS, (group + 1) * ROWS)

    def cut(names: Sequence[str], at: Any) -> dict[str, Any]:
        present = ((name, getattr(arguments, name)) for name in names)
        return {name: value[at] for name, value in present if value is not None}

    by_position = (slice(None), rows)
    incoming = {key: value[by_position if value.dim() == 3 else rows] for key, value in arguments.gradients.items()}
    return arguments._replace(
        **cut(("initial_hidden", "initial_cell", "lengths"), rows),
        **cut(("input", "reset"), by_position),
        seed=None if arguments.seed is None else arguments.seed[group : group + 1],
        gradients=incoming,
        probes=None if arguments.probes is None else tuple(probe[by_position] for probe in arguments.probes),  # type: ignore[arg-type, union-attr, index]
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("everything", {"bias": False}),
        ("everything_untied", {"proj_size": 4, "probes": True, "dtype": torch.bfloat16}),
        ("everything_layer_norm", {}),
        ("everything_batch_norm", {"training": False}),
    ],
)
def test_parameters_have_a_gradient_for_each_group(name: str, changes: dict[str, Any]) -> None:
    case = case_of(name, **changes)
    if case.regularization.weight_dropout and case.training:  # one mask, that of the first group's seed
        case = replace(case, regularization=replace(case.regularization, weight_dropout=0.0))
    arguments = grouped(case)
    together = gradients(case, arguments, GROUPS)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if case.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for group in range(GROUPS):
        alone = gradients(replace(case, rows=ROWS), group_of(arguments, group), 1)
        rows = slice(group * ROWS, (group + 1) * ROWS)
        for key, value in alone.items():
            if key in BY_POSITION:
                ours = together[key][:, rows]
            else:
                ours = together[key][rows if key in BY_ROW else group]
            torch.testing.assert_close(ours, value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def test_groups_share_one_weight_mask() -> None:
    case = case_of("weight")
    arguments = grouped(case)
    together = gradients(case, arguments, GROUPS)["weight_hh"]
    kept = together != 0
    assert torch.equal(kept.any(0), kept[0] | kept[1] | kept[2])
    everywhere = gradients(case, arguments._replace(seed=SEEDS[0, 0]), 1)["weight_hh"]
    assert torch.equal(kept.any(0), everywhere != 0)
    torch.testing.assert_close(together.sum(0), everywhere, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("everything", 4, "divides the 6 rows"),
        ("batch_norm", 3, "batch norm in training"),
        ("everything", 0, "divides"),
    ],
)
def test_groups_that_cannot_be_are_refused(name: str, groups: int, message: str) -> None:
    case = case_of(name)
    seed = torch.zeros(groups, 2, dtype=torch.int64)
    rates, options, eps = encode_options(case.options, SAVE_GATES)
    with pytest.raises(RuntimeError, match=message):
        forward(*make_arguments(case, 0)._replace(seed=seed).tensors(), rates, options, eps)
    if groups:
        with pytest.raises(RuntimeError, match=message):
            gradients(case, make_arguments(case, 0), groups)
