"""The error budget: a backend against the float64 reference, and the reference in the working type beside it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedreg.layer import LayerParameters, LayerResult, compute_dtype
from fusedreg.regularization import Regularization
from fusedreg.testing.cases import LayerArguments, LayerCase, make_arguments

LayerImplementation = Callable[..., LayerResult]

POOLED_BELOW = 64
"""Tensors with fewer elements than this are compared over all seeds together."""
SEEDS = 8
CELL_FLOOR_16_BIT = 1e-5


class PermutedSums(TorchDispatchMode):
    """The second order of summation: every product and reduction adds its terms in a fixed shuffled order.

    Acting below autograd, it reorders the backward's sums as well, and leaves units and rows (which key the
    masks) where they are.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        arguments = list(args)
        if func in (aten.mm.default, aten.bmm.default):
            arguments[0], arguments[1] = _shuffled(args[0], -1), _shuffled(args[1], -2)
        elif func in (aten.addmm.default, aten.baddbmm.default):
            arguments[1], arguments[2] = _shuffled(args[1], -1), _shuffled(args[2], -2)
        elif func in (aten.sum.dim_IntList, aten.mean.dim, aten.var.correction, aten.var_mean.correction):
            tensor = args[0]
            dimensions = args[1] if len(args) > 1 and args[1] is not None else range(tensor.dim())
            for dimension in dimensions:
                tensor = _shuffled(tensor, dimension)
            arguments[0] = tensor
        elif func in (aten.sum.default, aten.mean.default):
            arguments[0] = _shuffled(args[0].reshape(-1), 0)
        return func(*arguments, **(kwargs or {}))


def _shuffled(tensor: Tensor, dimension: int) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    order = _permutation(tensor.shape[dimension])
    return tensor.index_select(dimension % tensor.dim(), order.to(tensor.device))


