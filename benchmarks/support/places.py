"""Where a check runs: a backend, or its stand-in where there is no GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fusedreg
from fusedreg import functional, ops
from fusedreg.backends import availability

EMULATED = Path(__file__).resolve().parents[2] / "build" / "cuda_emulation" / "libfusedreg_cuda_emulated.so"
EMULATED_OPERATORS = "fusedreg_emulated::lstm_layer"


@dataclass(frozen=True)
class Place:
    """A column of the table.

    Args:
        backend: its name.
        stand_in: ``"emulated"`` or ``"interpreter"`` where there is no GPU, else ``""``.
    """

    backend: str
    stand_in: str = ""

    @property
    def device(self) -> torch.device:
        """Of the tensors."""
        return torch.device("cuda" if self.backend in ("cuda", "triton") and not self.stand_in else "cpu")

    @property
    def slow(self) -> bool:
        """Whether a step costs milliseconds, and a check may be shorter."""
        return self.stand_in == "interpreter"

    def unavailable(self) -> str | None:
        """Why nothing can run here, or ``None``."""
        if self.stand_in == "emulated":
            if not EMULATED.exists():
                return f"{EMULATED.name} is not built; `python tools/cuda_build.py emulation` builds it"
            if not hasattr(torch.ops.fusedreg_emulated, "lstm_layer_forward"):
                torch.ops.load_library(str(EMULATED))
            ops.register_operators(EMULATED_OPERATORS)
            return None
        state = availability(self.backend)
        return None if state else state.reason

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, modules made by :meth:`module` run on these kernels."""
        if self.stand_in != "emulated":
            yield
            return
        own = functional.LAYER_FUNCTIONS["cpu"]
        functional.LAYER_FUNCTIONS["cpu"] = functools.partial(ops.lstm_layer, operators=EMULATED_OPERATORS)
        try:
            yield
        finally:
            functional.LAYER_FUNCTIONS["cpu"] = own

    def module(self, *sizes: int, **options: Any) -> fusedreg.LSTM:
        """An LSTM of this backend, the same at each call."""
        torch.manual_seed(0)
        backend = "cpu" if self.stand_in == "emulated" else self.backend
        return fusedreg.LSTM(*(sizes or (3, 4)), **options, backend=backend, device=self.device)


def places() -> list[Place]:
    """The columns, with a GPU's kernels on it where torch sees one."""
    gpu = torch.cuda.is_available()
    return [
        Place("cpu"),
        Place("cuda", "" if gpu else "emulated"),
        Place("triton", "" if gpu else "interpreter"),
        Place("reference"),
    ]
