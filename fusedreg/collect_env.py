"""What a bug report needs: ``python -m fusedreg.collect_env`` prints it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from fusedreg import backends
from fusedreg._version import __version__
from fusedreg.backends import cpu, cuda


def processor() -> str:
    """The processor's own name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_processors() -> int:
    """The processors that this process may run on, which a container or ``taskset`` may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def accelerators() -> str:
    """The GPUs that torch sees, or that it sees none."""
    if not torch.cuda.is_available():
        return "none that torch can use"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{device.name} (compute capability {device.major}.{device.minor})" for device in devices)


def triton_version() -> str:
    """The version of the package triton, without importing it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _extension(path: Path) -> str:
    return f"{path} ({path.stat().st_size // 1024} KiB)" if path.exists() else f"{path} (absent)"


def collect() -> dict[str, str]:
    """Names and values, in the order in which they are printed.

    Example:
        >>> from fusedreg.collect_env import collect
        >>> "torch" in collect()
        True
    """
    states = {name: backends.availability(name) for name in backends.OPERATORS}
    return {
        "fusedreg": __version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})",
        "python": f"{sys.version.split()[0]} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processor": f"{processor()}, {usable_processors()} usable, {platform.machine()}",
        "torch threads": f"{torch.get_num_threads()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "torch's own set": torch.backends.cpu.get_cpu_capability(),
        "accelerators": accelerators(),
        "triton": triton_version(),
        "CPU extension": _extension(cpu.library_path()),
        "CUDA extension": _extension(cuda.library_path()),
        **{
            f"backend {name}": "available" if state else f"not available: {state.reason}"
            for name, state in states.items()
        },
        "instruction sets": ", ".join(cpu.instruction_sets()) or "none",
    }


def main() -> None:
    """Print the report, a line a fact, and what ``backend="auto"`` does on the CPU and on a GPU."""
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    print()
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            print(backends.explain(device, dtype))


if __name__ == "__main__":
    main()
