"""docs/programs.md: its tables are those of the committed results, and no difference stands without its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks.programs", reason="not run: a source distribution has no benchmarks")
from benchmarks.programs import page
from benchmarks.programs.catalogue import PROGRAMS, Program

ROOT = Path(__file__).resolve().parent.parent
RESULTS: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "programs" / "cpu.json").read_text())
RUN = [program for program in PROGRAMS if program.name in RESULTS["programs"]]


def test_the_tables_are_those_of_the_results() -> None:
    _, _, rest = (ROOT / "docs" / "programs.md").read_text().partition(page.BEGIN + "\n")
    assert rest.partition("\n" + page.END)[0] == page.markdown(RESULTS)


def test_there_are_three_programs_at_least() -> None:
    assert len(RUN) >= 3


@pytest.mark.parametrize("program", RUN, ids=lambda program: program.name)
def test_differences_have_a_reason(program: Program) -> None:
    """Of tests: an outcome that is not the same. Of figures: more than the order of sums can do."""
    found = RESULTS["programs"][program.name]
    assert found["version"] == program.version
    same = True
    if "tests" in found:
        first, second = (run["outcomes"] for run in found["tests"].values())
        same = first == second
    example = found["example"]
    for variant in ("fusedreg", "replaced"):
        for name, value in example.get(variant, {"figures": {}})["figures"].items():
            same = same and value == pytest.approx(example["nn.LSTM"]["figures"][name], rel=0.02)
    assert same or program.differences


@pytest.mark.parametrize("program", RUN, ids=lambda program: program.name)
def test_every_example_ran_with_every_variant(program: Program) -> None:
    expected = {"nn.LSTM", "perturbed", "fusedreg", "regularised"} | (
        {"replaced"} if program.gives_its_model else set()
    )
    assert set(RESULTS["programs"][program.name]["example"]) == expected
