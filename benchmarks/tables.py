"""Tables of results: the same cells for the terminal (rich) and for the README (Markdown)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.ceilings import floor_seconds
from benchmarks.registry import Case
from benchmarks.results import Change, Results, find

NAMES = {"inference": "inference", "training": "forward + backward"}


@dataclass(frozen=True)
class Table:
    """A title with its unit, a header and rows of text; a note where the columns need one.

    The first column is text, the others are numbers.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def rich(self) -> RichTable:
        """For a terminal."""
        # Text, not strings: square brackets are quartiles here and not markup.
        table = RichTable(
            title=Text(self.title),
            title_justify="left",
            caption=Text(self.note) if self.note else None,
            caption_justify="left",
        )
        for position, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if position == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        """For a README: the title in bold, the note, and a GitHub table."""
        lines = [f"**{self.title}**", ""]
        if self.note:
            lines += [self.note, ""]
        lines += ["| " + " | ".join(self.header) + " |", "|---|" + "---:|" * (len(self.header) - 1)]
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
    return Table("Ratios of times (no unit), median of pairs [quartiles]", header, rows)


def time_table(results: Results) -> Table:
    """Milliseconds of the plain layer, its baseline, the regularised layer and the eager loop."""
    several = len({case["dtype"] for case in results["cases"]}) > 1
    header = ["case", "nn.LSTM, inference", "plain, inference", "nn.LSTM, fwd + bwd", "plain, fwd + bwd"]
    header += ["all, fwd + bwd", "eager all, fwd + bwd", "plain's first fwd + bwd"]
    rows = []
    for case in results["cases"]:
        inference, training = (find(case, "plain", "nn.LSTM", mode) for mode in ("inference", "training"))
        everything, eager = find(case, "all", "nn.LSTM", "training"), find(case, "eager all", "all", "training")
        rows.append(
            [
                _label(case, several),
                _number(inference, "against_milliseconds"),
                _number(inference, "milliseconds"),
                _number(training, "against_milliseconds"),
                _number(training, "milliseconds"),
                _number(everything, "milliseconds"),
                _number(eager, "milliseconds"),
                _number(training, "first_call_milliseconds"),
            ]
        )
    return Table("Times, ms a call (medians)", header, rows)


def shares(results: Results, case: dict[str, Any], mode: str) -> tuple[float | None, float | None]:
    """The fractions of the FMA rate that ``nn.LSTM`` and the plain layer reach in one case.

    Counted are the products alone, ``2 T B 4H (I + H)`` a layer and direction, three times that with the backward.
    """
    peak = case.get("fma_gflops") or results["rates"]["fma"]["all_threads"]
    row = find(case, "plain", "nn.LSTM", mode)
    if not peak or row is None or "ratio" not in row:
        return None, None
    gflop = case["forward_gflop"] * (3.0 if mode == "training" else 1.0)
    baseline, ours = (gflop / row[key] * 1e3 / peak for key in ("against_milliseconds", "milliseconds"))
    return baseline, ours


def share_table(results: Results) -> Table:
    """The fraction of the FMA rate that each side reaches: the floor of every ratio."""
    several = len({case["dtype"] for case in results["cases"]}) > 1
    header = ["case", "GFLOP of a forward", "FMA rate, GFLOP/s", "nn.LSTM, inference", "plain, inference"]
    header += ["nn.LSTM, fwd + bwd", "plain, fwd + bwd"]
    rows = []
    for case in results["cases"]:
        peak = case.get("fma_gflops") or results["rates"]["fma"]["all_threads"]
        cells = [_label(case, several), f"{case['forward_gflop']:.3g}", f"{peak:.0f}" if peak else "–"]
        for mode in ("inference", "training"):
            cells += ["–" if share is None else f"{share:.0%}" for share in shares(results, case, mode)]
        rows.append(cells)
    note = (
        "Counted are the two products, 2 T B 4H (I + H) a layer and direction, and three times that with the backward; "
        "the FMA rate is float32's, measured beside each case. No ratio can be below nn.LSTM's own share: a program at "
        "the full rate would reach it."
    )
    return Table("Share of the FMA rate, %", header, rows, note)


