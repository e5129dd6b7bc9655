"""Tables of results: the same cells for the terminal (rich) and for the README (Markdown)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.results import Change, Results, find

NAMES = {"inference": "inference", "training": "forward + backward"}


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of text. The first column is text, the others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def rich(self) -> RichTable:
        """For a terminal."""
        # Text, not strings: square brackets are quartiles here and not markup.
        table = RichTable(title=Text(self.title), title_justify="left")
        for position, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if position == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        """For a README: a GitHub table, without the title."""
        lines = ["| " + " | ".join(self.header) + " |", "|---|" + "---:|" * (len(self.header) - 1)]
        lines += ["| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines)


def sizes(case: dict[str, Any]) -> str:
    """For example ``T64 B16 I768 H768``."""
    text = f"T{case['steps']} B{case['batch_size']} I{case['input_size']} H{case['hidden_size']}"
    if case["num_layers"] > 1:
        text += f" L{case['num_layers']}"
    return text + (" bidirectional" if case["bidirectional"] else "")


def _label(case: dict[str, Any], several: bool) -> str:
    return f"{case['name']}, {case['dtype']}" if several else str(case["name"])


def ratio_cell(row: dict[str, Any] | None, *, spread: bool = True) -> str:
    """``0.81 [0.79, 0.84]``, or why there is no number."""
    if row is None:
        return "–"
    if "ratio" not in row:
        return str(row["status"])
    lower, upper = row["ratio_quartiles"]
    return f"{row['ratio']:.2f} [{lower:.2f}, {upper:.2f}]" if spread else f"{row['ratio']:.2f}"


def columns(results: Results) -> list[tuple[str, str, str]]:
    """Every ``(variant, against, mode)`` in the file, in the order of its first case."""
    seen: dict[tuple[str, str, str], None] = {}
    for case in results["cases"]:
        for row in case["comparisons"]:
            seen[(row["variant"], row["against"], row["mode"])] = None
    return list(seen)


def ratio_table(results: Results, *, spread: bool = True) -> Table:
    """Cases by comparisons; below 1 the first is faster. Against the eager loop it is the eager loop's time / ours."""
    chosen = columns(results)
    several = len({case["dtype"] for case in results["cases"]}) > 1
    header = ["case", "size"] + [f"{variant} / {against}, {NAMES[mode]}" for variant, against, mode in chosen]
    rows = [
        [_label(case, several), sizes(case)] + [ratio_cell(find(case, *column), spread=spread) for column in chosen]
        for case in results["cases"]
    ]
    return Table("Ratios of times, median of pairs [quartiles]", header, rows)


def time_table(results: Results) -> Table:
    """Milliseconds of the plain layer and its baseline, and the rate reached."""
    several = len({case["dtype"] for case in results["cases"]}) > 1
    header = ["case", "nn.LSTM", "ours", "nn.LSTM, fwd + bwd", "ours, fwd + bwd", "all", "eager all"]
    header += ["GFLOP/s, fwd + bwd", "% of FMA rate", "first call"]
    peak = results["rates"]["fma"]["all_threads"]
    rows = []
    for case in results["cases"]:
        inference, training = (find(case, "plain", "nn.LSTM", mode) for mode in ("inference", "training"))
        everything, eager = find(case, "all", "nn.LSTM", "training"), find(case, "eager all", "all", "training")
        rate = training.get("gflops") if training else None
        rows.append(
            [
                _label(case, several),
                _number(inference, "against_milliseconds"),
                _number(inference, "milliseconds"),
                _number(training, "against_milliseconds"),
                _number(training, "milliseconds"),
                _number(everything, "milliseconds"),
                _number(eager, "milliseconds"),
                f"{rate:.0f}" if rate else "–",
                f"{rate / peak:.0%}" if rate and peak else "–",
                _number(training, "first_call_milliseconds"),
            ]
        )
    return Table("Milliseconds a call (medians)", header, rows)


def _number(row: dict[str, Any] | None, key: str) -> str:
    value = row.get(key) if row else None
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def memory_table(results: Results) -> Table:
    """Peaks in MB of a forward and backward, and what is kept for the backward."""
    names = ["nn.LSTM", "plain", "all", "recompute"]
    several = len({case["dtype"] for case in results["cases"]}) > 1
    header = ["case"] + [f"{name}, peak" for name in names] + [f"{name}, saved" for name in names]
    rows = []
    for case in results["cases"]:
        cells = [_label(case, several)]
        for key in ("peak_bytes", "saved_bytes"):
            for name in names:
                entry = case["memory"].get(name, {"status": "–"})
                cells.append(f"{entry[key] / 1e6:.1f}" if entry["status"] == "ok" else entry["status"])
        rows.append(cells)
    return Table("Memory of a forward and backward pass, MB", header, rows)


def target_table(results: Results) -> Table:
    """What was to be reached, what was reached."""
    marks = {True: "yes", False: "no", None: "not measured"}
    rows = []
    for target in results["targets"]:
        value = "–" if target["value"] is None else f"{target['value']:.2f}"
        bound = f"{'≤' if target['at_most'] else '≥'} {target['bound']:.2f}"
        rows.append([target["name"], bound, value, marks[target["met"]], target["detail"]])
    return Table("Targets", ["target", "bound", "measured", "met", "detail"], rows)


def loop_table(results: Results) -> Table:
    """The loop's own rate beside the FMA rate."""
    rows = []
    for row in results["rates"]["loop"]:
        lower, upper = row["fraction_quartiles"]
        fraction = f"{row['fraction']:.0%} [{lower:.0%}, {upper:.0%}]"
        rows.append([row["case"], f"{row['gflops']:.0f}", f"{row['fma_gflops']:.0f}", fraction])
    title = "The loop alone, forward, GFLOP/s (packing of the recurrent weight included)"
    return Table(title, ["size", "loop", "FMA rate beside it", "fraction [quartiles]"], rows)


def change_table(changes: list[Change]) -> Table:
    """What moved since an earlier file; a star where the quartiles do not overlap."""
    rows = [
        [
            one.case,
            one.comparison,
            f"{one.before:.2f}",
            f"{one.after:.2f}",
            f"{one.factor - 1:+.0%}" + (" *" if one.significant else ""),
        ]
        for one in sorted(changes, key=lambda one: -one.factor)
    ]
    return Table("Against the base", ["case", "comparison", "before", "after", "change"], rows)


def wrong_lines(results: Results) -> list[str]:
    """Every comparison without a speed, those with one reason together."""
    groups: dict[str, dict[str, list[str]]] = {}
    for case in results["cases"]:
        for row in case["comparisons"]:
            if row["status"] != "ok":
                name = f"{row['variant']} / {row['against']}, {row['mode']}"
                named = groups.setdefault(f"{row['status']}: {row['reason']}", {}).setdefault(name, [])
                named.append(case["name"])
    lines = []
    for reason, group in groups.items():
        where = "; ".join(f"{name}: {', '.join(cases)}" for name, cases in group.items())
        lines.append(f"{reason} ({where})")
    return lines
