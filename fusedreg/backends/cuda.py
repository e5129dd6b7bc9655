"""The CUDA backend: the compiled extension of the GPU's kernels, found, loaded and checked.

The file gives the operators of :mod:`fusedreg.backends.cpu` a second implementation, for CUDA tensors. It is loaded
when it is first asked for, and only where torch sees a CUDA device: the import of the package touches no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusedreg._version import __version__
from fusedreg.backends import cpu
from fusedreg.backends.common import Availability, allows_tf32, without_kernel

if TYPE_CHECKING:
    from fusedreg.regularization import Regularization

OPERATORS = cpu.OPERATORS
MINIMUM_CAPABILITY = (8, 0)

_REBUILD = (
    "build it where nvcc is, with `FUSEDREG_CUDA=1 make build` in a checkout or "
    "`FUSEDREG_CUDA=1 pip install --no-build-isolation .`"
)

# `ScalarType` in csrc/common/params.h.
_SCALAR_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class DeviceLimits(NamedTuple):
    """What of a GPU decides which tier runs a layer: ``DeviceLimits`` in ``csrc/cuda/runtime.h``."""

    multiprocessors: int
    shared_bytes_per_block: int
    major: int
    minor: int


_state: Availability | None = None


def library_path() -> Path:
    """Where the extension is looked for: beside the package's files."""
    return Path(__file__).resolve().parent.parent / "_cuda.abi3.so"


def load() -> Availability:
    """Load the extension; once a process, later calls return the first one's answer. Never raises."""
    global _state
    if _state is None:
        _state = _load(library_path())
    return _state


# dynamo runs a function with this mark while it traces, so that a first call in compiled code finds the kernels too.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _without_device() -> str | None:
    """Why torch itself cannot run anything on an NVIDIA GPU here, or ``None`` where it can."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm, these kernels are for NVIDIA GPUs; use backend='triton'"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (torch.cuda.is_available() is False); see what `nvidia-smi` says"
    return None


def _load(path: Path) -> Availability:
    reason = _without_device()
    if reason is not None:
        return Availability(False, reason)
    schemas = cpu.load()
    if not schemas:
        return Availability(False, f"the operators are defined in the CPU's extension, and {schemas.reason}")
    # A second registration of the same kernels would end the process.
    if not hasattr(torch.ops.fusedreg, "_cuda_version"):
        if not path.exists():
            return Availability(False, f"the compiled extension {path} does not exist; {_REBUILD}")
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            return Availability(False, f"the compiled extension {path} cannot be loaded ({error}); {_REBUILD}")
    built = str(torch.ops.fusedreg._cuda_version())
    if built != __version__:
        return Availability(
            False, f"the compiled extension {path} is of version {built}, the Python files of {__version__}; {_REBUILD}"
        )
    driver, runtime = torch.ops.fusedreg._cuda_versions()
    # A driver runs what was built with its own major version of CUDA or an older one.
    if driver // 1000 < runtime // 1000:
        return Availability(
            False,
            f"the NVIDIA driver runs CUDA up to {_cuda_release(driver)}, and the compiled extension {path} is built "
            f"with CUDA {_cuda_release(runtime)}; update the driver, or build with nvcc of CUDA {driver // 1000}: "
            f"{_REBUILD}",
        )
    return Availability(True)


def _cuda_release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


_ages: dict[int | None, str] = {}


def _too_old(index: int | None) -> str:
    """Why a GPU is too old for these kernels, or the empty string. Asked once a device: the answer costs a call."""
    if index not in _ages:
        capability = torch.cuda.get_device_capability(index)
        _ages[index] = (
            ""
            if capability >= MINIMUM_CAPABILITY
            else f"compute capability: expected 8.0 or higher, got {capability[0]}.{capability[1]} "
            f"({torch.cuda.get_device_name(index)}); use backend='triton'"
        )
    return _ages[index]


_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(device: torch.device, dtype: torch.dtype, *, process_group: bool = False) -> str | None:
    """Why these kernels cannot take a call, or ``None`` where they can.

    Args:
        device: of the input.
        dtype: of the input.
        process_group: whether a batch norm shares its statistics between processes.
    """
    if device.type != "cuda":
        return f"device: expected cuda, got {device}; move module and input to the GPU, for instance with .cuda()"
    reason = without_kernel(dtype, process_group=process_group)
    if reason is not None:
        return reason
    state = load()
    if not state.available:
        return state.reason
    return _too_old(device.index) or None


def describe(device: torch.device) -> str:
    """The GPU's name, compute capability and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors"
    )


def device_limits(device: torch.device) -> DeviceLimits:
    """Those of a GPU that torch sees."""
    properties: Any = torch.cuda.get_device_properties(device)  # older torch's stub lacks the shared memory
    return DeviceLimits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.major,
        properties.minor,
    )


def plan(
    limits: DeviceLimits,
    dtype: torch.dtype,
    *,
    steps: int,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    regularization: Regularization,
    proj_size: int = 0,
    training: bool = True,
    device: torch.device | None = None,
) -> str:
    """Which tier of the kernels runs a layer on such a GPU, and why: a line for the forward, one for the backward.

    Plain C++ of the CPU's extension: no GPU is needed.

    Args:
        limits: of the GPU.
        dtype: of the input.
        steps, batch_size, input_size, hidden_size: ``T``, ``B``, ``I`` and ``H``.
        regularization: the layer's options, as of the only layer of a module.
        proj_size: ``P``, 0 without a projection.
        training: whether masks are drawn and batch statistics taken.
        device: the GPU itself, to be asked how many clusters it holds. Without it, one of up to 8 blocks for every 8
            multiprocessors, and none of more, is assumed.
    """
    from fusedreg.encoding import SAVE_GATES, encode_options

    options = regularization.layer_options(0, 1, 0, training, False, False)
    rates, flags, _ = encode_options(options, SAVE_GATES)
    sizes = [steps, batch_size, input_size, hidden_size, proj_size or hidden_size]
    tf32 = allows_tf32()
    arguments = (sizes, _SCALAR_TYPES[dtype], rates, flags, tf32, list(limits))
    if device is None:
        return str(torch.ops.fusedreg._cuda_plan(*arguments))
    with torch.cuda.device(device):
        return str(torch.ops.fusedreg._cuda_plan_on_device(*arguments))
