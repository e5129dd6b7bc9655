"""What of CUDA is compiled and how: the extension by nvcc, and the same sources as C++ over the emulator.

The extension needs nvcc and torch's headers, neither a GPU nor a CUDA build of torch. The emulated library needs the
C++ compiler alone; the tests drive it as a backend of its own (``make test`` builds it).

    python tools/cuda_build.py emulation     builds build/cuda_emulation/libfusedreg_cuda_emulated.so
    python tools/cuda_build.py registers     what ptxas said of each kernel of the built extension
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import native_build
from native_build import ROOT, BuildError, Compiler, Plan, Torch, Unit

SOURCES = ROOT / "csrc" / "cuda"
REGISTRATION = ROOT / "csrc" / "registration_cuda.cpp"
OBJECTS = ROOT / "build" / "cuda"
EMULATION = ROOT / "build" / "cuda_emulation"
EMULATED_LIBRARY = EMULATION / "libfusedreg_cuda_emulated.so"
# Machine code for these, and PTX of the last for what comes later. Clusters exist from 9.0 on.
ARCHITECTURES = ("80", "90")
ARCHITECTURES_VARIABLE = "FUSEDREG_CUDA_ARCHITECTURES"
OLDEST_ARCHITECTURE = 80
PTXAS_LOG = ".ptxas"


@dataclass(frozen=True)
class Status:
    """Whether the CUDA extension can be built, whether it was asked for by name, and the reason."""

    possible: bool
    demanded: bool
    reason: str


def find_nvcc() -> Path | None:
    """``nvcc`` of ``$CUDA_HOME`` or ``$CUDA_PATH``, on the PATH, or where the toolkit installs itself."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    return Path(found) if found else None


def status() -> Status:
    """Whether the CUDA extension is to be built: a matter of ``FUSEDREG_CUDA`` and of nvcc, never of a GPU."""
    wanted = native_build.cuda_wanted()
    if wanted is False:
        return Status(False, False, "FUSEDREG_CUDA=0")
    if not REGISTRATION.exists():
        return Status(False, bool(wanted), f"{REGISTRATION.relative_to(ROOT)} is missing; fetch the sources again")
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "no nvcc: install the CUDA toolkit (12.0 or newer), add its bin folder to the PATH or set CUDA_HOME"
        return Status(False, bool(wanted), reason)
    return Status(True, bool(wanted), f"{nvcc} found")


def architectures() -> tuple[str, ...]:
    """Compute capabilities to compile for, as nvcc writes them, oldest first."""
    text = os.environ.get(ARCHITECTURES_VARIABLE, "").strip()
    if not text:
        return ARCHITECTURES
    names = [name.removeprefix("sm_").replace(".", "") for name in re.split(r"[;,\s]+", text)]
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < OLDEST_ARCHITECTURE:
            raise BuildError(
                f"{ARCHITECTURES_VARIABLE}: expected compute capabilities from 8.0 on, such as '8.0;9.0', got {text!r}"
            )
    return tuple(sorted(dict.fromkeys(names), key=lambda name: int(name.rstrip("af"))))


def nvcc_compiler(compiler: Compiler) -> Compiler:
    """nvcc, with the C++ compiler of the rest of the build behind it unless ``NVCC_CCBIN`` names another."""
    path = find_nvcc()
    if path is None:
        raise BuildError(f"nvcc: {status().reason}")
    answer = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    if answer.returncode != 0 or release is None:
        raise BuildError(f"nvcc: {path} does not run:\n{answer.stdout}{answer.stderr}")
    if int(release[1]) < 12:
        raise BuildError(f"nvcc: expected CUDA 12.0 or newer, got {release[1]}.{release[2]} in {path}; upgrade it")
    host = [] if os.environ.get("NVCC_CCBIN") else ["-ccbin", compiler.command[-1]]
    return Compiler((str(path), *host), f"nvcc {release[1]}.{release[2]}")


def kernel_flags() -> tuple[str, ...]:
    """What nvcc is told. Optimised code of each architecture, no fast maths: NaN and the last bits count here."""
    names = architectures()
    generate: list[str] = []
    for name in names:
        code = f"[sm_{name},compute_{name}]" if name == names[-1] else f"sm_{name}"
        generate += ["-gencode", f"arch=compute_{name},code={code}"]
    host = "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall"
    return ("-std=c++17", "-O3", "-DNDEBUG", *generate, "-Xptxas", "-v", "-Xcompiler", host)


def _registration(torch: Torch, *flags: str) -> list[Unit]:
    if not REGISTRATION.exists():
        return []
    definitions = (
        "-std=c++20",
        f"-DTORCH_TARGET_VERSION={native_build.TARGET_VERSION}",
        f'-DFUSEDREG_VERSION="{native_build.version()}"',
    )
    system = (f"-ffile-prefix-map={torch.include}=torch", "-isystem", str(torch.include))
    return [Unit(REGISTRATION, REGISTRATION.stem, (*definitions, *system, *flags))]


