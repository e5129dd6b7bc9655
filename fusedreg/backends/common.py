"""What the backends share: the answer to whether one can be used, and what none of the kernels can run."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Availability(NamedTuple):
    """Whether a backend can be used in this process, and if not, why not and what to do about it.

    Truthy exactly where the backend is available; ``reason`` is empty then.

    Example:
        >>> from fusedreg.backends import availability
        >>> bool(availability("reference"))
        True
    """

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available


class Backend(Protocol):
    """What a module of this package offers, to stand in the table of :mod:`fusedreg.backends`."""

    OPERATORS: str
    """The pair of operators that runs its layers, ``"namespace::name"``."""

    def load(self) -> Availability:
        """Load what the backend needs, once a process. Never raises."""

    def unsupported(self, device: torch.device, dtype: torch.dtype, *, process_group: bool = False) -> str | None:
        """Why the kernels cannot take a call, with the remedy, or ``None`` where they can."""

    def describe(self, device: torch.device) -> str:
        """What the kernels run with, in a few words: instruction set, device, versions. Only where available."""


def without_kernel(dtype: torch.dtype, *, process_group: bool) -> str | None:
    """Why no kernel of any backend can take a call, or ``None``: what is left to the reference by design."""
    if dtype not in DTYPES:
        return f"dtype: expected float32, float64, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if process_group:
        return "BatchNorm(process_group=...): these kernels take statistics within one process"
    return None


def allows_tf32() -> bool:
    """Whether torch allows TF32 in float32 products on a GPU, by either of its ways of setting it."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch.backends.cuda.matmul.fp32_precision has been used, and is what counts then
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
