"""Builds fusedreg's compiled extensions.

One file an extension: ``fusedreg/_cpu.abi3.so``, written against LibTorch's stable ABI and without a single
Python symbol, so that one built file serves every torch from 2.10 on and every Python from 3.10 on. torch's
headers are all that the build needs of torch; it is found, not imported.

Environment variables:

* ``CXX``: the C++ compiler (default: the first of c++, g++, clang++ that works).
* ``MAX_JOBS``: compilations at a time (default: the number of processors).
* ``FUSEDREG_CPU=0``: install without the CPU extension. ``FUSEDREG_CPU=1`` (the default) builds it or fails.
* ``FUSEDREG_CUDA=1``: build the CUDA extension or fail. Default: build it where its sources and nvcc are found.
"""

from __future__ import annotations

import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import native_build  # noqa: E402  (lies beside this file, not on the path of a PEP 517 build)

if int(setuptools.__version__.split(".")[0]) < native_build.MINIMUM_SETUPTOOLS:
    raise SystemExit(
        f"fusedreg needs setuptools {native_build.MINIMUM_SETUPTOOLS} or newer to build, got "
        f"{setuptools.__version__}. Run: pip install --upgrade setuptools wheel"
    )

from setuptools import Extension, setup  # noqa: E402  (after the check: older ones lack what comes next)
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402


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
        self.report += [f"CUDA extension: not built ({native_build.cuda_status().reason})"]
        print("\nfusedreg build summary\n  " + "\n  ".join(self.report) + "\n", flush=True)

    def build_extension(self, extension: Extension) -> None:
        """Builds one extension into the place that setuptools names."""
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        torch, compiler = self.native
        plan = native_build.cpu_plan(torch)
        try:
            native_build.build(plan, compiler, native_build.OBJECTS, target)
        except native_build.BuildError as error:
            raise SystemExit(f"\nfusedreg: building {extension.name} failed.\n{error}\n") from None
        self.report.append(f"{plan.title}: {target.name}, {target.stat().st_size // 1024} KiB, {plan.details}")


class Abi3Wheel(bdist_wheel):
    """Tags the wheel ``cp310-abi3``: the extensions use no Python symbol at all."""

    def finalize_options(self) -> None:
        """Sets the tag before setuptools derives one from the running interpreter."""
        self.py_limited_api = "cp310"
        super().finalize_options()


def extensions() -> list[Extension]:
    """The extensions to build: asked for or found possible, never left out in silence."""
    found: list[Extension] = []
    if native_build.cpu_wanted():
        found.append(Extension("fusedreg._cpu", sources=[], py_limited_api=True))
    else:
        print("fusedreg: FUSEDREG_CPU=0, so the CPU extension is left out", flush=True)
    status = native_build.cuda_status()
    if status.demanded and not status.possible:
        raise SystemExit(f"\nfusedreg: FUSEDREG_CUDA=1, but the CUDA extension cannot be built: {status.reason}\n")
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": Abi3Wheel})
