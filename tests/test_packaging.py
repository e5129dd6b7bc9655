"""What is built, and how: binary compatibility, instruction sets kept apart, wheel and sdist, errors of the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import native_build
import pytest

import fusedreg
from fusedreg.backends import cpu, cuda

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = cpu.library_path()
CUDA_LIBRARY = cuda.library_path()
OBJECTS = native_build.OBJECTS

compiled = pytest.mark.skipif(not LIBRARY.exists(), reason=f"not run: {LIBRARY.name} is not built")
with_cuda = pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason=f"not run: {CUDA_LIBRARY.name} is not built")
each_library = pytest.mark.parametrize(
    "library", [pytest.param(LIBRARY, marks=compiled, id="cpu"), pytest.param(CUDA_LIBRARY, marks=with_cuda, id="cuda")]
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="not run: reads ELF files with nm and objdump")
has_objects = pytest.mark.skipif(
    not (OBJECTS / "kernels_portable.o").exists(), reason="not run: the object files are not kept here"
)


def output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def symbols(path: Path, *options: str) -> Iterator[tuple[str, str]]:
    """``(type letter, demangled name)`` of a file's symbols."""
    for line in output("nm", "-C", *options, path).splitlines():
        match = re.match(r"(?:[0-9a-f]+ )? *([A-Za-z]) (.+)", line.strip())
        if match:
            yield match[1], match[2]


# Binary compatibility ---------------------------------------------------------------------------------------------

# What a file may need of the outside: LibTorch's stable C interface, and the C and C++ runtimes.
STABLE = re.compile(
    r"(aoti_torch_|torch_)\w+$"
    r"|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"  # a versioned symbol of a runtime
    r"|std::|(vtable|typeinfo|VTT) for (std|__cxxabiv1)::|operator (new|delete)|__(gxx|cxa|gmon)_|_ITM_|_Unwind_"
)
UNSTABLE = re.compile(r"\b(c10|at|caffe2|torch::(?!stable|headeronly))::|^_?Py")


def test_the_files_are_named_alike_for_every_python() -> None:
    assert (LIBRARY.name, CUDA_LIBRARY.name) == ("_cpu.abi3.so", "_cuda.abi3.so")


@each_library
@linux
def test_only_stable_symbols_are_needed(library: Path) -> None:
    """CUDA's runtime is inside; the current stream comes from torch, with the rest of its C interface."""
    needed = [name for _, name in symbols(library, "-D", "--undefined-only")]
    assert any(name.startswith("torch_library_impl") for name in needed), "is this the extension?"
    assert [name for name in needed if not STABLE.match(name) or UNSTABLE.search(name)] == []


@with_cuda
@linux
def test_the_cuda_file_loads_no_cuda_library_itself() -> None:
    """It was linked where torch may have been built for the CPU alone, and runs with the CUDA that torch brings."""
    needed = re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-d", CUDA_LIBRARY))
    assert "libtorch.so" in needed
    assert [name for name in needed if re.match(r"lib(cu|nv|torch_cuda|c10)", name)] == []


@each_library
@linux
def test_nothing_of_ours_is_exported(library: Path) -> None:
    """Another library that happens to define the same name must not take its place, nor ours another's."""
    exported = [name for kind, name in symbols(library, "-D", "--defined-only") if kind in "TDBR"]
    assert [name for name in exported if not re.match(r"_(init|fini|edata|end)$|__bss_start$", name)] == []


@each_library
def test_no_path_of_the_build_machine_is_inside(library: Path) -> None:
    assert os.fsencode(ROOT) not in library.read_bytes()


@compiled
def test_an_import_as_a_module_is_harmless() -> None:
    """The file holds operators, no module: an import says so, and the operators work afterwards."""
    program = (
        "import fusedreg.backends, torch\n"
        "try:\n    import fusedreg._cpu\nexcept ImportError as error:\n    print('ImportError')\n"
        "print(torch.ops.fusedreg._cpu_version())"
    )
    answer = output(sys.executable, "-c", program)
    assert answer.split() == ["ImportError", fusedreg.__version__]


