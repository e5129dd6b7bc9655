"""What setup.py compiles and how: sources, flags, incremental compilation, linking.

Kept out of setup.py, and free of setuptools, so that ``make sanitize`` and the tests of the build can use it.
A kernel source is compiled once for each instruction set, with a namespace and flags of its own; setuptools'
own compiler class knows one set of flags an extension, which is why the compiler is called from here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Objects lie in one place for every Python: nothing in them depends on it.
OBJECTS = ROOT / "build" / "native"
MINIMUM_TORCH = (2, 10)
MINIMUM_SETUPTOOLS = 77  # the first that reads `license = "..."` and `license-files` in pyproject.toml
# torch/csrc/stable/version.h: the oldest torch that the built file must load in.
TARGET_VERSION = "0x020a000000000000"

# Best last: the order of linking, see `build`.
X86_INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
}


class BuildError(Exception):
    """Something the person at the keyboard has to do; the message says what."""


@dataclass(frozen=True)
class Torch:
    """Where torch is, without importing it (an import takes seconds and may fail for reasons of its own)."""

    version: str
    include: Path
    library: Path


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command to call, and its own first line of ``--version``."""

    command: tuple[str, ...]
    banner: str


@dataclass(frozen=True)
class Unit:
    """One call of a compiler: a source, the name of its object file, and its flags."""

    source: Path
    object_name: str
    flags: tuple[str, ...] = ()
    compiler: Compiler | None = None  # another than the plan's, such as nvcc: the plan's flags mean nothing to it
    log: str = ""  # the suffix of a file, beside the object, for what the compiler says of its work (ptxas's report)


