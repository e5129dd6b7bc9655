"""The benchmark's command line.

    python -m benchmarks.run --preset cpu --json benchmarks/results/cpu.json --plots build/plots
    python -m benchmarks.run --preset cpu-full --cases small,awd --base benchmarks/results/cpu-full.json
    python -m benchmarks.run --preset gpu --json benchmarks/results/gpu.json --minutes 30
    python -m benchmarks.run --preset gpu-sweep --cases 'T128-B64-*' --dtypes bfloat16,float16

Prints tables; ``--preset cpu`` ends with the model of :mod:`benchmarks.character_model`. The exit status is 1 where a
case's numbers are wrong or it failed (it then has no speed), or where that model misses its mark, else 0. A missed
target does not fail the run: it stands in the table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import ceilings, machine, results, tables
from benchmarks.measure import measure_case
from benchmarks.presets import PRESETS, Preset, select_cases
from benchmarks.registry import CASES, Case
from benchmarks.targets import targets_record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Times fusedreg beside nn.LSTM.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="what is measured, at which sizes")
    names = ", ".join(case.name for case in CASES)
    parser.add_argument("--cases", help=f"comma-separated, * stands for anything: {names}; a sweep has its own")
    parser.add_argument("--dtypes", help="comma-separated: " + ", ".join(ceilings.TYPES) + " (default: the preset's)")
    parser.add_argument("--minutes", type=float, help="begin no further case after this time, and name those left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--base", type=Path, metavar="RESULTS", help="compare with an earlier file")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the ratios into this folder")
    parser.add_argument("--threads", type=int, help="of torch and of the kernels (default: the preset's or torch's)")
    parser.add_argument("--seconds", type=float, help="time for the pairs of each case (default: the preset's)")
    parser.add_argument("--backend", default="", help="fusedreg's backend (default: the device's own kernels)")
    parser.add_argument(
        "--character-model",
        action=argparse.BooleanOptionalAction,
        help="end with the model trained on Shakespeare's plays (default: with --preset cpu, unless --cases is given)",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurements")
    return parser.parse_args(arguments)


def measure(
    preset: Preset,
    cases: Sequence[Case],
    console: Console,
    minutes: float | None = None,
    keep: Callable[[results.Results], None] = lambda found: None,
) -> results.Results:
    """Run every case of ``preset`` and return what goes into the results file.

    ``minutes``: after them no further case is begun. ``keep`` is given what there is after each case, so that a run
    that is cut short leaves what it measured.
    """
    begin = time.monotonic()
    found: results.Results = {
        "format": results.FORMAT,
        "kind": "cases",
        "preset": preset.name,
        "backend": preset.backend or torch.device(preset.device).type,
        "machine": machine.describe(preset.device),
        "rates": {"fma": {"one_thread": None, "all_threads": None}, "loop": [], "device": None},
        "cases": [],
        "left_out": [],
        "targets": [],
    }
    work = [(case, dtype) for case in cases for dtype in preset.dtypes]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
        console=console,
    )
    with bar as progress:
        task = progress.add_task("benchmarks", total=len(work) + 1, doing="FMA rate, the loop alone")
        if torch.device(preset.device).type == "cpu":
            found["rates"] |= {"fma": machine.fma_rates(), "loop": machine.loop_rates(preset.loop_sizes)}
        else:
            progress.update(task, doing="the device's ceilings")
            found["rates"]["device"] = ceilings.measure(preset.device)
        progress.advance(task)
        for case, dtype in work:
            if minutes is not None and time.monotonic() - begin > minutes * 60.0:
                found["left_out"].append(f"{case.name}, {dtype}")
                continue

            def report(doing: str, name: str = case.name) -> None:
                progress.update(task, doing=f"{name}: {doing}")

            record = measure_case(case, preset, dtype, report)
            found["cases"].append(record)
            found["targets"] = targets_record(found)
            keep(found)
            progress.advance(task)
            if not console.is_terminal:
                # A log shows the bar only once, at its end: say what was done.
                console.print(summary(record), highlight=False)
        progress.update(task, doing="done")
    return found


def summary(record: dict[str, object]) -> str:
    """One line about one case."""
    rows = record["comparisons"]
    assert isinstance(rows, list)
    cells = [
        f"{row['variant']} / {row['against']} {row['mode']} {tables.ratio_cell(row, spread=False)}" for row in rows
    ]
    seconds = record["seconds"]
    assert isinstance(seconds, dict)
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return f"{record['name']}, {record['dtype']}: " + "; ".join(cells[:5]) + f" ({spent})"


def show(found: results.Results, console: Console) -> None:
    """Print every table."""
    from benchmarks.report import heading

    console.print(heading(found), highlight=False)
    shown = [tables.ratio_table(found), tables.time_table(found)]
    if found["rates"]["fma"]["all_threads"]:
        shown.append(tables.share_table(found))
    if found["rates"]["device"]:
        shown.append(tables.floor_table(found))
    if any(case["memory"] for case in found["cases"]):
        shown.append(tables.memory_table(found))
    if found["rates"]["loop"]:
        shown.append(tables.loop_table(found))
    if found["targets"]:
        shown.append(tables.target_table(found))
    for table in shown:
        console.print(table.rich())
    for line in tables.losing_lines(found) + tables.wrong_lines(found):
        console.print(line, highlight=False, markup=False)


def run_character_model(options: argparse.Namespace, preset: Preset) -> int:
    """The character model with the same options; its results go beside the cases', its status is returned."""
    from benchmarks import character_model

    arguments = ["--device", preset.device, "--backend", preset.backend]
    if options.json is not None:
        path = options.json.with_name(f"{options.json.stem}-character_model.json")
        arguments += ["--json", str(path)]
    if options.plots is not None:
        arguments += ["--plots", str(options.plots)]
    return character_model.main(arguments)


