"""What the results were measured on, and the rates that bound them."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import Case

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "fusedreg", "triton", "numpy")


def cpu_model() -> str:
    """The processor's name, as the system states it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """What torch was able to use, and what fusedreg's kernels use: for example ``AVX512``."""
    return torch.backends.cpu.get_cpu_capability()


def commit() -> str:
    """The checked-out commit, with ``-dirty`` if the sources differ from it, or ``unknown``."""
    command = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        # Results are written by the run itself, so they do not make its sources dirty.
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--", ".", ":!benchmarks/results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changed.strip() else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: str) -> dict[str, Any]:
    """Everything about the machine that a reader of the results needs."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "device_type": "cuda" if cuda else "cpu",
        "cpu": cpu_model(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _private_operator(name: str) -> Callable[..., Any] | None:
    """A private operator of the built extension, or ``None`` where the package or the operator is absent."""
    try:
        import fusedreg  # noqa: F401  (loads the extension)

        operator: Callable[..., Any] = getattr(torch.ops.fusedreg, name)
    except (ImportError, AttributeError):
        return None
    return operator


def fma_rates(seconds: float = 0.3) -> dict[str, float | None]:
    """The rate of fused multiply-adds in GFLOP/s, of one thread and of all that torch uses.

    Asked of ``torch.ops.fusedreg._measure_fma_rate(threads, seconds)``; ``None`` where there is none.
    """
    operator = _private_operator("_measure_fma_rate")
    if operator is None:
        return {"one_thread": None, "all_threads": None}
    return {
        "one_thread": float(operator(1, seconds)),
        "all_threads": float(operator(torch.get_num_threads(), seconds)),
    }


@dataclass(frozen=True)
class LoopRate:
    """The loop alone, forward: GFLOP/s over ``2 T B 4H H`` operations, and the fraction of the FMA rate."""

    case: str
    steps: int
    batch_size: int
    hidden_size: int
    gflops: float
    fma_gflops: float | None
    fraction: float | None


def loop_rates(cases: Iterable[Case], repeats: int = 5) -> list[dict[str, Any]]:
    """The recurrent loop's own rate for the cases with ``B >= 32`` and ``H >= 512``; empty without the operator.

    ``torch.ops.fusedreg._time_loop(steps, rows, hidden_size) -> float`` gives the seconds of one pass of the forward
    loop in float32: the weights packed and the input product done before, nothing kept for a backward. The FMA rate
    is measured beside each of the ``repeats``, since a machine's clock and neighbours change; medians are given.
    """
    operator, fma = _private_operator("_time_loop"), _private_operator("_measure_fma_rate")
    rates: list[dict[str, Any]] = []
    if operator is None:
        return rates
    for case in cases:
        if case.batch_size < 32 or case.hidden_size < 512:
            continue
        size = case.hidden_size
        flops = 8.0 * case.steps * case.batch_size * size * size
        peaks: list[float] = []
        reached: list[float] = []
        for _ in range(repeats):
            if fma is not None:
                peaks.append(float(fma(torch.get_num_threads(), 0.05)))
            reached.append(flops / float(operator(case.steps, case.batch_size, size)) / 1e9)
        peak = statistics.median(peaks) if peaks else None
        fraction = statistics.median(one / two for one, two in zip(reached, peaks, strict=True)) if peaks else None
        rate = LoopRate(case.name, case.steps, case.batch_size, size, statistics.median(reached), peak, fraction)
        rates.append(asdict(rate))
    return rates
