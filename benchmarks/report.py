"""Markdown tables from committed results, so that every figure in the README comes from a file.

    python -m benchmarks.report benchmarks/results/cpu.json benchmarks/results/character_model-cpu.json
    python -m benchmarks.report --update README.md benchmarks/results/*.json

``--update`` replaces what stands between ``<!-- benchmarks -->`` and ``<!-- /benchmarks -->``; with ``--check`` it
changes nothing and fails where the document differs from the results.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks import tables
from benchmarks.results import Results, load, measured

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def heading(results: Results) -> str:
    """Where and when, in one line."""
    machine = results["machine"]
    commit = machine["commit"][:10] + ("-dirty" if machine["commit"].endswith("-dirty") else "")
    device = str(machine["device"])
    if machine["device_type"] == "cpu":
        device += f", {machine['threads']} threads ({machine['instruction_set']})"
    return f"{device}, torch {machine['versions']['torch']}, commit {commit}, {machine['date'][:10]}."


def cases_markdown(results: Results) -> str:
    """All tables of a run of the cases."""
    parts = [heading(results), tables.ratio_table(results).markdown()]
    losing = tables.losing_lines(results)
    if losing:
        parts.append("\n".join(f"- {line}" for line in losing))
    if results["targets"]:
        parts.append(tables.target_table(results).markdown())
    parts.append(tables.time_table(results).markdown())
    if results["rates"]["fma"]["all_threads"]:
        parts.append(tables.share_table(results).markdown())
    if results["rates"].get("device"):
        parts.append(tables.floor_table(results).markdown())
    if any(case["memory"] for case in results["cases"]):
        parts.append(tables.memory_table(results).markdown())
    fma = results["rates"]["fma"]
    if fma["one_thread"]:
        rates = (
            f"FMA rate in the same run: {fma['one_thread']:.0f} GFLOP/s on one thread, {fma['all_threads']:.0f} on all."
        )
        parts.append(rates)
    if results["rates"]["loop"]:
        parts.append(tables.loop_table(results).markdown())
    missing = tables.wrong_lines(results)
    if missing:
        parts.append("\n".join(f"- {line}" for line in missing))
    return "\n\n".join(parts)


def character_table(results: Results) -> tables.Table:
    """The models of a character-model run."""
    header = ["model", "steps", "ms a step", "time / nn.LSTM", "bits before", "bits after"]
    rows = []
    for model in results["models"]:
        lower, upper = model["ratio_quartiles"]
        rows.append(
            [
                model["name"],
                str(model["steps"]),
                f"{model['step_milliseconds']:.1f}",
                f"{model['ratio']:.2f} [{lower:.2f}, {upper:.2f}]",
                f"{model['held_out'][0]['bits']:.3f}",
                f"{model['held_out'][-1]['bits']:.3f}",
            ]
        )
    return tables.Table(
        "Character model: times in ms, held-out bits per character before and after training", header, rows
    )


def character_markdown(results: Results) -> str:
    """The table of a character-model run, and the sample of text."""
    verdict = "within" if results["within"] else "**not** within"
    tolerance = results["tolerance"]
    sentence = f"fusedreg's held-out bits are {verdict} {tolerance:.0%} of `nn.LSTM`'s at the same budget."
    sample = "```\n" + results["sample"].strip() + "\n```"
    return "\n\n".join([heading(results), character_table(results).markdown(), sentence, sample])


def phase_table(results: Results) -> tables.Table:
    """What ``tools/gpu.py`` ran, and what became of it."""
    rows = []
    for phase in results["phases"]:
        counts = phase["tests"] or {}
        told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if name in counts)
        if phase["status"] == "not run":
            told = phase["detail"]
        rows.append([phase["name"], phase["status"], f"{phase['seconds']:.0f}", told])
    return tables.Table("Phases on the GPU", ["phase", "status", "seconds", "tests"], rows)


def gpu_markdown(results: Results) -> str:
    """The phases, and the tables of what was measured."""
    driver = results["machine"]["driver"]
    parts = [f"{heading(results)[:-1]}, driver {driver}.", phase_table(results).markdown()]
    return "\n\n".join([*parts, *(cases_markdown(part) for part in measured(results))])


def markdown(results: Results) -> str:
    """The tables of one file of any kind."""
    if results["kind"] == "gpu":
        return gpu_markdown(results)
    return cases_markdown(results) if results["kind"] == "cases" else character_markdown(results)


def insert(document: str, text: str) -> str:
    """``document`` with ``text`` between the markers. Raises ``ValueError`` where they are missing."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"no {BEGIN} … {END} in the document: add both lines where the tables belong")
    return pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", document, count=1)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files written by --json")
    parser.add_argument("--update", type=Path, metavar="DOCUMENT", help="put the tables between its markers")
    parser.add_argument("--check", action="store_true", help="with --update: fail where the document is out of date")
    options = parser.parse_args(arguments)
    text = "\n\n".join(markdown(load(path)) for path in options.results)
    if options.update is None:
        print(text)
        return 0
    before = options.update.read_text()
    after = insert(before, text)
    if options.check:
        if before != after:
            print(f"{options.update} does not show these results: run benchmarks.report --update", file=sys.stderr)
        return int(before != after)
    options.update.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
