"""Numbers before speed: a variant is compared with the truth on a case's own sizes before it is timed.

The plain layer is held to ``nn.LSTM`` in float64; a regularised layer to the float64 reference, with the error
budget of :mod:`fusedreg.testing`. Sequences are cut to a few steps so that a check costs seconds. The plain layer keeps
its width; a regularised one is cut to ``width`` where a preset says so, since the reference draws the masks of millions
of weights slowly (what is left over by blocks of 128 units stays), and :func:`check_finite` sees the full width.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.registry import EAGER_PLAIN, TORCH, Case, Variant
from benchmarks.variants import (
    Runnable,
    Unavailable,
    chosen_backend,
    forced_tier,
    fusedreg_keywords,
    make_inputs,
    make_runnable,
)

PLAIN_STEPS, PLAIN_FLOP, LAYER_STEPS = 16, 1e10, 3
WIDTH_BLOCK = 128
# With two or three rows a batch norm amplifies rounding so much that two correct programs differ.
BATCH_NORM_ROWS = 8
# Drawing a weight's mask in the reference takes about as long as this many operations.
SEEDS_AT_LEAST, SEEDS_AT_MOST, FLOP_FOR_SEEDS, FLOP_FOR_WEIGHT = 2, 8, 2e9, 1200


@dataclass(frozen=True)
class Check:
    """Whether a variant's numbers are right, and in words how that was found out."""

    passed: bool
    detail: str


def _values(runnable: Runnable) -> dict[str, Tensor]:
    """Output and every gradient by name, in float64 on the CPU."""
    output = runnable.output()
    names = ["input", *(name for name, _ in runnable.module.named_parameters())]
    found = {"output": output.detach()}
    found |= {f"grad {name}": value for name, value in zip(names, runnable.gradients(output), strict=True)}
    return {name: value.double().cpu() for name, value in found.items()}