def cuda_plan(torch: Torch, compiler: Compiler) -> Plan:
    """The CUDA extension: kernels and launches by nvcc, the rest by the C++ compiler.

    The runtime is linked statically. ``libtorch.so`` stands for torch: in a CUDA build of torch it brings
    ``libtorch_cuda``, where the current stream comes from, and it is there to link with in a CPU build too.
    """
    nvcc = nvcc_compiler(compiler)
    kernels = [Unit(path, path.stem, kernel_flags(), nvcc, PTXAS_LOG) for path in sorted(SOURCES.glob("*.cu"))]
    hosts = [Unit(path, f"{path.stem}_host") for path in sorted(SOURCES.glob("*.cpp"))]
    # By way of the linker alone: nvcc would write the folder into the file.
    link = ["-shared", "--cudart", "static", "-Xlinker", f"-L{torch.library}"]
    for option in ("--no-as-needed", "-ltorch", "-ltorch_cpu", "-z", "relro", "-z", "now", "--exclude-libs", "ALL"):
        link += ["-Xlinker", option]
    return Plan(
        title="CUDA extension",
        details=f"{nvcc.banner}, compute capabilities {', '.join(architectures())}",
        units=(*_registration(torch, "-DUSE_CUDA"), *hosts, *kernels),
        flags=native_build.common_flags(),
        link_flags=tuple(link),
        linker=nvcc,
    )


def emulation_flags() -> tuple[str, ...]:
    """Flags of the emulated library: compiled quickly enough to be compiled often, fast enough to be tested with."""
    flags = ("-std=c++17", "-O2", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
    return (*flags, "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DFUSEDREG_CUDA_EMULATION")


def emulation_units() -> tuple[Unit, ...]:
    """The kernels, what launches them and the emulator, without torch."""
    kernels = [Unit(path, path.stem, ("-x", "c++")) for path in sorted(SOURCES.glob("*.cu"))]
    hosts = [Unit(path, f"{path.stem}_host") for path in sorted(SOURCES.glob("*.cpp"))]
    emulator = [Unit(path, f"emulation_{path.stem}") for path in sorted((SOURCES / "emulation").glob("*.cpp"))]
    return (*kernels, *hosts, *emulator)


def emulation_plan(torch: Torch) -> Plan:
    """The emulated library: the same operators under a library name of their own, for tensors on the CPU."""
    link = ["-shared", f"-L{torch.library}", "-ltorch_cpu", "-pthread"]
    link += ["-Wl,--no-undefined"] if sys.platform == "linux" else []
    return Plan(
        title="CUDA emulation",
        details="every CUDA thread a fiber",
        units=(*emulation_units(), *_registration(torch)),
        flags=emulation_flags(),
        link_flags=tuple(link),
    )


def build_emulation() -> Path:
    """Builds what is out of date of the emulated library; one process at a time, the others wait."""
    compiler = native_build.find_compiler()
    EMULATION.mkdir(parents=True, exist_ok=True)
    with (EMULATION / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        native_build.build(emulation_plan(native_build.find_torch()), compiler, EMULATION, EMULATED_LIBRARY)
    return EMULATED_LIBRARY


@dataclass(frozen=True)
class KernelReport:
    """What ptxas says of one kernel on one architecture; bytes and 32-bit registers of a thread."""

    source: str
    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


def _readable(names: list[str]) -> list[str]:
    """Demangled, without the namespaces and parameters that all kernels share."""
    if shutil.which("c++filt") is None:
        return names
    answer = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = (re.sub(r"\(anonymous namespace\)::|fusedreg::(cuda::)?|^void ", "", name) for name in answer.splitlines())
    return [re.sub(r"\([^()]*\)$", "", name) for name in plain]


def register_report(folder: Path = OBJECTS) -> list[KernelReport]:
    """What the logs beside the objects in ``folder`` say, an entry a kernel and architecture."""
    found: list[KernelReport] = []
    logs = (folder / f"{source.stem}{PTXAS_LOG}" for source in sorted(SOURCES.glob("*.cu")))
    for log in filter(Path.exists, logs):
        # A kernel's own properties follow its name; those of functions that it calls may come between.
        for part in re.split(r"(?=ptxas info *: Compiling entry function)", log.read_text()):
            entry, used = _ENTRY.search(part), _USED.search(part)
            properties = re.search(rf"Function properties for {entry[1]}\n *(.*)", part) if entry else None
            frame = _FRAME.search(properties[1]) if properties else None
            if entry and used and frame:
                numbers = (int(used[1]), int(frame[1]), int(frame[2]), int(frame[3]))
                found.append(KernelReport(log.stem, entry[1], entry[2], *numbers))
    names = _readable([each.kernel for each in found])
    return [KernelReport(**{**vars(each), "kernel": name}) for each, name in zip(found, names, strict=True)]


def write_register_report(reports: list[KernelReport], target: Path = OBJECTS / "registers.txt") -> str:
    """The report as a table, into ``target``."""
    lines = [f"{'architecture':12} {'registers':>9} {'stack':>5} {'spilled':>7}  kernel"]
    for each in sorted(reports, key=lambda each: (each.source, each.kernel, each.architecture)):
        spilled = each.spill_stores + each.spill_loads
        lines.append(
            f"{each.architecture:12} {each.registers:9} {each.stack:5} {spilled:7}  {each.source}: {each.kernel}"
        )
    text = "\n".join(lines) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return text


def main() -> int:
    """Does what is asked for; 0 where it succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("emulation", "registers"))
    what = parser.parse_args().what
    try:
        if what == "emulation":
            print(build_emulation())
        else:
            print(write_register_report(register_report()), end="")
    except BuildError as error:
        print(f"\nfusedreg: {error}\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
