"""A GPU that is not there: Triton's own path from a launch to machine code, with nothing run at the end of it.

The operators run on CPU tensors under a driver that claims a GPU. Every kernel that they launch is specialised on the
real arguments and compiled to machine code by Triton's own assembler, and its arguments go through the launcher that
Triton compiles for them, into a libcuda that does nothing. So what is compiled is what a call needs, and not what
somebody has listed. An AMD GPU's kernels are compiled as far, and not launched: their launcher needs ROCm's headers.
For a process of its own, without the interpreter::

    python triton_pretended.py TARGET CASE ...

runs layers, forward and backward, and prints a line of JSON for each kernel. TARGET is a compute capability (80, 90)
or an AMD architecture (gfx942). CASE is ``name:dtype:H:B:kind:precision``, with ``kind`` one of ``step`` and
``persistent``, and ``name`` a regulariser's with ``+proj``, ``+probes`` and ``+groups`` where these are wanted. Each
case is run again with other sizes, rates and in another layer, on tensors that are slices at an odd address: what that
compiles is marked.
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
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
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

# What else the module needs that newer Triton's launcher is in, and is never called.
_UNCALLED = """
cuCtxGetDevice cuCtxGetLimit cuCtxSetLimit cuDeviceGetAttribute cuDriverGetVersion cuFuncGetAttribute
cuFuncSetCacheConfig cuModuleGetFunction cuModuleLoadData cuModuleUnload cuPointerGetAttributes cuStreamIsCapturing
"""


class Compiled(NamedTuple):
    """What became of one kernel. ``seconds`` are of a processor's time: other work beside it does not count."""

    module: str
    name: str
    target: str
    seconds: float
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    cooperative: bool
    fused: bool
    unordered: list[str]


class CountingLauncher:
    """In the place of a launcher that cannot be built here."""

    launches = ctypes.c_int(0)

    def __init__(self, *of: object) -> None:
        pass

    def __call__(self, *arguments: object) -> None:
        self.launches.value += 1


class PretendedDriver:
    """What Triton's launcher asks of a driver, for a GPU of a given architecture."""

    scratch: Any = None

    def __init__(self, target: str, launcher: type, launches: ctypes.c_int) -> None:
        self.target = target
        self.launcher_cls = launcher
        self.compiled: list[Compiled] = []
        self.utils = self
        # Newer Triton has one launcher for all kernels, and asks the driver for it; older compiles one for each.
        if launcher is nvidia.CudaLauncher and not hasattr(nvidia, "make_launcher"):
            utils = nvidia.CudaUtils()
            self.launch, self.build_signature_metadata = utils.launch, utils.build_signature_metadata
        self._launches = launches

    @property
    def launches(self) -> int:
        return self._launches.value

    def get_current_target(self) -> GPUTarget:
        if is_amd(self.target):
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", int(self.target), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": LIMITS[self.target][1]}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024


# Multiprocessors, and the shared memory that a program may have at most.
LIMITS = {"80": (108, 163 * 1024), "90": (132, 227 * 1024), "gfx942": (304, 64 * 1024)}


def is_amd(target: str) -> bool:
    return target.startswith("gfx")


def resources(kernel: Any) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack, which is where registers are spilled to."""
    if "amdgcn" in kernel.asm:
        found = [re.findall(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"]) for name in ("vgpr_count", "vgpr_spill_count")]
        registers, spilled = (max(map(int, counts)) for counts in found)
        return registers, 4 * spilled
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert usage, text.stdout
    return int(usage[1]), int(usage[2])


def unordered(ptx: str) -> list[str]:
    """What a kernel's PTX lacks to order one program's writes before another's reads.

    An arrival must be a release, with a barrier of all threads between it and whatever they stored before; a wait must
    be an acquire, with such a barrier between it and whatever is loaded after it; both at the device's scope. No load
    may be of the kind that takes memory for constant.
    """
    faults = [line.strip() for line in ptx.splitlines() if "global.nc" in line]
    stored = acquired = False
    for line in ptx.splitlines():
        if "bar.sync" in line:
            stored = acquired = False
        elif re.search(r"\b(atom|red)\.global", line):
            if ".gpu.release." not in line or stored:
                faults.append(line.strip())
        elif ".gpu.acquire." in line:
            acquired = True
        elif re.search(r"\bst\.global", line):
            stored = True
        elif acquired and re.search(r"\bld\.global|\bcp\.async\.c[ag]", line):
            faults.append(line.strip())
    if "bar.sync" in ptx and bool(re.search("gpu.acquire", ptx)) != bool(re.search("gpu.release", ptx)):
        faults.append("a wait without an arrival, or an arrival without a wait")
    return faults


def pretended_driver(target: str, folder: Path) -> PretendedDriver:
    if is_amd(target):
        torch.version.hip = "pretended"
        return PretendedDriver(target, CountingLauncher, CountingLauncher.launches)
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(_LIBCUDA + "".join(f"int {name}() {{ return 1; }}\n" for name in _UNCALLED.split()))
    build = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(build, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    launches = ctypes.c_int.in_dll(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL), "launches")
    return PretendedDriver(target, nvidia.CudaLauncher, launches)


def processor_seconds() -> float:
    """Of this process and of those that it has run, the assembler among them."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def pretend(target: str) -> PretendedDriver:
    """From now on this process has a GPU, for which it compiles and on which it launches nothing."""
    scratch = tempfile.TemporaryDirectory(prefix="triton")
    os.environ["TRITON_CACHE_DIR"] = str(Path(scratch.name) / "cache")
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"  # the default from Triton 3.10 on
    pretended = pretended_driver(target, Path(scratch.name))
    pretended.scratch = scratch  # removed with the driver, when the process ends
    driver.set_active(pretended)  # type: ignore[arg-type]
    original = triton.compiler.compile

    def compile(source: Any, *arguments: Any, **options: Any) -> Any:
        started = processor_seconds()
        kernel = original(source, *arguments, **options)
        seconds = processor_seconds() - started
        registers, stack = resources(kernel)
        metadata = kernel.metadata
        pretended.compiled.append(
            Compiled(
                source.fn.fn.__module__,
                metadata.name,
                target,
                round(seconds, 2),
                registers,
                stack,
                metadata.shared,
                metadata.num_warps,
                metadata.launch_cooperative_grid,
                metadata.enable_fp_fusion,
                unordered(kernel.asm.get("ptx", "")),
            )
        )
        return kernel

    triton.compiler.compile = compile  # where a launch takes it from
    return pretended