# Instruction sets -------------------------------------------------------------------------------------------------


def object_files() -> dict[str, Path]:
    names = ["registration", *(unit.object_name for unit in native_build.kernel_units())]
    return {name: OBJECTS / f"{name}.o" for name in names}


def instruction_set_of(name: str) -> str | None:
    return name.removeprefix("kernels_") if name.startswith("kernels_") else None


@linux
@has_objects
@pytest.mark.parametrize("name", [f"kernels_{each}" for each in native_build.instruction_sets()])
def test_kernels_share_no_inline_function(name: str) -> None:
    """What is weak in two object files exists once after linking, and may be the one with AVX in it.

    So whatever an instruction set's object offers to others has to carry that instruction set in its name.
    """
    instruction_set = instruction_set_of(name)
    shared = [symbol for kind, symbol in symbols(OBJECTS / f"{name}.o", "--defined-only") if kind in "WVuTDBR"]
    foreign = [symbol for symbol in shared if f"::{instruction_set}::" not in symbol]
    # Data without code: the pointer to the exception handler's routine.
    assert [symbol for symbol in foreign if not symbol.startswith("DW.ref.__gxx_personality")] == []


@linux
@has_objects
@pytest.mark.skipif("avx2" not in native_build.instruction_sets(), reason="not run: no x86-64")
def test_wide_registers_stay_in_their_objects() -> None:
    """Only what is chosen at run time may need more than the processor of every user has."""
    for name, path in object_files().items():
        code = output("objdump", "-d", "--no-show-raw-insn", path)
        instruction_set = instruction_set_of(name)
        assert ("%zmm" in code) == (instruction_set == "avx512"), f"{name}: 512-bit registers"
        assert ("%ymm" in code) <= (instruction_set in ("avx2", "avx512")), f"{name}: 256-bit registers"
        if instruction_set == "avx2":
            assert "vfmadd" in code


