"""Triton's backward under its interpreter: every gradient against the float64 reference, within the error budget.

One seed of the kernel's is held against the largest error that the reference makes with any of several: the
interpreter is slow.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_support  # noqa: F401  # before the kernels
from helpers import BATCH_NORMS, LAYER_NORMS, REGULARIZERS
from triton_switching import switching_programs

from fusedreg.backends.triton import backward_configuration, backward_loop, backward_step, configurations
from fusedreg.layer import FORWARD, REVERSE
from fusedreg.regularization import BatchNorm
from fusedreg.testing import (
    LayerCase,
    PermutedSums,
    check_report,
    compare,
    eager_errors,
    implementation,
    make_arguments,
    run_layer,
)

SEEDS = 4
MODES: dict[str, dict[str, object]] = {
    "ragged": {"ragged": True, "resets": True},
    "reverse": {"direction": REVERSE, "ragged": True, "resets": True},
    "recompute": {"recompute": True, "ragged": True, "resets": True},
    "evaluation": {"training": False, "ragged": True},
}


def case_of(name: str, mode: str = "ragged", **changes: object) -> LayerCase:
    regularization = REGULARIZERS[name]
    case = LayerCase(f"{name}-{mode}", steps=3, regularization=regularization)
    if isinstance(regularization.norm, BatchNorm):
        case = replace(case, steps=4, rows=12, hidden_size=10)
    return replace(case, **{**MODES[mode], **changes})  # type: ignore[arg-type]


@functools.cache
def expected(case: LayerCase) -> tuple[Any, dict[str, torch.Tensor], dict[str, float]]:
    """The first seed's arguments and float64 values, and each tensor's largest error in the working type."""
    reference, eager = implementation("reference"), {}
    for seed in reversed(range(SEEDS)):
        arguments = make_arguments(case, seed)
        exact = run_layer(reference, case, arguments.to(torch.float64))
        for order in (contextlib.nullcontext, PermutedSums):
            with order():
                run = run_layer(reference, case, arguments)
            for name, error in eager_errors([[run]], [exact]).items():
                eager[name] = max(error, eager.get(name, 0.0))
    return arguments, exact, eager


def check(case: LayerCase) -> None:
    arguments, exact, eager = expected(replace(case, recompute=False))
    run = run_layer(implementation("triton"), case, arguments)
    report, faults = compare([run], [exact], eager, case.dtype)
    check_report(case.id, report, faults)


def use_kernels(monkeypatch: pytest.MonkeyPatch, *, persistent: bool, programs: int = 1) -> None:
    limits = configurations.Device(programs, 10**6)
    monkeypatch.setattr(configurations, "device_limits", lambda device: limits)
    monkeypatch.setattr(backward_configuration, "_tiles", lambda *of: (16, 8))
    chosen = functools.partial(backward_configuration.backward_configuration, persistent=persistent)
    monkeypatch.setattr(backward_loop, "backward_configuration", chosen)


EVERYTHING = ("everything", "everything_untied", "everything_batch_norm", "everything_layer_norm")
# What "everything" has in no form, and each norm's sites, each of which is compiled in or out.
ALONE = [
    "hidden",
    "input_untied",
    "update_sequence",
    "zoneout_candidate",
    "candidate_dropped",
    "weight_row",
    *(name for name in (*BATCH_NORMS, *LAYER_NORMS) if name.rpartition("_")[2] not in ("norm", "terms")),
]


@pytest.mark.parametrize("name", ALONE)
def test_each_option(name: str) -> None:
    check(case_of(name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EVERYTHING)
def test_everything(name: str, mode: str) -> None:
    check(case_of(name, mode))


@pytest.mark.parametrize("mode", ["reverse", "recompute"])
def test_nothing(mode: str) -> None:
    check(case_of("none", mode))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in EVERYTHING), ("everything", torch.float16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_16_bit_types(name: str, dtype: torch.dtype) -> None:
    check(case_of(name, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("everything_untied", {"rows": 1, "hidden_size": 1, "input_size": 1}),
        ("everything_untied", {"rows": 18, "hidden_size": 37, "input_size": 131}),  # several tiles of units
        ("everything_layer_norm", {"rows": 66, "hidden_size": 17}),  # and of rows
        ("everything_batch_norm", {"rows": 66, "hidden_size": 17}),
    ],
)
def test_shapes(name: str, changes: dict[str, object]) -> None:
    check(case_of(name, "reverse", steps=2, **changes))


@pytest.mark.parametrize("name", ["everything", "everything_untied", "everything+proj"])
def test_columns_split_between_warps(name: str) -> None:
    name, _, projected = name.partition("+")
    case = case_of(name, dtype=torch.bfloat16, rows=3, steps=2, hidden_size=140, proj_size=70 if projected else 0)
    check(case)


def test_optional_arguments() -> None:
    check(case_of("everything", bias=False, initial_state=False, return_cells=False))


@pytest.mark.parametrize("name", ["none", "everything_layer_norm"])
def test_persistent_in_one_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, persistent=True)
    check(case_of(name, "reverse"))


@pytest.mark.parametrize(
    ("name", "rows", "hidden_size", "programs"),
    [
        ("everything", 5, 20, 3),
        ("everything_untied", 20, 12, 4),  # two groups of rows that do not wait for each other
        ("everything", 20, 20, 2),  # several tiles a program
        ("everything_batch_norm", 12, 20, 3),
        ("everything_layer_norm", 5, 20, 3),
    ],
)
@pytest.mark.parametrize("held", [True, False], ids=["held", "streamed"])
def test_persistent_in_several_programs(
    name: str, rows: int, hidden_size: int, programs: int, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, persistent=True, programs=programs)
    if held:  # where a program has one tile; the interpreter has but one precision
        monkeypatch.setattr(backward_configuration, "product_precision", lambda dtype: "tf32")
    with switching_programs(seed=rows + hidden_size) as used:
        check(case_of(name, rows=rows, hidden_size=hidden_size, steps=3))
    assert used.largest_grid == programs


def test_the_harness_finds_a_missing_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    @triton.jit
    def wait_for(arrivals, target):  # type: ignore[no-untyped-def]
        pass

    use_kernels(monkeypatch, persistent=True, programs=3)
    monkeypatch.setattr(backward_step, "wait_for", wait_for)
    case = case_of("none", rows=5, hidden_size=20)
    with switching_programs(seed=1), pytest.raises(AssertionError, match="outside the error budget"):
        check(case)


def gradients(case: LayerCase, arguments: Any) -> dict[str, torch.Tensor]:
    run = run_layer(implementation("triton"), case, arguments)
    return {name: value for name, value in run.items() if name.startswith("grad ")}


@pytest.mark.parametrize(
    ("name", "direction"),
    [("everything_untied", FORWARD), ("everything_batch_norm", REVERSE), ("everything_layer_norm", FORWARD)],
)
def test_padding_may_hold_anything(name: str, direction: int) -> None:
    case = case_of(name, direction=direction)
    arguments = make_arguments(case, 0)
    assert arguments.lengths is not None
    padding = torch.arange(case.steps).unsqueeze(1) >= arguments.lengths
    clean = gradients(case, arguments)
    incoming = {
        key: value.masked_fill(padding.unsqueeze(-1), float("nan")) if key in ("output", "cells") else value
        for key, value in arguments.gradients.items()
    }
    spoilt = arguments._replace(
        input=arguments.input.masked_fill(padding.unsqueeze(-1), float("nan")), gradients=incoming
    )
    assert (clean["grad input"][padding] == 0).all()
    for key, value in gradients(case, spoilt).items():
        assert torch.equal(value, clean[key]), key


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_two_backwards_over_one_graph_are_equal_and_write_nothing_saved(recompute: bool) -> None:
    case = case_of("everything_layer_norm", recompute=recompute)
    arguments = make_arguments(case, 0)
    leaves = [arguments.input.requires_grad_(), *(value.requires_grad_() for value in arguments.parameters[:4])]
    result = implementation("triton")(
        arguments.input,
        arguments.initial_hidden,
        arguments.initial_cell,
        arguments.parameters,
        case.options,
        lengths=arguments.lengths,
        reset=arguments.reset,
        seed=arguments.seed,
    )
    saved = result.output.grad_fn.saved_tensors
    before = [value.clone() if value is not None else None for value in saved]
    first = torch.autograd.grad(result.output.sum(), leaves, retain_graph=True)
    for one, two in zip(saved, before, strict=True):
        assert one is None or torch.equal(one, two)
    second = torch.autograd.grad(result.output.sum(), leaves)
    kept = {value.untyped_storage().data_ptr() for value in saved if value is not None}
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
        assert one.untyped_storage().data_ptr() not in kept
    assert len({value.untyped_storage().data_ptr() for value in first}) == len(first)


def test_only_what_is_needed() -> None:
    """A frozen layer passes on the gradient of its input alone."""
    case = case_of("everything_batch_norm")
    arguments = make_arguments(case, 0)
    x = arguments.input.clone().requires_grad_()
    keywords = {"lengths": arguments.lengths, "reset": arguments.reset, "seed": arguments.seed}
    states = (arguments.initial_hidden, arguments.initial_cell)
    grads = []
    for name in ("triton", "reference"):
        result = implementation(name)(
            x, *states, arguments.parameters, case.options, running=arguments.running, **keywords
        )
        grads.append(torch.autograd.grad(result.output.sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_tiles_that_cover_any_shape() -> None:
    """The table's tiles are powers of two that leave no unit or row out, and a program has two of them at most."""
    for rows in (1, 5, 16, 64, 100, 512):
        for hidden_size in (1, 17, 128, 300, 1024, 3000):
            for norm in (0, 1, 2):
                tile_rows, units = backward_configuration._tiles(rows, hidden_size, 132, norm)
                assert tile_rows & (tile_rows - 1) == 0
                assert units & (units - 1) == 0
                assert units >= 8
                assert tile_rows >= 16
