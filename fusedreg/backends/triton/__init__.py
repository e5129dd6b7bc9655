"""The Triton backend: the recurrent loop in kernels that Triton compiles on the user's machine.

The portable GPU path: no compiler and no compiled file, and GPUs of any vendor that Triton has. This module imports
neither Triton nor a kernel; :func:`load` does, when the backend is first asked for.
"""

from __future__ import annotations

import importlib.util
import re

import torch

from fusedreg.backends.common import Availability, without_kernel

OPERATORS = "fusedreg::triton_lstm_layer"
MINIMUM_TRITON = (3, 4)

_INSTALL = "install it with `pip install triton` (a CUDA or ROCm build of torch brings it)"

_state: Availability | None = None


def load() -> Availability:
    """Import Triton and the kernels, and define their operators; once a process. Never raises.

    A failure is not remembered: Triton's interpreter may be switched on later.
    """
    global _state
    if not _state:
        _state = _load()
    return _state


# dynamo runs a function with this mark while it traces, so that a first call in compiled code finds the kernels too.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load() -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(False, f"the package triton is not installed; {_INSTALL}")
    try:
        import triton
    except (ImportError, RuntimeError) as error:
        return Availability(False, f"the package triton cannot be imported ({error}); {_INSTALL}")
    numbers = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MINIMUM_TRITON:
        least = ".".join(map(str, MINIMUM_TRITON))
        return Availability(False, f"triton: expected {least} or newer, got {triton.__version__}; upgrade it")
    if not interpreted() and not torch.cuda.is_available():
        return Availability(
            False,
            "torch sees no GPU (torch.cuda.is_available() is False); "
            "TRITON_INTERPRET=1, set before the process starts, runs the kernels on CPU tensors, slowly",
        )
    from fusedreg.backends.triton.layer import backward, forward
    from fusedreg.ops import register_operators
    from fusedreg.schemas import define_operators

    define_operators(OPERATORS, forward, backward, ("CPU",) if interpreted() else ("CUDA",))
    register_operators(OPERATORS)
    return Availability(True)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: ``TRITON_INTERPRET=1`` at Triton's import."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(device: torch.device, dtype: torch.dtype, *, process_group: bool = False) -> str | None:
    """Why these kernels cannot take a call, or ``None`` where they can.

    Args:
        device: of the input.
        dtype: of the input.
        process_group: whether a batch norm shares its statistics between processes.
    """
    reason = without_kernel(dtype, process_group=process_group)
    if reason is not None:
        return reason
    if dtype == torch.float64:
        return "dtype: expected float32, bfloat16 or float16, got float64; these kernels compute in float32"
    state = load()
    if not state.available:
        return state.reason
    expected = "cpu" if interpreted() else "cuda"
    if device.type != expected:
        return f"device: expected {expected}, got {device}; move module and input there"
    return None


def describe(device: torch.device) -> str:
    """Triton's version, and what it compiles for."""
    import triton

    target = "its interpreter" if interpreted() else torch.cuda.get_device_name(device)
    return f"Triton {triton.__version__}, {target}"
