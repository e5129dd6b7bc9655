"""The CUDA kernels on an emulated device: the sources of ``csrc/cuda`` as C++, every CUDA thread a fiber of the host.

``make test`` builds the library. It registers the operators of the CUDA extension for tensors on the CPU, under a
namespace of its own, so that it is tested as a backend like any other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedreg import ops

OPERATORS = "fusedreg_emulated::lstm_layer"
LIBRARY = Path(__file__).resolve().parent.parent / "build" / "cuda_emulation" / "libfusedreg_cuda_emulated.so"
TIERS = ("step", "grid", "cluster")
# Multiprocessors, shared bytes a block can have, compute capability: an H200 that has lost most of its processors, so
# that small layers already fill it.
DEVICE = (16, 227 * 1024, 9, 0)


def _load() -> str | None:
    """Loads the library; why that is impossible, or ``None``."""
    if not hasattr(torch.ops.fusedreg_emulated, "lstm_layer_forward"):
        if not LIBRARY.exists():
            return f"{LIBRARY} is not built; run `python tools/cuda_build.py emulation`, which `make test` does"
        torch.ops.load_library(str(LIBRARY))
    ops.register_operators(OPERATORS)
    return None


_missing = _load()

# Marks a test that needs the library.
emulated = pytest.mark.skipif(_missing is not None, reason=f"not run: {_missing}")

# The layer by the emulated operators, with the signature of ``reference.lstm_layer``.
lstm_layer = functools.partial(ops.lstm_layer, operators=OPERATORS)


@contextlib.contextmanager
def use(tier: str, device: tuple[int, int, int, int] = DEVICE, schedule: int = 1) -> Iterator[None]:
    """Within the block, every layer runs on this tier of this device, threads resumed in the order of ``schedule``."""
    library = torch.ops.fusedreg_emulated
    library._set_device(list(device))
    library._set_schedule(schedule)
    assert library._set_tier(tier)
    try:
        yield
    finally:
        assert library._set_tier("auto")
        library._set_device(list(DEVICE))