@dataclass(frozen=True)
class Plan:
    """One extension: what to compile, how to link, and a line for the summary."""

    title: str
    details: str
    units: tuple[Unit, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    linker: Compiler | None = None  # another than the compiler of the sources


def _switch(name: str) -> bool | None:
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise SystemExit(f"fusedreg: {name}: expected 0, 1 or nothing, got {value!r}")


def cpu_wanted() -> bool:
    """Whether to build the CPU extension: unless ``FUSEDREG_CPU=0``."""
    return _switch("FUSEDREG_CPU") is not False


def cuda_wanted() -> bool | None:
    """What ``FUSEDREG_CUDA`` says of the CUDA extension: to build it or fail, to leave it out, or nothing."""
    return _switch("FUSEDREG_CUDA")


def find_torch() -> Torch:
    """The torch of this interpreter, or a :class:`BuildError` with the remedy."""
    found = importlib.util.find_spec("torch")
    remedy = (
        "The extensions are compiled against the torch that is installed, so install it first, and keep pip from\n"
        "building in an environment of its own, which has no torch:\n"
        "    pip install 'torch>=2.10' 'setuptools>=77' wheel\n"
        "    pip install --no-build-isolation ."
    )
    if found is None or not found.submodule_search_locations:
        raise BuildError(f"torch: expected 2.10 or newer in {sys.executable}, found none.\n{remedy}")
    folder = Path(next(iter(found.submodule_search_locations)))
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        text = ""
    match = re.search(r"^__version__ *(?::.*)?= *['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    version = match.group(1) if match else "unknown"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MINIMUM_TORCH:
        raise BuildError(f"torch: expected 2.10 or newer (the stable ABI used here), found {version}.\n{remedy}")
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise BuildError(
            f"torch: {version} in {folder} comes without its C++ headers (include/torch/csrc/stable).\n"
            "Install a complete build of torch, then try again."
        )
    return Torch(version, folder / "include", folder / "lib")


def find_compiler() -> Compiler:
    """``$CXX``, or the first of c++, g++ and clang++ that answers."""
    asked = os.environ.get("CXX", "").strip()
    candidates = [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]) is None:
            continue
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout:
            return Compiler(tuple(command), answer.stdout.splitlines()[0])
    tried = f"CXX={asked}" if asked else "c++, g++ and clang++"
    raise BuildError(
        f"C++ compiler: expected GCC 10, Clang 12 or newer, found none ({tried} tried). Install one, for example\n"
        "    apt-get install g++          (Debian, Ubuntu)\n"
        "    dnf install gcc-c++          (Fedora, RHEL)\n"
        "    xcode-select --install       (macOS)\n"
        "or name it: CXX=/path/to/g++. Without one, FUSEDREG_CPU=0 installs the pure Python reference alone,\n"
        "which is much slower."
    )


def check_toolchain(compiler: Compiler) -> None:
    """Compiles nothing but a C++20 file, so that a broken tool-chain is named before torch's headers are."""
    if sys.platform == "win32":
        raise BuildError("Windows: the extensions need GCC or Clang. Build under WSL, or set FUSEDREG_CPU=0.")
    program = "#include <atomic>\n#include <optional>\nstd::optional<int> value;\n"
    command = [*compiler.command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    answer = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise BuildError(
            f"C++ compiler: {compiler.banner} does not compile a C++20 file that includes <optional>.\n"
            f"Install GCC 10, Clang 12 or newer with its standard library. It said:\n{answer.stderr}"
        )


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """The instruction sets to build for, each with its flags: all three on x86-64, elsewhere the portable one."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86_INSTRUCTION_SETS
    return {"portable": ()}


def version() -> str:
    """The package's version, without importing the package (which imports torch)."""
    match = re.search(r'__version__ = "([^"]+)"', (ROOT / "fusedreg" / "_version.py").read_text())
    assert match is not None, "fusedreg/_version.py names no version"
    return match.group(1)


def common_flags(with_sanitizers: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Flags of every C++ file. No ``-ffast-math``, since NaN counts here, and no ``-march=native``."""
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-pthread"]
    flags += ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
    flags += [] if with_sanitizers else ["-DNDEBUG"]
    if with_sanitizers:
        flags[flags.index("-O3")] = "-O1"  # half the time to compile, and a readable trace
        flags += ["-fexpensive-optimizations"]  # GCC contracts a * b + c under this one; the error budget relies on it
        flags += [f"-fsanitize={','.join(with_sanitizers)}", "-fno-omit-frame-pointer", "-g1"]
        flags += ["-DFUSEDREG_POISON_WORKSPACE"]  # scratch memory starts as NaN
        if "undefined" in with_sanitizers:
            flags += ["-fno-sanitize-recover=undefined"]
    return tuple(flags)


def kernel_units() -> tuple[Unit, ...]:
    """The CPU kernels, free of torch: once for each instruction set, and what chooses among them."""
    sets = instruction_sets()
    have = tuple(f"-DFUSEDREG_HAVE_{name.upper()}" for name in sets if name != "portable")
    folder = ROOT / "csrc" / "cpu"
    once = sorted(path for path in folder.glob("*.cpp") if path.name != "kernels.cpp")
    units = [Unit(path, path.stem, have) for path in once]
    units += [
        Unit(folder / "kernels.cpp", f"kernels_{name}", (f"-DFUSEDREG_ISA_NAMESPACE={name}", *flags))
        for name, flags in sets.items()
    ]
    return tuple(units)


def cpu_plan(torch: Torch, with_sanitizers: tuple[str, ...] = ()) -> Plan:
    """The CPU extension. torch's headers are system headers: their warnings are not ours."""
    sources = ROOT / "csrc"
    # Torch builds itself, and its extensions, as C++20; its stable headers need no more than C++17 so far.
    definitions = ("-std=c++20", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f'-DFUSEDREG_VERSION="{version()}"')
    registration = Unit(
        sources / "registration.cpp",
        "registration",
        (*definitions, f"-ffile-prefix-map={torch.include}=torch", "-isystem", str(torch.include)),
    )
    link = ["-shared", f"-L{torch.library}", "-ltorch_cpu", "-pthread"]
    if sys.platform == "linux":
        link += ["-Wl,--as-needed", "-Wl,-z,relro,-z,now"]
        # A kernel that was declared and never written is found here, not when a user loads the file.
        link += [] if with_sanitizers else ["-Wl,--no-undefined"]
    if with_sanitizers:
        link += [f"-fsanitize={','.join(with_sanitizers)}"]
    details = "instruction sets " + ", ".join(reversed(list(instruction_sets())))
    if with_sanitizers:
        details += ", sanitizers " + ", ".join(with_sanitizers)
    return Plan(
        title="CPU extension",
        details=details,
        # The choice among the CUDA kernels' tiers is plain C++: explain() asks it where there is no GPU, too.
        units=(registration, Unit(sources / "cuda" / "plan.cpp", "plan", ()), *kernel_units()),
        flags=common_flags(with_sanitizers),
        link_flags=tuple(link),
    )


def _relative(path: Path) -> str:
    """Paths inside the checkout, from its root: messages name no build machine, and a moved tree stays built."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _outdated(target: Path, command: list[str], record: Path, dependencies: Path) -> bool:
    """Whether a file must be made again: absent, another command made it, or something it was made of is newer."""
    if not target.exists() or not dependencies.exists() or not record.exists():
        return True
    if json.loads(record.read_text()) != command:
        return True
    # A make rule: "target: file file \ newline file", spaces inside names escaped.
    text = dependencies.read_text().replace("\\\n", " ").split(":", 1)[-1]
    made = target.stat().st_mtime_ns
    for name in shlex.split(text):
        path = ROOT / name
        if not path.exists() or path.stat().st_mtime_ns > made:
            return True
    return False


def _run(command: list[str], what: str, log: Path | None = None) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if answer.returncode != 0:
        killed = answer.returncode < 0 or "Killed" in answer.stderr
        hint = " It was killed: is there enough memory? MAX_JOBS=1 needs the least." if killed else ""
        raise BuildError(f"{what}: the compiler failed.{hint}\n{shlex.join(command)}\n{answer.stdout}{answer.stderr}")
    if log is not None:
        log.write_text(answer.stdout + answer.stderr)
        if "warning" in answer.stderr:
            print(answer.stderr, file=sys.stderr, flush=True)
    elif answer.stderr.strip():
        print(answer.stderr, file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line + "\n", end="", flush=True)  # one write: several compilations talk at once


def compile_units(units: Iterable[Unit], flags: Sequence[str], compiler: Compiler, folder: Path) -> list[Path]:
    """Compiles what is out of date into ``folder``, several at a time; the object files, in the units' order."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_unit(unit: Unit) -> Path:
        made = folder / f"{unit.object_name}.o"
        dependencies, record = made.with_suffix(".d"), made.with_suffix(".json")
        own = unit.compiler
        command = [*own.command, *unit.flags] if own else [*compiler.command, *flags, *unit.flags]
        command += ["-MD", "-MF", _relative(dependencies)]
        command += ["-c", _relative(unit.source), "-o", _relative(made)]
        if _outdated(made, command, record, dependencies):
            if not unit.source.exists():
                raise BuildError(f"{unit.source}: no such file. The sources are incomplete; fetch them again.")
            _say(f"  compiling {unit.object_name}")
            record.unlink(missing_ok=True)
            log = made.with_suffix(unit.log) if unit.log else None
            _run(command, f"{unit.source.name} ({unit.object_name})", log)
            record.write_text(json.dumps(command))
        return made

    jobs = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_unit, units))


def link(objects: Sequence[Path], flags: Sequence[str], compiler: Compiler, target: Path) -> None:
    """Links ``target``, in the order of ``objects``, and replaces it in one move."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    _say(f"  linking {target.name}")
    _run([*compiler.command, *map(_relative, objects), "-o", str(fresh), *flags], target.name)
    # A running process keeps the old file it has mapped; writing into it would crash that process.
    fresh.replace(target)


def build(plan: Plan, compiler: Compiler, folder: Path, target: Path) -> None:
    """Builds an extension: compiles what is out of date in ``folder`` and links ``target``."""
    objects = compile_units(plan.units, plan.flags, compiler, folder)
    # Order matters. Where two objects hold the same inline function of the standard library, the linker keeps
    # the first: it must be one compiled without AVX, or an old processor would run an instruction it lacks.
    # tests/test_packaging.py checks that there is none to begin with.
    link(objects, plan.link_flags, plan.linker or compiler, target)
