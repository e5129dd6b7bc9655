"""``tools/gpu.py`` without a GPU: its phases, their limits, its reports, and the GPU's tests on a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from helpers import compiled

from benchmarks import results
from benchmarks.report import markdown

ROOT = Path(__file__).resolve().parent.parent


def phase(command: str, **changes: Any) -> gpu.Phase:
    return gpu.Phase(**{"name": "x", "command": (sys.executable, "-c", command), "minutes": 1, **changes})


def test_the_phases_and_their_limits(tmp_path: Path) -> None:
    every = gpu.phases(tmp_path, "gpu-quick")
    names = [one.name for one in every]
    assert names[:2] == ["machine", "build"]
    assert set(gpu.BY_DEFAULT) == set(names) - {"quick", "sweep"}
    assert [one.name for one in gpu.choose(None, [], every)] == list(gpu.BY_DEFAULT)
    chosen = gpu.choose("build,tests,sweep", ["tests=3", "tests-cuda=4", "sweep=10"], every)
    assert {one.name: one.minutes for one in chosen} == {
        "build": 15,
        "tests-cuda-step": 3,
        "tests-cuda-grid": 3,
        "tests-cuda-cluster": 3,
        "tests-cuda": 4,
        "tests-triton": 3,
        "sweep": 10,
    }
    (quick,) = gpu.choose("quick", [], every)
    assert "gpu and not slow" in quick.command and "FUSEDREG_GPU_TARGET" not in quick.environment
    assert chosen[-1].command[-2:] == ("--minutes", "8.5"), "a measurement ends by itself before it is ended"
    assert chosen[0].environment == {"FUSEDREG_CUDA": "1"}
    for wrong in ("tests,flight", "machine"):
        limits = [] if wrong != "machine" else ["flight=2"]
        with pytest.raises(ValueError, match="unknown phase 'flight': expected some of machine"):
            gpu.choose(wrong, limits, every)
    with pytest.raises(ValueError, match="expected PHASE=MINUTES, got 'build=soon'"):
        gpu.choose(None, ["build=soon"], every)


def test_a_phase_is_bounded_and_its_end_is_told(tmp_path: Path) -> None:
    assert gpu.run(phase("print('fine')"), tmp_path).status == "passed"
    failed = gpu.run(phase("print('broken'); raise SystemExit(3)"), tmp_path)
    assert (failed.status, failed.detail) == ("failed", "broken\n")
    begin = time.monotonic()
    late = gpu.run(phase("import time; print('begun'); time.sleep(60)", minutes=0.05), tmp_path)
    assert late.status == "timed out"
    assert "begun" in late.detail
    assert time.monotonic() - begin < 40
    missing = gpu.run(phase("", needs="no-such-program"), tmp_path)
    assert (missing.status, missing.detail) == ("not run", "no-such-program is not installed")


def test_tests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_fine(): pass\n"
        "def test_broken(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not run: no GPU')\n"
        "def test_skipped(): pass\n"
    )
    command = (sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path))
    one = gpu.Phase("tests", (*command, f"--junitxml={tmp_path}/tests.xml"), 2, junit="tests.xml")
    outcome = gpu.run(one, tmp_path)
    assert outcome.status == "failed"
    assert outcome.tests is not None
    assert (outcome.tests["passed"], outcome.tests["failed"], outcome.tests["skipped"]) == (1, 1, 1)
    assert outcome.tests["failures"][0]["test"] == "test_broken"
    assert outcome.tests["skipped_because"] == {"not run: no GPU": 1}
    assert "1 passed, 1 failed, 1 skipped" in gpu.line(outcome)
    (tmp_path / "cut.xml").write_text("<testsuite><testcase")
    assert gpu.read_junit(tmp_path / "cut.xml") == {"unreadable": "cut.xml"}


def test_the_results_file_is_written_after_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later phase that fails takes nothing from the earlier ones; benchmarks.report reads the file."""
    from benchmarks import run

    cases = tmp_path / "benchmarks.json"
    arguments = ["--preset", "tiny", "--backend", "reference", "--cases", "act", "--no-memory", "--json", str(cases)]
    assert run.main(arguments) == 0
    measured = cases.read_text()
    copy = f"import pathlib; pathlib.Path({str(cases)!r}).write_text({measured!r})"
    some = [
        phase("print('a GPU')", name="machine"),
        phase(copy, name="benchmarks", results="benchmarks.json"),
        phase("raise SystemExit(1)", name="racecheck"),
    ]
    facts = {"device": "NVIDIA H200", "driver": "580", "versions": {"torch": "2.13.0"}, "commit": "0" * 40}
    facts |= {"device_type": "cuda", "date": "2026-11-22T00:00:00+00:00"}
    monkeypatch.setattr(gpu, "choose", lambda *_: some)
    monkeypatch.setattr(gpu, "without_gpu", lambda: None)
    monkeypatch.setattr(gpu, "machine", lambda: facts)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    found = results.load(tmp_path / "results.json")
    assert [one["status"] for one in found["phases"]] == ["passed", "passed", "failed"]
    assert found["benchmarks"]["cases"][0]["name"] == "act"
    text = markdown(found)
    assert text.startswith("NVIDIA H200, torch 2.13.0, commit 0000000000, 2026-11-22, driver 580.")
    assert "| racecheck | failed |" in text and "| act |" in text
    found.pop("phases")
    with pytest.raises(ValueError, match="no phases"):
        results.validate(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: there is a GPU")
def test_without_a_gpu_it_stops_at_once() -> None:
    answer = subprocess.run([sys.executable, "tools/gpu.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 2
    assert "error: make gpu needs an NVIDIA GPU. torch" in answer.stderr
    assert not answer.stdout


SAMPLE = "sanitizer or test_hidden_dropout or two_backwards or nn_lstm"


@compiled
@pytest.mark.slow
def test_the_gpus_tests_pass_on_the_cpus_kernels(tmp_path: Path) -> None:
    """Their logic, on a stand-in: a sample of each file for one target."""
    environment = {**os.environ, "FUSEDREG_GPU_TESTS": "cpu", "FUSEDREG_GPU_TARGET": "cuda"}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-k", SAMPLE, f"--junitxml={tmp_path}/x.xml"]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stdout[-3000:]
    counts = gpu.read_junit(tmp_path / "x.xml")
    assert counts["failed"] == 0
    assert counts["passed"] > 50


MASKS = "-3 and (untied-i or row-f or zoneout_cell or output_and or update)"


@pytest.mark.slow
def test_the_masks_of_the_emulated_device_are_the_cpus_bit_for_bit(tmp_path: Path) -> None:
    """The same tests that run on a GPU, over the CUDA sources on the emulated device."""
    library = ROOT / "build" / "cuda_emulation" / "libfusedreg_cuda_emulated.so"
    if not library.exists():
        pytest.skip(f"not run: {library.name} is not built")
    environment = {**os.environ, "FUSEDREG_GPU_TESTS": "emulated"}
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_gpu_masks.py", "-m", "gpu", "-k", f"cuda and {MASKS}"]
    junit = tmp_path / "x.xml"
    answer = subprocess.run(
        [*command, f"--junitxml={junit}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert answer.returncode == 0, answer.stdout[-3000:]
    counts = gpu.read_junit(junit)
    assert counts["failed"] == 0
    assert counts["passed"] >= 20


def test_the_gpus_tests_are_collected_and_skipped_with_a_reason(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("not run: there is a GPU")
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_gpu_masks.py", "-m", "gpu", "-k", "cell_dropout"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSEDREG_GPU")}
    subprocess.run([*command, f"--junitxml={tmp_path}/x.xml"], cwd=ROOT, env=environment, check=True, timeout=300)
    counts = gpu.read_junit(tmp_path / "x.xml")
    assert counts["passed"] == counts["failed"] == 0
    assert counts["skipped"] > 0
    assert list(counts["skipped_because"]) == ["not run: torch sees no CUDA device"]
    assert json.dumps(counts)
