"""What nvcc made of the kernels: registers and spills, for each architecture, with no GPU needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import cuda_build
import native_build
import pytest

from fusedreg.backends import cuda

LIBRARY = cuda.library_path()
SOURCES = sorted(path.stem for path in cuda_build.SOURCES.glob("*.cu"))

built = pytest.mark.skipif(
    not cuda_build.status().possible or not LIBRARY.exists(),
    reason=f"not run: {LIBRARY.name} is not built ({cuda_build.status().reason})",
)
has_logs = pytest.mark.skipif(
    not list(cuda_build.OBJECTS.glob(f"*{cuda_build.PTXAS_LOG}")), reason="not run: ptxas's logs are not kept here"
)


def launched_kernels(source: str) -> int:
    """How many kernels the host part of an object can launch: each has a stub, or what is left of an inlined one."""
    path = cuda_build.OBJECTS / f"{source}.o"
    names = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    return len(set(re.findall(r"\b__device_stub__\w+", names)))


@built
@has_logs
def test_every_kernel_is_reported_for_every_architecture() -> None:
    reports = cuda_build.register_report()
    print(cuda_build.write_register_report(reports))
    kernels = {(each.source, each.kernel) for each in reports}
    found = {(each.source, each.kernel, each.architecture) for each in reports}
    wanted = {(*kernel, f"sm_{name}") for kernel in kernels for name in cuda_build.architectures()}
    assert found == wanted
    for source in SOURCES:
        assert len([kernel for kernel in kernels if kernel[0] == source]) == launched_kernels(source), source
    assert (cuda_build.OBJECTS / "registers.txt").exists()


@built
@has_logs
@pytest.mark.parametrize("architecture", [f"sm_{name}" for name in cuda_build.architectures()])
def test_persistent_kernels_keep_everything_in_registers(architecture: str) -> None:
    """A spill costs a trip to memory at every step; a stack frame is an array that was indexed at run time."""
    reports = [each for each in cuda_build.register_report() if each.architecture == architecture]
    persistent = [each for each in reports if each.source.startswith("persistent_")]
    assert persistent, "the persistent kernels are in no log"
    spilled = [each for each in persistent if each.stack or each.spill_stores or each.spill_loads]
    assert not spilled, cuda_build.write_register_report(spilled, cuda_build.OBJECTS / "spilled.txt")


# The build's own choices -------------------------------------------------------------------------------------------


def test_architectures_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cuda_build.ARCHITECTURES_VARIABLE, raising=False)
    assert cuda_build.architectures() == ("80", "90")
    for text in ("9.0;8.6", "90 86", "sm_90,sm_86"):
        monkeypatch.setenv(cuda_build.ARCHITECTURES_VARIABLE, text)
        assert cuda_build.architectures() == ("86", "90")
        flags = " ".join(cuda_build.kernel_flags())
        assert "arch=compute_86,code=sm_86 " in flags and "code=[sm_90,compute_90]" in flags
    for text in ("7.5", "fast"):
        monkeypatch.setenv(cuda_build.ARCHITECTURES_VARIABLE, text)
        with pytest.raises(native_build.BuildError, match=r"expected compute capabilities from 8\.0 on"):
            cuda_build.architectures()


def test_nvcc_decides_and_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    monkeypatch.delenv("FUSEDREG_CUDA", raising=False)
    assert not cuda_build.status().possible and not cuda_build.status().demanded
    assert "install the CUDA toolkit" in cuda_build.status().reason
    monkeypatch.setenv("FUSEDREG_CUDA", "1")
    assert not cuda_build.status().possible and cuda_build.status().demanded
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: tmp_path / "nvcc")
    assert cuda_build.status().possible
    monkeypatch.setenv("FUSEDREG_CUDA", "0")
    assert not cuda_build.status().possible and cuda_build.status().reason == "FUSEDREG_CUDA=0"


def test_an_old_toolkit_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.4, V11.4.48'\n")
    script.chmod(0o755)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: script)
    with pytest.raises(native_build.BuildError, match=r"expected CUDA 12\.0 or newer, got 11\.4 in .*nvcc; upgrade it"):
        cuda_build.nvcc_compiler(native_build.Compiler(("c++",), "c++"))


def test_the_report_reads_what_ptxas_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "one.cu").touch()
    monkeypatch.setattr(cuda_build, "SOURCES", tmp_path / "sources")
    (tmp_path / "one.ptxas").write_text(
        "ptxas info    : 146 bytes gmem\n"
        "ptxas info    : Compiling entry function '_ZN8fusedreg4cuda5trialILi3EEEvNS0_6ParamsE' for 'sm_80'\n"
        "ptxas info    : Function properties for _ZN8fusedreg4cuda5trialILi3EEEvNS0_6ParamsE\n"
        "    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 376 bytes cmem[0]\n"
        "ptxas info    : Function properties for other\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    (report,) = cuda_build.register_report(tmp_path)
    assert (report.source, report.architecture, report.registers) == ("one", "sm_80", 255)
    assert (report.stack, report.spill_stores, report.spill_loads) == (8, 16, 24)
    table = cuda_build.write_register_report([report], tmp_path / "registers.txt")
    assert table == (tmp_path / "registers.txt").read_text()
    assert re.search(r"^sm_80 +255 +8 +40  one: ", table, re.MULTILINE)
