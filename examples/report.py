"""Tables from results files, on the terminal and in docs/examples.md.

    python -m examples.report examples/results/*.json
    python -m examples.report --update docs/examples.md

``--update`` replaces what stands between ``<!-- example: NAME, PART -->`` and ``<!-- /example -->`` by the table of
that part of ``examples/results/NAME.json``; with ``--check`` it changes nothing and fails where the page differs.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.harness import COMMITTED, Results, load

BLOCK = re.compile(r"(<!-- example: (\w+), ([\w ,]+) -->\n)(.*?)(<!-- /example -->)", re.DOTALL)


def values(results: Results, part: str, variant: str, metric: str) -> list[float]:
    """One number a seed; NaN where a run found none."""
    runs = [run for run in results["runs"] if (run["part"], run["variant"]) == (part, variant)]
    found = [run["metrics"][metric] for run in sorted(runs, key=lambda run: run["seed"])]
    return [float("nan") if value is None else value for value in found]


def mean_and_spread(numbers: Sequence[float], digits: int) -> str:
    """``mean ± standard deviation`` over the seeds; a single seed has no spread.

    Seeds without a number are left out and counted: ``(2 of 3)``; a dash where none has one.
    """
    found = [number for number in numbers if math.isfinite(number)]
    if not found:
        return "–"
    mean = statistics.fmean(found)
    # What has run away is told by its size.
    form = f".{digits}f" if abs(mean) < 1e4 else ".0e"
    text = f"{mean:{form}}" + (f" ± {statistics.stdev(found):{form}}" if len(found) > 1 else "")
    return text + (f" ({len(found)} of {len(numbers)})" if len(found) < len(numbers) else "")


def cells(results: Results, part: str) -> tuple[list[str], list[list[str]]]:
    """The heading and the rows of one part's table, variants in the order in which they were tried."""
    columns = results["columns"][part]
    costs = results["costs"].get(part, {})
    heading = ["variant", "options", "parameters", "seeds", *(text for _, text, _ in columns)]
    heading += ["training step, times plain `nn.LSTM`'s"] if costs else []
    rows = []
    for variant in results["variants"]:
        name = variant["name"]
        seeds = sum((run["part"], run["variant"]) == (part, name) for run in results["runs"])
        if variant["part"] != part or seeds == 0:
            continue
        row = [name, variant["options"], f"{variant['parameters']:,}", str(seeds)]
        row += [mean_and_spread(values(results, part, name, metric), digits) for metric, _, digits in columns]
        if costs:
            found = costs.get(name)
            row.append(
                ""
                if found is None
                else f"{found['ratio']:.2f} [{found['quartiles'][0]:.2f}, {found['quartiles'][1]:.2f}]"
            )
        rows.append(row)
    return heading, rows


def markdown(results: Results, part: str) -> str:
    """The table and, under it, what it was measured on."""
    heading, rows = cells(results, part)
    right = len(heading) - 2
    lines = ["| " + " | ".join(heading) + " |", "|---|---|" + "---:|" * right]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    machine = results["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    note = (
        f"Mean ± standard deviation over seeds. `{results['command']}` took "
        f"{results['seconds'] / 60.0:.0f} minutes on a machine shared with other work: {machine['device']}, {threads}, "
        f"torch {machine['versions']['torch']}, commit `{machine['commit'][:7]}`."
    )
    return "\n".join([*lines, "", note])


def print_tables(results: Results, console: Console) -> None:
    """Every part's table on the terminal."""
    for part in results["columns"]:
        heading, rows = cells(results, part)
        # Text, not strings: square brackets are quartiles here and not markup.
        table = Table(title=Text(f"{results['example']}: {part}"))
        for text in heading:
            table.add_column(Text(text))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)


def update(text: str, folder: Path = COMMITTED) -> str:
    """``text`` with every table made anew from the results files in ``folder``."""

    def block(match: re.Match[str]) -> str:
        name, part = match[2], match[3]
        # Blank lines: to Markdown a comment and a table right under it are one piece of HTML.
        return f"{match[1]}\n{markdown(load(folder / f'{name}.json'), part)}\n\n{match[5]}"

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.report", description="Tables from results files.")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="results files to print")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="make this page's tables anew")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page differs")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for path in options.files:
        print_tables(load(path), console)
    if options.update is not None:
        before = options.update.read_text()
        after = update(before)
        if options.check and before != after:
            console.print(
                f"{options.update} differs from the results: python -m examples.report --update {options.update}"
            )
            return 1
        options.update.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
