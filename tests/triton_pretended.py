"""A GPU that is not there: Triton's own path from a launch to machine code, with nothing run at the end of it.

The operators run on CPU tensors under a driver that claims a GPU. Every kernel that they launch is specialised on the
real arguments and compiled to a cubin by Triton's own ptxas; the launch itself is noted and left out. So what is
compiled is what a call needs, and not what somebody has listed. For a process of its own, without the interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Compiled(NamedTuple):
    """What became of one kernel."""

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

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: list[Compiled] = []
        self.launches = 0
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": (227 if self.capability >= 90 else 163) * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return "module", "function", 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and spilled bytes, from the file itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert usage, text.stdout
    return int(usage[1]), int(usage[2])


def pretend(capability: int) -> PretendedDriver:
    """From now on this process has a GPU, of which it only compiles for."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton")
    pretended = PretendedDriver(capability)
    driver.set_active(pretended)  # type: ignore[arg-type]
    original = triton.compiler.compile

    def compile(source: Any, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        kernel = original(source, *arguments, **options)
        seconds = time.perf_counter() - started
        registers, spilled = resources(kernel.asm["cubin"])
        metadata = kernel.metadata
        pretended.compiled.append(
            Compiled(
                metadata.name, capability, seconds, registers, spilled, metadata.shared, metadata.num_warps,
                metadata.launch_cooperative_grid,
            )
        )  # fmt: skip
        return kernel

    triton.compiler.compile = compile  # where a launch takes it from
    return pretended
