"""Builds fusedreg's compiled extensions.

One file an extension: ``fusedreg/_cpu.abi3.so``, written against LibTorch's stable ABI and without a single
Python symbol, so that one built file serves every torch from 2.10 on and every Python from 3.10 on. torch's
headers are all that the build needs of torch; it is found, not imported.

Environment variables:

* ``CXX``: the C++ compiler (default: the first of c++, g++, clang++ that works).
* ``MAX_JOBS``: compilations at a time (default: the number of processors).
* ``FUSEDREG_CPU=0``: install without the CPU extension. ``FUSEDREG_CPU=1`` (the default) builds it or fails.
* ``FUSEDREG_CUDA=1``: build the CUDA extension or fail; ``FUSEDREG_CUDA=0``: leave it out. Default: build it where
  nvcc is found, whether or not there is a GPU.
* ``FUSEDREG_CUDA_ARCHITECTURES``: compute capabilities to compile for (default ``8.0;9.0``, and PTX for newer ones).
* ``NVCC_CCBIN``: the C++ compiler that nvcc calls (default: the one that compiles the rest).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_build  # noqa: E402  (lies in tools/, not on the path of a PEP 517 build)
import native_build  # noqa: E402

if int(setuptools.__version__.split(".")[0]) < native_build.MINIMUM_SETUPTOOLS:
    raise SystemExit(
        f"fusedreg needs setuptools {native_build.MINIMUM_SETUPTOOLS} or newer to build, got "
        f"{setuptools.__version__}. Run: pip install --upgrade setuptools wheel"
    )

from setuptools import Extension, setup  # noqa: E402  (after the check: older ones lack what comes next)
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

CPU, CUDA = "fusedreg._cpu", "fusedreg._cuda"


class BuildNative(build_ext):
    """Compiles through :mod:`native_build`; setuptools only says where the results go."""

    def run(self) -> None:
        """Builds every extension that is asked for, or stops with what to do about it."""
        try:
            torch = native_build.find_torch()
            compiler = native_build.find_compiler()
            native_build.check_toolchain(compiler)
        except native_build.BuildError as error:
            raise SystemExit(f"\nfusedreg: cannot build the compiled extensions.\n{error}\n") from None
        self.report: list[str] = [f"torch {torch.version} (stable ABI, runs with 2.10 and newer)", f"{compiler.banner}"]
        self.native = (torch, compiler)
        super().run()
        if not cuda_build.status().possible:
            self.report.append(f"CUDA extension: not built ({cuda_build.status().reason})")
        print("\nfusedreg build summary\n  " + "\n  ".join(self.report) + "\n", flush=True)

    def get_ext_filename(self, fullname: str) -> str:
        """The same for every Python, whatever each calls its own extensions: the package looks for this name."""
        return f"{fullname.replace('.', os.sep)}.abi3.so"

    def build_extension(self, extension: Extension) -> None:
        """Builds one extension into the place that setuptools names."""
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        torch, compiler = self.native
        for_cuda = extension.name == CUDA
        try:
            plan = cuda_build.cuda_plan(torch, compiler) if for_cuda else native_build.cpu_plan(torch)
            native_build.build(plan, compiler, cuda_build.OBJECTS if for_cuda else native_build.OBJECTS, target)
            if for_cuda:
                cuda_build.write_register_report(cuda_build.register_report())
        except native_build.BuildError as error:
            remedy = "\nFUSEDREG_CUDA=0 builds without CUDA." if for_cuda else ""
            raise SystemExit(f"\nfusedreg: building {extension.name} failed.\n{error}{remedy}\n") from None
        self.report.append(f"{plan.title}: {target.name}, {target.stat().st_size // 1024} KiB, {plan.details}")


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel ``py3-none``: the extensions use no Python symbol at all, so that a Python without a global lock,
    which knows no ``abi3``, takes them too.
    """

    def get_tag(self) -> tuple[str, str, str]:
        """Of what setuptools derives from the running interpreter, the platform."""
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    """The extensions to build: asked for or found possible, never left out in silence."""
    found: list[Extension] = []
    if native_build.cpu_wanted():
        found.append(Extension(CPU, sources=[]))
    else:
        print("fusedreg: FUSEDREG_CPU=0, so the CPU extension is left out", flush=True)
    status = cuda_build.status()
    if status.possible:
        found.append(Extension(CUDA, sources=[]))
    elif status.demanded:
        raise SystemExit(f"\nfusedreg: FUSEDREG_CUDA=1, but the CUDA extension cannot be built: {status.reason}\n")
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel})
