"""Which backends there are, whether they can be used here, and which one a call gets.

``auto`` chooses. A backend asked for by name runs or raises, with the reason and the remedy: there is no silent
fallback. ``reference`` is plain torch and runs everywhere; ``cpu`` is the compiled loop.

Importing this module loads the compiled extension, so that nothing is loaded while a graph is traced.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fusedreg.backends import cpu
from fusedreg.backends.cpu import Availability

__all__ = ["BACKENDS", "Availability", "availability", "explain", "resolve"]

BACKENDS = ("auto", "reference", "cpu")

cpu.load()

_warned: set[str] = set()


def availability(backend: str) -> Availability:
    """Whether a backend can be used in this process, and if not, why not.

    Args:
        backend: ``"auto"``, ``"reference"`` or ``"cpu"``. The first two always can.

    Returns:
        An :class:`Availability`, truthy where it can.

    Raises:
        ValueError: there is no backend of that name.

    Example:
        >>> from fusedreg.backends import availability
        >>> availability("reference").available
        True
    """
    check_name(backend)
    return cpu.load() if backend == "cpu" else Availability(True)


def check_name(backend: Any) -> None:
    """Raise a :class:`ValueError` (a :class:`TypeError` for another type) unless ``backend`` names one."""
    names = ", ".join(repr(name) for name in BACKENDS)
    if not isinstance(backend, str):
        raise TypeError(
            f"backend: expected one of {names}, got {backend!r} of type {type(backend).__name__}; pass a string"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {names}, got {backend!r}; leave it out for 'auto'")


def resolve(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    proj_size: int = 0,
    process_group: bool = False,
) -> str:
    """The backend that runs a call: ``"reference"`` or ``"cpu"``.

    Args:
        backend: as the user gave it. ``"auto"`` takes the compiled loop where it can run the call, else the reference,
            with a :class:`UserWarning` that gives the reason, once a reason.
        device: of the input.
        dtype: of the input.
        proj_size: of the module, 0 without a projection.
        process_group: whether a batch norm shares its statistics between processes.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for cannot run this, or ``"auto"`` has none for the device. The message gives
            the reason and the remedy.

    Example:
        >>> import torch
        >>> from fusedreg.backends import resolve
        >>> resolve("reference", torch.device("cpu"), torch.float32)
        'reference'
    """
    check_name(backend)
    if backend == "reference":
        return backend
    reason = cpu.unsupported(device, dtype, proj_size=proj_size, process_group=process_group)
    if reason is None:
        return "cpu"
    if backend == "cpu":
        raise RuntimeError(
            f"backend: 'cpu' cannot run this call: {reason}. "
            "With backend='auto' or backend='reference' the reference runs it."
        )
    if device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"backend: expected a device that this version has kernels for (cpu), got {device}. "
            "Ask for backend='reference' to run it there in plain torch, step by step, or move module and input to "
            "the CPU."
        )
    if device.type == "cpu":
        _warn_once(reason)
    return "reference"


def _warn_once(reason: str) -> None:
    # A warning is a side effect, which a traced graph has no place for.
    if reason in _warned or torch.compiler.is_compiling():
        return
    _warned.add(reason)
    warnings.warn(
        f"fusedreg runs this LSTM with its reference, which is much slower than the compiled loop: {reason}. "
        "backend='reference' says that this is meant, and silences this warning.",
        UserWarning,
        stacklevel=5,
    )


def explain(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    proj_size: int = 0,
    process_group: bool = False,
) -> str:
    """What ``backend="auto"`` does with such a call, and why: a text for people.

    Args:
        device: of the input.
        dtype: of the input.
        proj_size: of the module, 0 without a projection.
        process_group: whether a batch norm shares its statistics between processes.

    Returns:
        A few lines: one a backend, and what ``"auto"`` takes.

    Example:
        >>> from fusedreg.backends import explain
        >>> explain("cpu", torch.float32).splitlines()[0]
        'cpu, float32'
    """
    device = torch.device(device)
    reason = cpu.unsupported(device, dtype, proj_size=proj_size, process_group=process_group)
    if reason is None:
        choice = "cpu"
    elif device.type in ("cpu", "meta"):
        choice = "reference"
    else:
        choice = "nothing: an error; ask for 'reference' by name"
    kernels = f"yes, with {cpu.instruction_set()}" if reason is None else f"no: {reason}"
    return "\n".join(
        [
            f"{device}, {str(dtype).removeprefix('torch.')}",
            f"  cpu        {kernels}",
            "  reference  yes: plain torch, any device and dtype, step by step",
            f"  auto takes {choice}",
        ]
    )
