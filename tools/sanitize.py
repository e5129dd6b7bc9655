"""``make sanitize``: the kernels under the compilers' sanitizers.

AddressSanitizer and UndefinedBehaviorSanitizer: the whole extension is built with them, beside the ordinary one, and
the tests run over it. Python itself is not built so, which is why their runtime has to be loaded first; libstdc++
with it, or the first exception that torch throws ends the process, for the runtime to have found no ``__cxa_throw``.

ThreadSanitizer: drivers of the kernels' own parallel region, and of the teams that run it, with
``std::thread``. Under Python it would report races
of libraries that are not built with it.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import native_build
from native_build import BuildError, Compiler, Unit

FOLDER = native_build.ROOT / "build" / "sanitize"
DRIVERS = [
    Unit(native_build.ROOT / "tests" / "native" / f"{name}.cpp", name) for name in ("thread_driver", "team_driver")
]
# Leaks: Python and torch keep much until the end that looks like one. Use after return: its stack frames are aligned
# to 32 bytes, and code for AVX-512 that relies on 64 then faults (GCC before 14).
ASAN_OPTIONS = "detect_leaks=0:exitcode=99:allow_user_segv_handler=0:detect_stack_use_after_return=0"
# The files whose tests run kernels; the rest is Python over the reference.
KERNEL_TESTS = [
    "tests/test_registration.py",
    "tests/test_parity.py",
    "tests/test_memory_safety.py",
    "tests/test_models.py",
    "tests/test_threads.py",
    "tests/test_peer_errors.py",
    "tests/test_random_options.py",
    "tests/test_projection.py",
    "tests/test_probes.py",
    "tests/test_ops.py",
    "tests/test_functional.py",
    "tests/test_modules.py",
    "tests/test_bad_inputs.py",
]
NOT_UNDER_SANITIZERS = "not slow and not compile and not build"


def build_drivers(compiler: Compiler, folder: Path, with_sanitizers: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """Builds the two drivers, without torch, in ``folder``: of the kernels' threads, and of the team alone."""
    flags = native_build.common_flags(with_sanitizers)
    link = ["-pthread", *([f"-fsanitize={','.join(with_sanitizers)}"] if with_sanitizers else [])]
    units = [*DRIVERS, *native_build.kernel_units()]
    threads, team, *kernels = native_build.compile_units(units, flags, compiler, folder)
    native_build.link([threads, *kernels], link, compiler, folder / "thread_driver")
    native_build.link([team], link, compiler, folder / "team_driver")
    return folder / "thread_driver", folder / "team_driver"


def runtime(compiler: Compiler, name: str) -> str:
    """The path of one of the compiler's shared libraries."""
    command = [*compiler.command, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise BuildError(
            f"{name}: {compiler.banner} does not come with it. "
            "Install the compiler's sanitizer runtimes, or use GCC: CXX=g++ make sanitize"
        )
    return path


def run_threads(compiler: Compiler) -> int:
    """ThreadSanitizer over the drivers, the kernels' once for each instruction set that this processor has."""
    print("ThreadSanitizer: the kernels' parallel region", flush=True)
    threads, team = build_drivers(compiler, FOLDER / "thread", ("thread",))
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:second_deadlock_stack=1"}
    # Its shadow memory has a fixed place, which the randomised layout of newer kernels may have given away.
    fixed = ["setarch", platform.machine(), "-R"] if sys.platform == "linux" else []
    status = 0
    for command in [[str(team)], *([str(threads), name] for name in native_build.instruction_sets())]:
        answer = subprocess.run([*fixed, *command], env=environment, check=False)
        if answer.returncode not in (0, 77):
            status = 1
    return status


def run_tests(compiler: Compiler, tests: list[str], arguments: list[str]) -> int:
    """AddressSanitizer and UndefinedBehaviorSanitizer over the tests."""
    print("AddressSanitizer and UndefinedBehaviorSanitizer: the tests", flush=True)
    library = FOLDER / "address" / "_cpu.abi3.so"
    plan = native_build.cpu_plan(native_build.find_torch(), ("address", "undefined"))
    native_build.build(plan, compiler, FOLDER / "address", library)
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime(compiler, 'libasan.so')} {runtime(compiler, 'libstdc++.so')}",
        "ASAN_OPTIONS": ASAN_OPTIONS,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FUSEDREG_CPU_LIBRARY": str(library),
        "PYTHONMALLOC": "malloc",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        NOT_UNDER_SANITIZERS,
        "-p",
        "no:faulthandler",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [*command, *arguments, *tests], env=environment, cwd=native_build.ROOT, check=False
    ).returncode


def main() -> int:
    """Builds and runs what is asked for; 0 where the sanitizers had nothing to say."""
    parser = argparse.ArgumentParser(description="The kernels under the compilers' sanitizers.")
    parser.add_argument("--only", choices=("threads", "tests"), help="one half alone")
    parser.add_argument(
        "--tests", default="", help="what pytest runs, separated by spaces (default: what runs kernels)"
    )
    parser.add_argument("arguments", nargs="*", help="passed to pytest, after --")
    options = parser.parse_args()
    try:
        compiler = native_build.find_compiler()
        threads = run_threads(compiler) if options.only != "tests" else None
        tests = (
            run_tests(compiler, options.tests.split() or KERNEL_TESTS, options.arguments)
            if options.only != "threads"
            else None
        )
    except BuildError as error:
        print(f"\nfusedreg: {error}\n", file=sys.stderr)
        return 1
    words = {0: "clean", None: "not run"}
    print(f"ThreadSanitizer: {words.get(threads, 'FAILED')}")
    print(f"AddressSanitizer, UndefinedBehaviorSanitizer: {words.get(tests, 'FAILED')}")
    return 1 if threads or tests else 0


if __name__ == "__main__":
    sys.exit(main())
