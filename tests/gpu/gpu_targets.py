"""What the GPU's tests run: each tier of the CUDA kernels, and Triton's, as layers that take tensors from the CPU.

Values, truth and eager error are computed on the CPU, once for all targets; a target moves the tensors to the GPU,
runs there and moves the results back, through autograd.

``FUSEDREG_GPU_TESTS`` names a stand-in, so that the tests themselves can be tried without a GPU: ``cpu`` (the CPU's
kernels for every target), ``emulated`` (the CUDA sources on an emulated device, where that library is built) or
``interpreter`` (Triton's, with ``TRITON_INTERPRET=1``). ``FUSEDREG_GPU_TARGET`` names one target, and the tests of the
others are left out: ``tools/gpu.py`` runs each in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedreg import ops
from fusedreg.backends import availability
from fusedreg.functional import LAYER_FUNCTIONS
from fusedreg.layer import LayerParameters, LayerResult, RunningStatistics

# What cuBLAS asks for in torch's deterministic mode, which tests/conftest.py switches on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

STAND_IN = os.environ.get("FUSEDREG_GPU_TESTS", "")
CHOSEN = os.environ.get("FUSEDREG_GPU_TARGET", "")
EMULATED = Path(__file__).resolve().parents[2] / "build" / "cuda_emulation" / "libfusedreg_cuda_emulated.so"
DEVICE = torch.device("cpu") if STAND_IN else torch.device("cuda")


def missing_device() -> str | None:
    """Why the GPU's tests cannot run here, or ``None``."""
    if STAND_IN not in ("", "cpu", "emulated", "interpreter"):
        return f"FUSEDREG_GPU_TESTS: expected cpu, emulated or interpreter, got {STAND_IN!r}"
    if STAND_IN == "emulated":
        if not EMULATED.exists():
            return f"the emulated library {EMULATED} is not built"
        if not hasattr(torch.ops.fusedreg_emulated, "lstm_layer_forward"):
            torch.ops.load_library(str(EMULATED))
        ops.register_operators("fusedreg_emulated::lstm_layer")
        return None
    if STAND_IN or torch.cuda.is_available():
        return None
    return "torch sees no CUDA device"


def to_device(value: Any) -> Any:
    """The tensor, or the tensors of a tuple, on the device under test."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if type(value) is tuple:
        return tuple(map(to_device, value))
    if isinstance(value, (LayerParameters, RunningStatistics)):
        return type(value)(*(to_device(part) for part in value))
    return value


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return type(value)(*(_to_cpu(part) for part in value)) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Target:
    """Kernels under test: a backend of the GPU, and of the CUDA kernels a tier, or ``""`` for their own choice."""

    name: str
    backend: str
    tier: str = ""

    def unavailable(self) -> str | None:
        """Why these kernels cannot be used here at all, or ``None``."""
        if STAND_IN == "cpu":
            state = availability("cpu")
        elif STAND_IN == "emulated" and self.backend == "cuda":
            return None
        elif STAND_IN == "interpreter" and self.backend == "cuda":
            return "the interpreter is Triton's"
        else:
            state = availability(self.backend)
        return None if state else state.reason

    def function(self) -> Callable[..., LayerResult]:
        """The layer on tensors of the device."""
        if STAND_IN == "cpu":
            return LAYER_FUNCTIONS["cpu"]
        if STAND_IN == "emulated" and self.backend == "cuda":
            return functools.partial(ops.lstm_layer, operators="fusedreg_emulated::lstm_layer")
        return LAYER_FUNCTIONS[self.backend]

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Within the block the tier is the target's; what that tier cannot run is skipped, with its own reason."""
        if not self.tier or STAND_IN == "cpu":
            yield
            return
        library = torch.ops.fusedreg_emulated if STAND_IN == "emulated" else torch.ops.fusedreg
        set_tier = library._set_tier if STAND_IN == "emulated" else library._set_cuda_tier
        assert set_tier(self.tier)
        try:
            yield
        except RuntimeError as error:
            if f'tier: "{self.tier}"' not in str(error):
                raise
            pytest.skip(f"not run: {error}")
        finally:
            assert set_tier("auto")

    def layer(self, *arguments: Any, **keywords: Any) -> LayerResult:
        """The layer with the signature of ``reference.lstm_layer``, on tensors of the CPU."""
        moved = [to_device(value) for value in arguments]
        result = self.function()(*moved, **{name: to_device(value) for name, value in keywords.items()})
        return LayerResult(*(_to_cpu(part) for part in result))


CUDA = Target("cuda", "cuda")
TIERS = tuple(Target(f"cuda-{tier}", "cuda", tier) for tier in ("cluster", "grid", "step"))
TRITON = Target("triton", "triton")
TARGETS = (CUDA, *TIERS, TRITON)
BACKENDS = (CUDA, TRITON)


def available(chosen: Target) -> Target:
    """The target, or a skip with the reason why it cannot be used here."""
    reason = chosen.unavailable()
    if reason is not None:
        pytest.skip(f"not run: {reason}")
    return chosen
