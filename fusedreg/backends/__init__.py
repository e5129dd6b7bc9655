"""Which backends there are, whether they can be used here, and which one a call gets.

``auto`` chooses: ``cpu`` for CPU tensors; for CUDA tensors ``cuda`` where it was built, else ``triton`` where that
package is there. A backend asked for by name runs or raises, with the reason and the remedy: there is no silent
fallback. ``reference`` is plain torch and runs everywhere; ``cpu`` and ``cuda`` are the compiled loop; ``triton`` is
the loop in kernels that Triton compiles on the user's machine.

Importing this module loads the CPU's extension, so that nothing is loaded while a graph is traced. What belongs to a
GPU is loaded at its first use: neither the CUDA extension nor Triton slows down a program that has no use for them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fusedreg.backends import cpu, cuda, triton
from fusedreg.backends.common import Availability, Backend, without_kernel
from fusedreg.regularization import Regularization

__all__ = ["BACKENDS", "OPERATORS", "Availability", "availability", "explain", "resolve"]

_MODULES: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "triton": triton}
# What `auto` tries, in this order, by the type of the input's device.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

BACKENDS = ("auto", "reference", *_MODULES)
# The pair of operators behind each backend: what fusedreg.ops.lstm_layer takes.
OPERATORS = {name: module.OPERATORS for name, module in _MODULES.items()}

cpu.load()

_CPU = torch.device("cpu")
_warned: set[str] = set()


def availability(backend: str) -> Availability:
    """Whether a backend can be used in this process, and if not, why not.

    Args:
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``. The first two always can.

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
    return _MODULES[backend].load() if backend in _MODULES else Availability(True)


def check_name(backend: Any) -> None:
    """Raise a :class:`ValueError` (a :class:`TypeError` for another type) unless ``backend`` names one."""
    if isinstance(backend, str) and backend in BACKENDS:
        return
    names = ", ".join(repr(name) for name in BACKENDS)
    if not isinstance(backend, str):
        raise TypeError(
            f"backend: expected one of {names}, got {backend!r} of type {type(backend).__name__}; pass a string"
        )
    raise ValueError(f"backend: expected one of {names}, got {backend!r}; leave it out for 'auto'")


def resolve(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    process_group: bool = False,
) -> str:
    """The backend that runs a call: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.

    Args:
        backend: as the user gave it. ``"auto"`` takes the first whose kernels can run the call. What no kernel can
            run, it gives to the reference, with a :class:`UserWarning` that gives the reason, once a reason.
        device: of the input.
        dtype: of the input.
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
    if backend == "auto" and device == _CPU and cpu.unsupported(device, dtype, process_group=process_group) is None:
        return "cpu"  # the short way, for tiny calls
    check_name(backend)
    if backend == "reference":
        return backend
    if backend != "auto":
        reason = _MODULES[backend].unsupported(device, dtype, process_group=process_group)
        if reason is None:
            return backend
        raise RuntimeError(
            f"backend: {backend!r} cannot run this call: {reason}. backend='reference' runs it in plain torch, step "
            "by step."
        )
    chosen, reasons = _choose(device, dtype, process_group)
    if chosen is None:
        raise RuntimeError(_no_backend(device, reasons))
    if chosen == "reference" and device.type != "meta":
        _warn_once(next(iter(reasons.values())))
    return chosen


def _choose(device: torch.device, dtype: torch.dtype, process_group: bool) -> tuple[str | None, dict[str, str]]:
    """What ``auto`` takes, ``None`` for nothing, and why those that come before it in the table cannot run the call."""
    reasons: dict[str, str] = {}
    for name in _PREFERRED.get(device.type, ()):
        reason = _MODULES[name].unsupported(device, dtype, process_group=process_group)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    if device.type in ("cpu", "meta"):
        return "reference", reasons
    # On a GPU a missing file or package is an error, for someone expects a GPU's speed; what is left to the reference
    # by design is not.
    by_design = without_kernel(dtype, process_group=process_group)
    if device.type in _PREFERRED and by_design is not None:
        return "reference", reasons
    return None, reasons


def _no_backend(device: torch.device, reasons: dict[str, str]) -> str:
    reference = "backend='reference' runs it there in plain torch, step by step"
    if not reasons:
        devices = " or ".join(_PREFERRED)
        return (
            f"backend: expected a device that there are kernels for ({devices}), got {device}. Move module and input "
            f"there; {reference}."
        )
    each = " ".join(f"{name!r} cannot: {reason}." for name, reason in reasons.items())
    return f"backend: no kernels can run this call on {device}. {each} {reference[0].upper()}{reference[1:]}."


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
    hidden_size: int | None = None,
    batch_size: int = 1,
    steps: int = 100,
    input_size: int | None = None,
    regularization: Regularization | None = None,
    proj_size: int = 0,
    process_group: bool = False,
) -> str:
    """What ``backend="auto"`` does with such a call, and why: a text for people.

    Args:
        device: of the input.
        dtype: of the input.
        hidden_size: with it, where the CUDA kernels can run the call, also which of their tiers does, and why.
        batch_size, steps, input_size: of the call, for the same; ``input_size`` is ``hidden_size`` unless it is given.
        proj_size: of the module, for the same; 0 without a projection.
        regularization: the options in training, for the same; ``None`` for those of ``nn.LSTM``.
        process_group: whether a batch norm shares its statistics between processes.

    Returns:
        A few lines: one a backend, and what ``"auto"`` takes.

    Example:
        >>> from fusedreg.backends import explain
        >>> explain("cpu", torch.float32).splitlines()[0]
        'cpu, float32'
    """
    device = torch.device(device)
    lines = [f"{device}, {str(dtype).removeprefix('torch.')}"]
    for name, module in _MODULES.items():
        reason = module.unsupported(device, dtype, process_group=process_group)
        lines.append(f"  {name:9}  " + (f"no: {reason}" if reason else f"yes, with {module.describe(device)}"))
        if name == "cuda" and reason is None and hidden_size is not None:
            tiers = cuda.plan(
                cuda.device_limits(device),
                dtype,
                steps=steps,
                batch_size=batch_size,
                input_size=hidden_size if input_size is None else input_size,
                hidden_size=hidden_size,
                regularization=Regularization() if regularization is None else regularization,
                proj_size=proj_size,
                device=device,
            )
            lines += [f"             {line}" for line in tiers.splitlines()]
    chosen, _ = _choose(device, dtype, process_group)
    lines.append("  reference  yes: plain torch, any device and dtype, step by step")
    lines.append(f"  auto takes {chosen or 'nothing: an error; ask for reference by name'}")
    return "\n".join(lines)
