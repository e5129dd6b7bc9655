"""What the results were measured on, and the rates that bound them."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import spread

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
            [*command, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!examples/results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changed.strip() else "")


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # says what it was built for, as its metadata need not: 2.11.0+cu130
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
    threads: int
    gflops: float
    fma_gflops: float
    fraction: float
    fraction_quartiles: list[float]


def fma_rate(seconds: float = 0.05) -> float | None:
    """The FMA rate of torch's threads now, or ``None`` where it cannot be measured."""
    operator = _private_operator("_measure_fma_rate")
    return None if operator is None else float(operator(torch.get_num_threads(), seconds))


def loop_rates(sizes: Iterable[tuple[int, int, int]], pairs: int = 7) -> list[dict[str, Any]]:
    """The rate of the recurrent loop for each ``(T, B, H)``, on one thread and on all; empty without the kernels.

    What is timed is the public layer's forward under ``no_grad`` with an input of one feature: its input product is
    ``1/H`` of the loop's, and is not counted. Packing the recurrent weight, the cells, the output's allocation and the
    call itself are all in the time, so the products alone are somewhat faster than what is stated. The FMA rate is
    measured right before and right after each pass and the pass compared with the mean of both, since a machine's clock
    and neighbours change; the median of these ratios is given.
    """
    from benchmarks.variants import Unavailable, fusedreg_class, require_backend

    rates: list[dict[str, Any]] = []
    try:
        require_backend("cpu")
        layer = fusedreg_class("LSTM")
    except Unavailable:
        return rates
    if fma_rate(1e-3) is None:
        return rates
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            for steps, rows, hidden_size in sizes:
                torch.manual_seed(0)
                lstm, values = layer(1, hidden_size, backend="cpu"), torch.randn(steps, rows, 1)
                flops = 8.0 * steps * rows * hidden_size * hidden_size
                rates.append(asdict(_loop_rate(lstm, values, (steps, rows, hidden_size), flops, pairs)))
    finally:
        torch.set_num_threads(before)
    return rates


@torch.no_grad()
def _loop_rate(
    lstm: Callable[..., Any], values: torch.Tensor, size: tuple[int, int, int], flops: float, pairs: int
) -> LoopRate:
    """Rate, loop, rate, loop, …, rate on torch's present threads."""
    steps, rows, hidden_size = size
    threads = torch.get_num_threads()
    for _ in range(2):
        lstm(values)
    peaks = [fma_rate() or math.nan]
    reached = []
    for _ in range(pairs):
        begin = time.perf_counter()
        lstm(values)
        reached.append(flops / (time.perf_counter() - begin) / 1e9)
        peaks.append(fma_rate() or math.nan)
    fraction = spread([2.0 * one / (peaks[at] + peaks[at + 1]) for at, one in enumerate(reached)])
    name = f"T{steps} B{rows} H{hidden_size}, {threads} thread{'s' if threads > 1 else ''}"
    rate, peak = statistics.median(reached), statistics.median(peaks)
    return LoopRate(
        name, steps, rows, hidden_size, threads, rate, peak, fraction.median, [fraction.lower, fraction.upper]
    )
