"""Runs of a program's tests and of its example, each in a process of its own with one thread."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.programs.catalogue import Program
from benchmarks.programs.environment import home_of_stanza, source_of
from benchmarks.programs.measured import MARK

ROOT = Path(__file__).resolve().parents[2]


def _surroundings(folder: Path, variant: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PROGRAMS_LSTM": variant,
        "STANZA_TEST_HOME": str(home_of_stanza(folder)),
    }


def run_tests(python: Path, folder: Path, program: Program, variant: str) -> dict[str, Any]:
    """Each test's outcome, and the time of the tests themselves (of the wall clock, which is what pytest reports)."""
    source = source_of(folder, program)
    with tempfile.TemporaryDirectory() as name:
        written = Path(name, "outcomes.xml")
        command = [str(python), "-m", "pytest", "-p", "benchmarks.programs.swap", "-q", "-W", "ignore"]
        command += ["-c", os.devnull, "--rootdir", str(source), "-p", "no:cacheprovider", f"--junit-xml={written}"]
        command += [argument.format(source=source) for argument in program.tests]
        ran = subprocess.run(
            command, env=_surroundings(folder, variant), cwd=source, capture_output=True, text=True, check=False
        )
        if not written.exists():
            raise RuntimeError(f"{program.name}: pytest wrote nothing\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
        cases = list(ElementTree.parse(written).getroot().iter("testcase"))
    outcomes = {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}
    return {"outcomes": outcomes, "seconds": sum(float(case.get("time", 0)) for case in cases)}


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def run_example(python: Path, folder: Path, program: Program, variant: str) -> dict[str, Any]:
    """The example's figures and the processor time of what it times."""
    surroundings = _surroundings(folder, variant)
    surroundings["PROGRAMS_SOURCE"] = str(source_of(folder, program))
    # The swap comes first: a package may take the class from torch.nn when it is imported.
    code = "import runpy, benchmarks.programs.swap; runpy.run_module('benchmarks.programs.{}', run_name='__main__')"
    with tempfile.TemporaryDirectory() as name:
        ran = subprocess.run(
            [str(python), "-W", "ignore", "-c", code.format(program.example)],
            env=surroundings,
            cwd=name,
            capture_output=True,
            text=True,
            check=False,
        )
    for line in ran.stdout.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    raise RuntimeError(
        f"{program.name}, {variant}: the example gave no report\n{ran.stdout[-2000:]}{ran.stderr[-3000:]}"
    )