# Wheel and sdist --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, with its object files, so that packaging leaves nothing behind in this one."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "*.egg-info", "__pycache__", "lib.*", "sanitize", "bench", ".*cache", "cuda_*tion"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.mark.build
@compiled
@linux
def test_wheel(tree: Path) -> None:
    folder, log = tree.parent / "wheel", tree.parent / "wheel.log"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    pip += ["--log", str(log)]
    build = [*pip, "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, "."]
    # What this checkout has is built again, from the same object files.
    environment = {**os.environ, "FUSEDREG_CUDA": "1" if CUDA_LIBRARY.exists() else "0"}
    subprocess.run([str(part) for part in build], cwd=tree, env=environment, check=True, capture_output=True)
    told = log.read_text()
    assert "fusedreg build summary" in told
    assert re.search(r"CPU extension: _cpu\.abi3\.so, \d+ KiB, ", told)
    built = r"CUDA extension: _cuda\.abi3\.so, \d+ KiB, nvcc [\d.]+, compute capabilities "
    assert re.search(built if CUDA_LIBRARY.exists() else r"CUDA extension: not built \(FUSEDREG_CUDA=0\)", told)
    (wheel,) = folder.glob("*.whl")
    assert re.fullmatch(rf"fusedreg-{re.escape(fusedreg.__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as members:
        names = members.namelist()
    assert {"fusedreg/_cpu.abi3.so", "fusedreg/py.typed", "fusedreg/backends/cpu.py"} <= set(names)
    assert ("fusedreg/_cuda.abi3.so" in names) == CUDA_LIBRARY.exists()
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fusedreg").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected

    # What was installed runs, far from the checkout.
    installed = tree.parent / "installed"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", "-t", installed, wheel], check=True)
    program = "import fusedreg, fusedreg.backends as b; print(fusedreg.__file__); print(b.availability('cpu'))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=tree.parent, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert answer == [str(installed / "fusedreg" / "__init__.py"), "Availability(available=True, reason='')"]


@pytest.mark.build
def test_sdist_holds_all_that_a_build_needs(tree: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", "dist"], cwd=tree, check=True, capture_output=True)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.split("/", 1)[1] for name in members.getnames() if "/" in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert (
        sources | {"setup.py", "pyproject.toml", "tools/native_build.py", "tools/cuda_build.py", "LICENSE", "README.md"}
        <= names
    )
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


# Errors of the build ----------------------------------------------------------------------------------------------


@pytest.mark.build
@pytest.mark.parametrize("command", [("setup.py", "build_ext", "--inplace")])
def test_no_compiler(command: tuple[str, ...]) -> None:
    environment = {**os.environ, "CXX": "/nowhere/c++"}
    answer = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode != 0
    assert "C++ compiler: expected GCC 10, Clang 12 or newer, found none (CXX=/nowhere/c++ tried)" in answer.stderr
    assert "apt-get install g++" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(native_build.BuildError, match=r"torch: expected 2\.10 or newer in .*, found none") as caught:
        native_build.find_torch()
    assert "pip install --no-build-isolation ." in str(caught.value)


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117", "nonsense"])
def test_old_torch(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(native_build.BuildError, match=r"torch: expected 2\.10 or newer .* found " + re.escape(version)):
        native_build.find_torch()


def test_torch_without_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.12.0'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(native_build.BuildError, match="without its C\\+\\+ headers"):
        native_build.find_torch()


def test_cuda_by_name_is_never_left_out_in_silence() -> None:
    program = (
        "import runpy, sys; sys.path.insert(0, 'tools'); import cuda_build; cuda_build.find_nvcc = lambda: None; "
        "sys.argv[:] = ['setup.py', '--version']; runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {**os.environ, "FUSEDREG_CUDA": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode != 0
    assert "FUSEDREG_CUDA=1, but the CUDA extension cannot be built" in answer.stderr


def test_a_broken_compiler_is_named(tmp_path: Path) -> None:
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'old compiler 1.0' && exit 0\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(native_build.BuildError, match=r"old compiler 1\.0 does not compile a C\+\+20 file"):
        native_build.check_toolchain(native_build.Compiler((str(script),), "old compiler 1.0"))


# Incremental compilation ------------------------------------------------------------------------------------------


@pytest.mark.build
def test_only_what_changed_is_compiled(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compiler = native_build.find_compiler()
    (tmp_path / "a b.h").write_text("inline int value() { return 1; }\n")
    (tmp_path / "one.cpp").write_text('#include "a b.h"\nint one() { return value(); }\n')
    (tmp_path / "two.cpp").write_text("int two() { return 2; }\n")
    units = [native_build.Unit(tmp_path / f"{name}.cpp", name) for name in ("one", "two")]

    def compiled_units(*flags: str) -> list[str]:
        native_build.compile_units(units, flags, compiler, tmp_path / "objects")
        return sorted(re.findall(r"compiling (\w+)", capfd.readouterr().out))

    assert compiled_units() == ["one", "two"]
    assert compiled_units() == []
    stamp = (tmp_path / "objects" / "one.o").stat().st_mtime_ns + 1_000_000
    os.utime(tmp_path / "a b.h", ns=(stamp, stamp))
    assert compiled_units() == ["one"]
    assert compiled_units("-O1") == ["one", "two"]
    (tmp_path / "two.cpp").write_text("int two() { return }\n")
    with pytest.raises(native_build.BuildError, match=r"two\.cpp \(two\): the compiler failed"):
        compiled_units("-O1")


# What else a user meets first -------------------------------------------------------------------------------------


def test_collect_env_prints_what_a_bug_report_needs() -> None:
    answer = output(sys.executable, "-m", "fusedreg.collect_env")
    for name in ("fusedreg", "torch", "python", "processor", "CPU extension", "backend cpu", "instruction sets"):
        assert re.search(rf"^{name} +\S", answer, re.MULTILINE), name


def test_the_version_is_one() -> None:
    assert native_build.version() == fusedreg.__version__
    assert re.search(r'^dynamic = \["version"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_make_names_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("not run: no make")
    answer = output("make", "-C", ROOT, "--no-print-directory", "help")
    for target in ("bench", "test", "lint", "sanitize", "mutate", "registers", "build"):
        assert f"make {target} " in answer
