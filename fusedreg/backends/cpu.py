"""The CPU backend: the compiled extension, found, loaded and checked.

The extension registers ``fusedreg::lstm_layer_forward`` and ``fusedreg::lstm_layer_backward`` with torch when it is
loaded; :func:`fusedreg.ops.register_operators` then attaches fakes and gradients to them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from fusedreg._version import __version__
from fusedreg.backends.common import Availability, without_kernel

MINIMUM_TORCH = (2, 10)
OPERATORS = "fusedreg::lstm_layer"
# Read when the package is imported, never inside an operator. For the sanitizers' build (`make sanitize`).
LIBRARY_VARIABLE = "FUSEDREG_CPU_LIBRARY"

_REBUILD = "build it with `make build` in a checkout, or `pip install --no-build-isolation .`"


_CPU = torch.device("cpu")
_state: Availability | None = None


def library_path() -> Path:
    """Where the extension is looked for: beside the package's files, or where ``FUSEDREG_CPU_LIBRARY`` says."""
    named = os.environ.get(LIBRARY_VARIABLE, "")
    return Path(named) if named else Path(__file__).resolve().parent.parent / "_cpu.abi3.so"


def load() -> Availability:
    """Load the extension and complete its operators; once a process, later calls return the first one's answer.

    Never raises: a package without its extension still imports, and says what is missing when it is asked to run.

    Returns:
        Whether the operators can be called, with the reason where they cannot.
    """
    global _state
    if _state is None:
        _state = _load(library_path())
    return _state


def _load(path: Path) -> Availability:
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MINIMUM_TORCH:
        return Availability(False, f"torch: expected 2.10 or newer, got {torch.__version__}; upgrade torch")
    # A second library of the same operators would end the process; a second import of this module must not load one.
    if not hasattr(torch.ops.fusedreg, "lstm_layer_forward"):
        if not path.exists():
            return Availability(False, f"the compiled extension {path} does not exist; {_REBUILD}")
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            return Availability(False, f"the compiled extension {path} cannot be loaded ({error}); {_REBUILD}")
    built = torch.ops.fusedreg._cpu_version()
    if built != __version__:
        return Availability(
            False, f"the compiled extension {path} is of version {built}, the Python files of {__version__}; {_REBUILD}"
        )
    from fusedreg.ops import register_operators  # here, because fusedreg.ops knows nothing of backends

    register_operators()
    return Availability(True)


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that the extension can use on this processor, best first.

    Returns:
        Some of ``"avx512"``, ``"avx2"`` and ``"portable"``; empty without the extension.
    """
    return tuple(str(torch.ops.fusedreg._cpu_instruction_sets()).split(",")) if load() else ()


def instruction_set() -> str:
    """The instruction set in use: the best one, unless a test has set another. Empty without the extension."""
    return str(torch.ops.fusedreg._cpu_instruction_set()) if load() else ""


def unsupported(device: torch.device, dtype: torch.dtype, *, process_group: bool = False) -> str | None:
    """Why these kernels cannot take a call, or ``None`` where they can.

    Args:
        device: of the input.
        dtype: of the input.
        process_group: whether a batch norm shares its statistics between processes.
    """
    if device != _CPU and device.type != "cpu":  # the first answer is the faster one
        return f"device: expected cpu, got {device}; move module and input to the CPU"
    reason = without_kernel(dtype, process_group=process_group)
    if reason is not None:
        return reason
    state = load()
    return None if state.available else state.reason


def describe(device: torch.device) -> str:
    """The instruction set in use."""
    return instruction_set()
