"""The tables of docs/programs.md, from a results file."""

from __future__ import annotations

from typing import Any

from benchmarks.programs.catalogue import PROGRAMS, Program

BEGIN, END = "<!-- programs -->", "<!-- /programs -->"
NAMES = {
    "nn.LSTM": "`nn.LSTM`",
    "perturbed": "`nn.LSTM`, weights changed by a millionth",
    "fusedreg": "`fusedreg.LSTM`, by a changed import",
    "replaced": "`fusedreg.replace_lstms(model)`",
    "regularised": "regularised",
}


def markdown(results: dict[str, Any]) -> str:
    """Everything between the markers."""
    machine = results["machine"]
    parts = [f"{machine['device']}, one thread, torch {machine['torch']}, {results['date']}."]
    found = results["programs"]
    parts += [_program(program, found[program.name]) for program in PROGRAMS if program.name in found]
    return "\n\n".join(parts)


def _program(program: Program, found: dict[str, Any]) -> str:
    parts = [f"### {program.name} {found['version']}", f"What it uses: {program.uses}."]
    if program.tests:
        parts.append(_tests(found["tests"]))
    parts.append(_figures(found["example"]))
    if program.differences:
        parts.append(program.differences)
    return "\n\n".join(parts)


def _tests(tests: dict[str, Any]) -> str:
    lines = ["| own tests | passed | failed | skipped | seconds, wall clock |", "|---|---:|---:|---:|---:|"]
    for variant, run in tests.items():
        outcomes = list(run["outcomes"].values())
        counts = " | ".join(str(outcomes.count(kind)) for kind in ("passed", "failed", "skipped"))
        lines.append(f"| {NAMES[variant]} | {counts} | {run['seconds']:.1f} |")
    first, second = (run["outcomes"] for run in tests.values())
    different = [f"`{name.split('::')[-1]}`" for name in first if first[name] != second.get(name)]
    lines += ["", f"Tests that differ: {', '.join(different) or 'none'}."]
    return "\n".join(lines)


def _figures(example: dict[str, Any]) -> str:
    names = list(next(iter(example.values()))["figures"])
    lines = [
        f"| example | {' | '.join(names)} | seconds, processor |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for variant, run in example.items():
        figures = " | ".join(f"{run['figures'][name]:.4g}" for name in names)
        lines.append(f"| {NAMES[variant]} | {figures} | {run['seconds']:.1f} |")
    return "\n".join(lines)