def _dtypes(names: str | None, preset: Preset) -> tuple[str, ...]:
    if not names:
        return preset.dtypes
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in chosen:
        if name not in ceilings.TYPES:
            raise ValueError(f"unknown dtype {name!r}: expected some of {', '.join(ceilings.TYPES)}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    preset = PRESETS[options.preset]
    try:
        cases = select_cases(options.cases, preset.cases)
        dtypes = _dtypes(options.dtypes, preset)
        base = results.load(options.base) if options.base else None
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", markup=False)
        return 2
    if torch.device(preset.device).type == "cuda" and not torch.cuda.is_available():
        console.print(f"error: preset {preset.name!r} needs a CUDA device, torch sees none: try --preset cpu")
        return 2
    threads = preset.threads if options.threads is None else options.threads
    if threads is not None:
        torch.set_num_threads(threads)
    if options.seconds is not None:
        preset = replace(preset, seconds=options.seconds)
    preset = replace(preset, backend=options.backend, dtypes=dtypes)
    if options.no_memory:
        preset = replace(preset, memory=False)
    found = measure(
        preset,
        cases,
        console,
        options.minutes,
        lambda found: results.save(found, options.json) if options.json is not None else None,
    )
    if found["left_out"]:
        console.print(f"left out after {options.minutes:g} minutes: {'; '.join(found['left_out'])}", highlight=False)
    show(found, console)
    if base is not None:
        console.print(tables.change_table(results.changes(base, found)).rich())
    if options.json is not None:
        results.save(found, options.json)
        console.print(f"results: {options.json}")
    if options.plots is not None:
        from benchmarks.plots import plot_ratios

        for path in plot_ratios(found, options.plots):
            console.print(f"plot: {path}")
    if options.character_model or (options.character_model is None and preset.character_model and not options.cases):
        status = run_character_model(options, preset)
        if status != 0:
            return status
    wrong = any(row["status"] in ("wrong", "failed") for case in found["cases"] for row in case["comparisons"])
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