def floor_table(results: Results) -> Table:
    """A GPU's times over the floor that its measured ceilings set."""
    ceilings = results["rates"]["device"]
    header = ["case", "floor, inference, ms", "nn.LSTM", "plain", "floor, fwd + bwd, ms", "nn.LSTM", "plain", "all"]
    rows = []
    for case in results["cases"]:
        sized = Case(**{key: case[key] for key in _CASE_FIELDS})
        cells = [_label(case, several=True)]
        for mode, columns in (
            ("inference", (("plain", "against_milliseconds"), ("plain", "milliseconds"))),
            ("training", (("plain", "against_milliseconds"), ("plain", "milliseconds"), ("all", "milliseconds"))),
        ):
            floor = 1e3 * floor_seconds(sized, mode, case["dtype"], ceilings)  # type: ignore[arg-type]
            cells.append(f"{floor:.3g}")
            for variant, key in columns:
                row = find(case, variant, "nn.LSTM", mode)
                cells.append(f"{row[key] / floor:.1f}" if row is not None and "ratio" in row else "–")
        rows.append(cells)
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in ceilings["matrix_teraflops"].items())
    note = (
        f"Measured in the same run: a copy moves {ceilings['copy_gigabytes_per_second']:.0f} GB/s (read and written), "
        f"a large product runs at TFLOP/s of {rates}. The floor is the larger of the products at that rate and each "
        "input and output once through memory; it does not know that the steps wait for one another."
    )
    return Table("Time over the floor of the device's ceilings (no unit)", header, rows, note)


_CASE_FIELDS = (
    "name", "source", "steps", "batch_size", "input_size", "hidden_size", "num_layers", "bidirectional", "reset_rate",
)  # fmt: skip


def losing_lines(results: Results) -> list[str]:
    """Every case that is slower than ``nn.LSTM``, with the room that the FMA rate leaves there."""
    several = len({case["dtype"] for case in results["cases"]}) > 1
    lines = []
    for case in results["cases"]:
        for row in case["comparisons"]:
            if row["against"] == "nn.LSTM" and row.get("ratio", 0.0) > 1.0:
                line = f"slower: {_label(case, several)}, {row['variant']}, {NAMES[row['mode']]}: {ratio_cell(row)}"
                share, _ = shares(results, case, row["mode"])
                lines.append(line + (f"; nn.LSTM is at {share:.0%} of the FMA rate" if share is not None else ""))
    return lines


def _number(row: dict[str, Any] | None, key: str) -> str:
    value = row.get(key) if row else None
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def memory_table(results: Results) -> Table:
    """Peaks in MB of a forward and backward, and what is kept for the backward."""
    names = list(dict.fromkeys(name for case in results["cases"] for name in case["memory"]))
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
    marks = {True: "met", False: "missed", None: "not measured"}
    rows = []
    for target in results["targets"]:
        value = "–" if target["value"] is None else f"{target['value']:.2f}"
        bound = f"{'≤' if target['at_most'] else '≥'} {target['bound']:.2f}"
        rows.append([target["name"], bound, value, marks[target["met"]], target["detail"]])
    met = sum(target["met"] is True for target in results["targets"])
    title = f"Targets, ratios of times, bytes or rates ({met} of {len(rows)} met)"
    return Table(title, ["what is compared", "target", "figure", "verdict", "cases"], rows)


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
                name = f"{row['variant']} / {row['against']}, {NAMES[row['mode']]}"
                named = groups.setdefault(f"{row['status']}: {row['reason']}", {}).setdefault(name, [])
                named.append(case["name"])
    lines = []
    for reason, group in groups.items():
        where = "; ".join(f"{name}: {', '.join(cases)}" for name, cases in group.items())
        lines.append(f"{reason} ({where})")
    return lines