def _errors(values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius errors; infinite where a value is not finite or not there."""
    errors = {}
    for name, expected in exact.items():
        if name not in values or values[name].shape != expected.shape:
            errors[name] = float("inf")
            continue
        error, size = (torch.linalg.vector_norm(one).item() for one in (values[name] - expected, expected))
        # A single step from a zero state has no gradient of the recurrent weight: what is zero has to be zero.
        error = error / size if size > 0.0 else 0.0 if error == 0.0 else float("inf")
        errors[name] = error if error == error else float("inf")
    return errors


def check_plain(variant: Variant, case: Case, device: str, dtype: torch.dtype, backend: str = "") -> Check:
    """``variant`` without regularisers against ``nn.LSTM`` in float64 on the same rounded inputs and weights.

    Allowed, per tensor: twice the larger of the errors that ``nn.LSTM`` and the eager loop make in ``dtype``.
    """
    affordable = max(2, int(PLAIN_FLOP / replace(case, steps=1).flops("training")))
    short = replace(case, steps=min(case.steps, PLAIN_STEPS, affordable), reset_rate=0.0)
    inputs = make_inputs(short, device, dtype)
    ours = make_runnable(variant, short, inputs, "training", backend=backend)
    truth = make_runnable(TORCH, short, inputs, "training")
    exact = _values(Runnable(truth.module.double(), inputs.double(), takes_reset=False))
    allowed = dict.fromkeys(exact, torch.finfo(dtype).eps / (1 if dtype.itemsize > 2 else 16))
    for other in (TORCH, EAGER_PLAIN):
        for name, error in _errors(_values(make_runnable(other, short, inputs, "training")), exact).items():
            allowed[name] = max(allowed[name], error)
    found = _errors(_values(ours), exact)
    wrong = [
        f"{name} {error:.1e}, allowed {2 * allowed[name]:.1e}"
        for name, error in found.items()
        if not error <= 2 * allowed[name]
    ]
    if wrong:
        return Check(False, "differs from nn.LSTM in float64: " + "; ".join(wrong))
    return Check(True, f"within twice the error of nn.LSTM against float64 (worst {max(found.values()):.1e})")


def cut_width(size: int, width: int | None) -> int:
    """``size``, or where it is above ``width`` and a block more, as many whole blocks and the same remainder."""
    if width is None or size < width + WIDTH_BLOCK:
        return size
    return width // WIDTH_BLOCK * WIDTH_BLOCK + size % WIDTH_BLOCK


def check_layer(
    variant: Variant, case: Case, device: str, dtype: torch.dtype, backend: str = "", width: int | None = None
) -> Check:
    """One layer with ``variant``'s options against the float64 reference, within the error budget."""
    try:
        from fusedreg.regularization import Regularization
        from fusedreg.testing import LayerCase, make_arguments
        from fusedreg.testing.budget import (
            PermutedSums,
            compare,
            eager_errors,
            implementation,
            run_layer,
        )

        reference, ours = implementation("reference"), implementation(chosen_backend(variant, backend, device))
    except (ImportError, ValueError, RuntimeError) as error:
        raise Unavailable(f"cannot be checked: {error}") from error
    rows = max(case.batch_size, BATCH_NORM_ROWS) if variant.norm == "batch" else case.batch_size
    short = replace(
        case,
        steps=min(case.steps, LAYER_STEPS),
        batch_size=rows,
        input_size=cut_width(case.input_size, width),
        hidden_size=cut_width(case.hidden_size, width),
    )
    # One layer and direction: as many seeds as the budget's definition asks for, where they are cheap.
    flops = replace(short, num_layers=1, bidirectional=False).flops("training")
    flops += FLOP_FOR_WEIGHT * 4 * short.hidden_size * (short.input_size + short.hidden_size)
    seeds = max(SEEDS_AT_LEAST, min(SEEDS_AT_MOST, int(FLOP_FOR_SEEDS / flops)))
    keywords = fusedreg_keywords(variant, short)
    keywords.pop("recompute", None)
    layer = LayerCase(
        variant.name,
        steps=short.steps,
        rows=short.batch_size,
        input_size=short.input_size,
        hidden_size=short.hidden_size,
        regularization=Regularization(**keywords),
        dtype=dtype,
        device=device,
        recompute=variant.recompute,
        return_cells=False,
        resets=short.reset_rate > 0.0,
        initial_state=short.initial_state,
        num_layers=max(case.num_layers, 2 if "dropout" in variant.rates else 1),
    )
    arguments = [make_arguments(layer, seed) for seed in range(seeds)]
    exact = [run_layer(reference, layer, each.to(torch.float64)) for each in arguments]
    orders = []
    for order in (nullcontext, PermutedSums):
        with order():
            orders.append([run_layer(reference, layer, each) for each in arguments])
    with forced_tier(variant.tier):
        runs = [run_layer(ours, layer, each) for each in arguments]
    report, faults = compare(runs, exact, eager_errors(orders, exact), dtype)
    over = [
        f"{name} {one.error:.1e}, allowed {one.budget:.1e}"
        for name, one in report.items()
        if not one.error <= one.budget
    ]
    if over or faults:
        return Check(False, "outside the error budget against the float64 reference: " + "; ".join(faults + over))
    at = f", at I{short.input_size} H{short.hidden_size}" if short.hidden_size != case.hidden_size else ""
    worst = max((one.error / one.budget for one in report.values()), default=0.0)
    return Check(True, f"within the error budget against the float64 reference (worst {worst:.0%} of it){at}")


def check_finite(runnable: Runnable) -> Check:
    """Every output and gradient of the very thing that will be timed is finite."""
    output = runnable.output()
    names = ["input", *(name for name, _ in runnable.module.named_parameters())]
    found = {f"grad {name}": value for name, value in zip(names, runnable.gradients(output), strict=True)}
    names = [name for name, value in {"output": output, **found}.items() if not bool(value.isfinite().all())]
    return Check(False, "not finite: " + ", ".join(names)) if names else Check(True, "finite")


def check(
    variant: Variant, case: Case, device: str, dtype: torch.dtype, backend: str = "", width: int | None = None
) -> Check:
    """The check that fits ``variant``. Baselines need none: ``nn.LSTM`` is the truth, the loop has tests of its own.

    Raises :class:`~benchmarks.variants.Unavailable` where the variant cannot be built or checked here.
    """
    if variant.implementation != "fusedreg":
        return Check(True, "a baseline")
    if not variant.rates and variant.norm is None:
        return check_plain(variant, case, device, dtype, backend)
    return check_layer(variant, case, device, dtype, backend, width)