@functools.lru_cache(maxsize=1024)
def _permutation(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Float32 products in full precision, on both sides of a comparison, whatever the process has allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def run_layer(
    implement: LayerImplementation, case: LayerCase, arguments: LayerArguments, *, backward: bool = True
) -> dict[str, Tensor]:
    """Call a layer and its backward, and name everything that came out.

    Results are named ``output``, ``final_hidden``, ``final_cell``, ``cells`` and ``input_statistics`` (and so on);
    the gradient of an argument is ``grad`` and its name, zero where the layer says it does not depend on it.
    """
    leaves = {
        name: value.detach().clone().requires_grad_(backward)
        for name, value in (
            ("input", arguments.input),
            ("initial_hidden", arguments.initial_hidden),
            ("initial_cell", arguments.initial_cell),
            *zip(("hidden_probe", "cell_probe"), arguments.probes or (None, None), strict=True),
            *arguments.parameters._asdict().items(),
        )
        if value is not None
    }
    probes = {"probes": (leaves["hidden_probe"], leaves["cell_probe"])} if arguments.probes is not None else {}
    with true_float32():
        result = implement(
            leaves["input"],
            leaves.get("initial_hidden"),
            leaves.get("initial_cell"),
            LayerParameters(*(leaves.get(name) for name in LayerParameters._fields)),  # type: ignore[arg-type]
            case.options,
            lengths=arguments.lengths,
            reset=arguments.reset,
            seed=arguments.seed,
            running=arguments.running,
            **probes,
        )
        named = {name: getattr(result, name) for name in arguments.gradients if getattr(result, name) is not None}
        values = {name: value.detach() for name, value in named.items()}
        if result.statistics is not None:
            for name, value in result.statistics._asdict().items():
                if value is not None:
                    values[f"{name}_statistics"] = value.detach()
        if backward:
            gradients = torch.autograd.grad(
                list(named.values()),
                list(leaves.values()),
                [arguments.gradients[name] for name in named],
                allow_unused=True,
            )
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                values[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return values


class Measurement(NamedTuple):
    """One tensor of one case: the backend's relative error, the eager one, and what the backend is allowed."""

    error: float
    eager: float
    budget: float


class Baseline(NamedTuple):
    """What a case is compared with: per seed the arguments and the float64 values, and per tensor the eager error."""

    arguments: tuple[LayerArguments, ...]
    values: tuple[dict[str, Tensor], ...]
    eager: dict[str, float]


def baseline(case: LayerCase, seeds: int = SEEDS) -> Baseline:
    """The float64 reference and the eager error of a case, computed once for all backends and for recompute."""
    return _baseline(replace(case, recompute=False), seeds)


@functools.lru_cache(maxsize=256)
def _baseline(case: LayerCase, seeds: int) -> Baseline:
    reference = implementation("reference")
    arguments = tuple(make_arguments(case, seed) for seed in range(seeds))
    orders = []
    with one_thread(case.rows * case.hidden_size < 2**13):
        values = tuple(run_layer(reference, case, each.to(torch.float64)) for each in arguments)
        for order in (contextlib.nullcontext, PermutedSums):
            with order():
                orders.append([run_layer(reference, case, each) for each in arguments])
    return Baseline(arguments, values, eager_errors(orders, values))


@contextlib.contextmanager
def one_thread(when: bool = True) -> Iterator[None]:
    """Torch on one thread. On a busy machine, a team's barriers cost a hundred times what a small product does."""
    before = torch.get_num_threads()
    if when:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def eager_errors(orders: Sequence[Sequence[dict[str, Tensor]]], exact: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Per tensor, the largest relative error of the eager runs; ``orders`` holds one list of seeds per order."""
    return {
        name: max(
            relative_error([(run[name], values[name]) for run, values in zip(runs, exact, strict=True)])
            for runs in orders
        )
        for name in exact[0]
    }


def relative_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The relative Frobenius norm of ``value - reference``: the largest of the pairs', pooled where they are small.

    A NaN or infinity in ``value`` gives an infinite error, and so does any difference from an all-zero reference.
    """
    squares = []
    for value, expected in pairs:
        difference = (value.double() - expected).square().sum().item()
        squares.append((difference if math.isfinite(difference) else math.inf, expected.square().sum().item()))
    if pairs and pairs[0][1].numel() < POOLED_BELOW:
        squares = [(sum(one for one, _ in squares), sum(two for _, two in squares))]
    ratios = [0.0 if one == 0.0 else math.sqrt(one / two) if two > 0.0 else math.inf for one, two in squares]
    return max(ratios, default=0.0)


def error_floor(name: str, dtype: torch.dtype) -> float:
    """What is added to the eager error before doubling it, for one tensor of a run in ``dtype``."""
    if dtype.itemsize > 2:
        return torch.finfo(dtype).eps
    return CELL_FLOOR_16_BIT if name in ("final_cell", "cells") else torch.finfo(dtype).eps / 16


def compare(
    runs: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]], eager: dict[str, float], dtype: torch.dtype
) -> tuple[dict[str, Measurement], list[str]]:
    """A backend's runs against the exact ones, seed by seed, given the eager error of each tensor.

    Returns each tensor's measurement, and what is wrong beside the size of errors: tensors that are missing, of
    the wrong shape or type, or not zero where the exact value is zero.
    """
    faults: list[str] = []
    report: dict[str, Measurement] = {}
    for name, expected in exact[0].items():
        if any(name not in run for run in runs):
            faults.append(f"{name}: missing")
            continue
        if runs[0][name].shape != expected.shape:
            faults.append(f"{name}: shape {tuple(runs[0][name].shape)}, expected {tuple(expected.shape)}")
            continue
        if runs[0][name].dtype != expected_dtype(name, dtype):
            faults.append(f"{name}: {runs[0][name].dtype}, expected {expected_dtype(name, dtype)}")
        pairs = [(run[name], values[name]) for run, values in zip(runs, exact, strict=True)]
        wrong = sum(int((value[zero == 0] != 0).sum().item()) for value, zero in pairs)
        if wrong:
            faults.append(f"{name}: {wrong} elements are not zero where the reference is exactly zero")
        budget = 2.0 * (eager[name] + error_floor(name, dtype))
        report[name] = Measurement(relative_error(pairs), eager[name], budget)
    extra = sorted(set(runs[0]) - set(exact[0]))
    return report, faults + [f"{name}: not among the reference's results" for name in extra]


def measure_errors(
    implement: LayerImplementation, case: LayerCase, *, seeds: int = SEEDS
) -> tuple[dict[str, Measurement], list[str]]:
    """Run a backend on every seed of a case and :func:`compare` it with the case's baseline."""
    base = baseline(case, seeds)
    runs = [run_layer(implement, case, each) for each in base.arguments]
    return compare(runs, base.values, base.eager, case.dtype)


def expected_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a named result of a layer whose input is ``dtype``."""
    if name.endswith("_statistics") or name in ("final_cell", "cells", "grad initial_cell", "grad cell_probe"):
        return compute_dtype(dtype)
    return dtype


def assert_within_budget(
    implement: LayerImplementation, case: LayerCase, *, seeds: int = SEEDS
) -> dict[str, Measurement]:
    """Raise an ``AssertionError`` with a table unless every tensor of the case is within the error budget.

    Args:
        implement: a callable with the signature of :func:`fusedreg.reference.lstm_layer`.
        case: shapes and options.
        seeds: how many random inputs; fewer than eight make the eager side's error an underestimate.

    Returns:
        Each tensor's measurement.
    """
    report, faults = measure_errors(implement, case, seeds=seeds)
    check_report(f"{case.id} ({_describe(case)})", report, faults)
    return report


def check_report(title: str, report: dict[str, Measurement], faults: list[str]) -> None:
    """Raise an ``AssertionError`` with the whole table unless there are no faults and all errors are in budget."""
    over = {name for name, one in report.items() if not one.error <= one.budget}
    if over or faults:
        table = [
            f"{'*' if name in over else ' '} {name:26} error {one.error:.3e}  eager {one.eager:.3e}  "
            f"allowed {one.budget:.3e}"
            for name, one in report.items()
        ]
        raise AssertionError("\n".join([f"{title} is outside the error budget:", *faults, *table]))


def _describe(case: LayerCase) -> str:
    """What of a case differs from the defaults, short enough for a message."""
    changed = [
        f"{one.name}={getattr(case, one.name)!r}"
        for one in fields(case)
        if one.name not in ("name", "regularization") and getattr(case, one.name) != one.default
    ]
    changed += [
        f"{one.name}={getattr(case.regularization, one.name)!r}"
        for one in fields(Regularization)
        if getattr(case.regularization, one.name) != one.default
    ]
    return ", ".join(changed) or "plain"


def implementation(backend: str) -> LayerImplementation:
    """The layer of a backend by name: ``"reference"``, or ``"cpu"``, ``"cuda"``, ``"triton"`` for its operators.

    Raises:
        ValueError: the name is not one of them.
        RuntimeError: the backend cannot be used here, with the reason.
    """
    from fusedreg.backends import availability
    from fusedreg.functional import LAYER_FUNCTIONS

    if backend not in LAYER_FUNCTIONS:
        names = ", ".join(repr(name) for name in LAYER_FUNCTIONS)
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    state = availability(backend)
    if not state:
        raise RuntimeError(f"backend: {backend!r} cannot be used here: {state.reason}")
    return LAYER_FUNCTIONS[backend]
