"""A GPU that is not there: Triton's own path from a launch to machine code, with nothing run at the end of it.

The operators run on CPU tensors under a driver that claims a GPU. Every kernel that they launch is specialised on the
real arguments and compiled to a cubin by Triton's own ptxas, and its arguments go through the launcher that Triton
compiles for them, into a libcuda that does nothing. So what is compiled is what a call needs, and not what somebody
has listed. For a process of its own, without the interpreter::

    python triton_pretended.py CAPABILITY CASE ...

runs layers, forward and backward, and prints a line of JSON for each kernel. CASE is
``name:dtype:H:B:kind:precision``, with ``kind`` one of ``step`` and ``persistent``. Each case is run again with other
sizes, rates and in another layer: what that compiles is marked.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver

_LIBCUDA = """
#include <string.h>
int launches = 0;
int cuGetErrorString(int code, const char** text) { *text = "pretended"; return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuPointerGetAttribute(void* out, int attribute, unsigned long long pointer) {
  memcpy(out, &pointer, sizeof pointer);
  return 0;
}
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuDeviceGet(int* device, int index) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)1; return 0; }
int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) { ++launches; return 0; }
"""


class Compiled(NamedTuple):
    """What became of one kernel."""

    module: str
    name: str
    capability: int
    seconds: float
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    cooperative: bool


class PretendedDriver:
    """What Triton's launcher asks of a driver, for a GPU of a given compute capability."""

    launcher_cls = CudaLauncher
    scratch: Any = None

    def __init__(self, capability: int, libcuda: ctypes.CDLL) -> None:
        self.capability = capability
        self.compiled: list[Compiled] = []
        self.utils = self
        self._launches = ctypes.c_int.in_dll(libcuda, "launches")

    @property
    def launches(self) -> int:
        return self._launches.value

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": shared_bytes(self.capability)}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024


def shared_bytes(capability: int) -> int:
    """What a program may have at most."""
    return (227 if capability >= 90 else 163) * 1024


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack, which is where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert usage, text.stdout
    return int(usage[1]), int(usage[2])


def pretend(capability: int) -> PretendedDriver:
    """From now on this process has a GPU, for which it compiles and on which it launches nothing."""
    scratch = tempfile.TemporaryDirectory(prefix="triton")
    folder = Path(scratch.name)
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(_LIBCUDA)
    build = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(build, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    pretended = PretendedDriver(capability, ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    pretended.scratch = scratch  # removed with the driver, when the process ends
    driver.set_active(pretended)  # type: ignore[arg-type]
    original = triton.compiler.compile

    def compile(source: Any, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        kernel = original(source, *arguments, **options)
        seconds = time.perf_counter() - started
        registers, stack = resources(kernel.asm["cubin"])
        metadata = kernel.metadata
        pretended.compiled.append(
            Compiled(
                source.fn.fn.__module__,
                metadata.name,
                capability,
                seconds,
                registers,
                stack,
                metadata.shared,
                metadata.num_warps,
                metadata.launch_cooperative_grid,
            )
        )
        return kernel

    triton.compiler.compile = compile  # where a launch takes it from
    return pretended


def pretend_table(capability: int, persistent: bool) -> None:
    """The kernels' tables of configurations are asked about that GPU, though tensors are on the CPU."""
    from fusedreg.backends.triton import backward_configuration, backward_loop, configurations, forward_loop

    limits = configurations.Device(132 if capability >= 90 else 108, shared_bytes(capability))
    configurations.device_limits = lambda device: limits
    forward_loop.forward_configuration = functools.partial(configurations.forward_configuration, persistent=persistent)
    backward_loop.backward_configuration = functools.partial(
        backward_configuration.backward_configuration, persistent=persistent
    )


def run(name: str, *, rates: float = 1.0, **case_fields: Any) -> None:
    """A layer's forward and backward on the pretended GPU: whatever its results are, its kernels are launched."""
    from helpers import REGULARIZERS

    from fusedreg.backends.triton.layer import backward, forward
    from fusedreg.encoding import DIFFERENTIABLE, SAVE_GATES, SAVE_RECOMPUTE, encode_options, hidden_differs
    from fusedreg.testing import LayerCase, make_arguments

    case = LayerCase(name, regularization=REGULARIZERS[name], ragged=True, resets=True, input_size=8, **case_fields)
    given = make_arguments(case, 0)
    tensors = given.tensors()
    changed, options, eps = encode_options(case.options, SAVE_RECOMPUTE if case.recompute else SAVE_GATES)
    encoded = ([rate * rates for rate in changed], options, eps)
    output, _, _, cells, hidden, *saved = forward(*tensors, *encoded)
    carried = hidden if hidden_differs(*encoded[:2]) else output
    needed = [tensors[place] is not None for place in DIFFERENTIABLE]
    incoming = [given.gradients[key] for key in ("output", "final_hidden", "final_cell", "cells")]
    backward(*incoming, *tensors, cells, carried, *saved, *encoded, needed)


def main(capability: int, cases: list[str]) -> None:
    pretended = pretend(capability)
    torch.set_num_threads(1)
    for case in cases:
        name, dtype, hidden_size, rows, kind, precision = case.split(":")
        torch.set_float32_matmul_precision(precision)
        pretend_table(capability, kind == "persistent")
        fields = {"hidden_size": int(hidden_size), "dtype": getattr(torch, dtype), "recompute": kind == "step"}
        for again in (False, True):
            pretended.compiled.clear()
            if again:  # one row less, which leaves the tile of rows as it is
                run(name, rates=0.5, rows=int(rows) - 1, steps=16, layer=1, num_layers=3, **fields)
            else:
                run(name, rows=int(rows), **fields)
            for kernel in pretended.compiled:
                print(json.dumps({"case": case, "again": again, **kernel._asdict()}), flush=True)
    print(json.dumps({"launches": pretended.launches}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