def pretend_table(target: str, persistent: bool) -> None:
    """The kernels' tables of configurations are asked about that GPU, though tensors are on the CPU."""
    from fusedreg.backends.triton import backward_configuration, backward_loop, configurations, forward_loop

    limits = configurations.Device(*LIMITS[target])
    configurations.device_limits = lambda device: limits
    forward_loop.forward_configuration = functools.partial(configurations.forward_configuration, persistent=persistent)
    backward_loop.backward_configuration = functools.partial(
        backward_configuration.backward_configuration, persistent=persistent
    )


def sliced(value: torch.Tensor | None) -> torch.Tensor | None:
    """The same values one element into an allocation: where a slice of a stack may stand."""
    if value is None:
        return None
    whole = value.new_empty(value.numel() + 1)
    return whole[1:].view(value.shape).copy_(value)


def run(name: str, *, again: bool, **case_fields: Any) -> None:
    """A layer's forward and backward on the pretended GPU: whatever its results are, its kernels are launched."""
    from helpers import REGULARIZERS

    from fusedreg.backends.triton.layer import backward, forward
    from fusedreg.encoding import DIFFERENTIABLE, SAVE_GATES, SAVE_RECOMPUTE, encode_options, hidden_differs
    from fusedreg.testing import LayerCase, make_arguments

    name, *features = name.split("+")
    case_fields["proj_size"] = case_fields["hidden_size"] // 4 if "proj" in features else 0
    case_fields["probes"] = "probes" in features
    case = LayerCase(name, regularization=REGULARIZERS[name], ragged=True, resets=True, input_size=8, **case_fields)
    given = make_arguments(case, 0)
    groups = 2 if "groups" in features else 1
    if groups > 1:
        given = given._replace(seed=torch.zeros(groups, 2, dtype=torch.int64))
    tensors, incoming = given.tensors(), [given.gradients[key] for key in ("output", "final_hidden", "final_cell")]
    incoming.append(given.gradients["cells"])
    if again:
        tensors, incoming = tuple(map(sliced, tensors)), [sliced(value) for value in incoming]  # type: ignore[misc]
    rates, options, eps = encode_options(case.options, SAVE_RECOMPUTE if case.recompute else SAVE_GATES)
    encoded = ([rate / 2 if again else rate for rate in rates], [*options[:14], groups], eps)
    output, _, _, cells, hidden, *saved = forward(*tensors, *encoded)
    carried = hidden if hidden_differs(*encoded[:2]) else output
    needed = [tensors[place] is not None for place in DIFFERENTIABLE]
    backward(*incoming, *tensors, cells, carried, *saved, *encoded, needed)


def main(target: str, cases: list[str]) -> None:
    pretended = pretend(target)
    torch.set_num_threads(1)
    for case in cases:
        name, dtype, hidden_size, rows, kind, precision = case.split(":")
        torch.set_float32_matmul_precision(precision)
        pretend_table(target, kind == "persistent")
        fields = {"hidden_size": int(hidden_size), "dtype": getattr(torch, dtype), "recompute": kind == "step"}
        for again in (False, True):
            pretended.compiled.clear()
            if again:  # two rows less, which leaves the tile of rows as it is
                run(name, again=True, rows=int(rows) - 2, steps=16, layer=1, num_layers=3, **fields)
            else:
                run(name, again=False, rows=int(rows), **fields)
            for kernel in pretended.compiled:
                print(json.dumps({"case": case, "again": again, **kernel._asdict()}), flush=True)
    print(json.dumps({"launches": pretended.launches}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
