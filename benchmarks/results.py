"""The results file: its layout, its checks, and what is read off it (targets, comparison with an earlier file).

A file holds one run on one device::

    {"format": 1, "kind": "cases", "preset": ..., "machine": {...}, "rates": {"fma": {...}, "loop": [...]},
     "cases": [{"name", "source", "dtype", sizes, "checks", "comparisons": [...], "memory": {...}}], "targets": [...]}

A comparison's ``status`` is ``ok``, ``wrong`` (its numbers failed the check: it has no times), ``failed`` (it raised),
``unavailable`` or ``impossible``, with a ``reason``. Ratios are times of ``variant`` over times of ``against``: below
1 is faster.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
STATUSES = ("ok", "wrong", "failed", "unavailable", "impossible")
Results = dict[str, Any]


def save(results: Results, path: Path) -> None:
    """Write ``results`` as JSON, after :func:`validate`."""
    validate(results, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def load(path: Path) -> Results:
    """Read a results file of any kind.

    Raises ``ValueError`` naming the file and what is wrong with it.
    """
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected a file written by benchmarks.run --json") from error
    validate(results, str(path))
    assert isinstance(results, dict)
    return results


def _require(condition: bool, origin: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{origin}: {problem}; expected a results file written by this version's benchmarks --json")


def validate(results: Any, origin: str = "results") -> None:
    """Raise ``ValueError`` unless ``results`` has the layout above (or is a character model's file)."""
    _require(isinstance(results, dict), origin, f"not an object but {type(results).__name__}")
    _require(results.get("format") == FORMAT, origin, f"format {results.get('format')!r} is not {FORMAT}")
    _require(results.get("kind") in ("cases", "character_model"), origin, f"kind {results.get('kind')!r}")
    _require("machine" in results and "commit" in results["machine"], origin, "no machine or commit")
    if results["kind"] == "character_model":
        _require(bool(results.get("models")), origin, "no models")
        return
    for case in results.get("cases", []):
        for row in case["comparisons"]:
            where = f"case {case['name']}, {row['variant']} / {row['against']}"
            _require(row["status"] in STATUSES, origin, f"{where}: status {row['status']!r}")
            _require(row["status"] == "ok" or "ratio" not in row, origin, f"{where}: a speed without a passed check")
            _require(row["status"] != "ok" or row.get("ratio", 0) > 0, origin, f"{where}: no ratio")


def find(case: dict[str, Any], variant: str, against: str, mode: str) -> dict[str, Any] | None:
    """The row of one comparison in one case, or ``None``."""
    rows: list[dict[str, Any]] = case["comparisons"]
    for row in rows:
        if (row["variant"], row["against"], row["mode"]) == (variant, against, mode):
            return row
    return None


def ratios(results: Results, variant: str, against: str, mode: str) -> dict[str, float]:
    """Per case (``name`` or ``name, dtype`` where there are several), the ratio of one comparison, where measured."""
    several = len({case["dtype"] for case in results["cases"]}) > 1
    found = {}
    for case in results["cases"]:
        row = find(case, variant, against, mode)
        if row is not None and "ratio" in row:
            found[f"{case['name']}, {case['dtype']}" if several else case["name"]] = row["ratio"]
    return found


@dataclass(frozen=True)
class Target:
    """One thing the CPU preset is to reach, and what it did reach. ``met`` is ``None`` where it was not measured."""

    name: str
    bound: float
    at_most: bool
    value: float | None
    detail: str

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def _target(
    name: str,
    bound: float,
    values: dict[str, float],
    reduce: Callable[[Iterable[float]], float],
    at_most: bool = True,
    every: bool = False,
) -> Target:
    if not values:
        return Target(name, bound, at_most, None, "not measured")
    worst = (max if at_most else min)(values, key=lambda key: values[key])
    detail = f"worst {worst}: {values[worst]:.2f}"
    if every:
        detail = "; ".join(f"{key}: {value:.2f}" for key, value in values.items())
    return Target(name, bound, at_most, reduce(values.values()), detail)


def targets(results: Results) -> list[Target]:
    """The project's targets for a CPU, evaluated on ``results``."""
    inference = ratios(results, "plain", "nn.LSTM", "inference")
    training = ratios(results, "plain", "nn.LSTM", "training")
    everything = ratios(results, "all", "nn.LSTM", "training")
    normalized = ratios(results, "all + batch norm", "nn.LSTM", "training")
    eager = ratios(results, "eager all", "all", "training")
    single = {case["name"] for case in results["cases"] if case["batch_size"] == 1}

    def only(values: dict[str, float], names: set[str]) -> dict[str, float]:
        return {name: value for name, value in values.items() if name.partition(",")[0] in names}

    alone = {f"{name}, inference": value for name, value in only(inference, single).items()}
    alone |= {f"{name}, forward + backward": value for name, value in only(training, single).items()}
    peaks, saved = {}, {}
    for case in results["cases"]:
        measured = {name: value for name, value in case["memory"].items() if value["status"] == "ok"}
        if {"plain", "nn.LSTM"} <= measured.keys() and measured["nn.LSTM"]["peak_bytes"] > 0:
            peaks[case["name"]] = measured["plain"]["peak_bytes"] / measured["nn.LSTM"]["peak_bytes"]
        if {"plain", "recompute"} <= measured.keys() and measured["plain"]["saved_bytes"] > 0:
            saved[case["name"]] = measured["recompute"]["saved_bytes"] / measured["plain"]["saved_bytes"]
    loop = {row["case"]: row["fraction"] for row in results["rates"]["loop"] if row["fraction"] is not None}
    median = statistics.median
    return [
        _target("plain / nn.LSTM, inference, median", 0.82, inference, median),
        _target("plain / nn.LSTM, inference, worst case", 1.0, inference, max),
        _target("plain / nn.LSTM, forward + backward, median", 0.80, training, median),
        _target("plain / nn.LSTM, forward + backward, worst case", 1.0, training, max),
        _target("plain / nn.LSTM, B = 1, worst case", 0.65, alone, max, every=True),
        _target("all / plain nn.LSTM, forward + backward, median", 0.88, everything, median),
        _target("all / plain nn.LSTM, forward + backward, worst case", 1.0, everything, max),
        _target("all + batch norm / plain nn.LSTM, forward + backward, median", 1.05, normalized, median),
        _target("eager loop / all, forward + backward, median", 1.8, eager, median, at_most=False),
        _target("eager loop / all, B = 1, worst case", 7.0, only(eager, single), min, at_most=False, every=True),
        _target("peak memory, plain / nn.LSTM, worst case", 1.0, peaks, max),
        _target("saved bytes, recompute / default, worst case", 0.5, saved, max),
        _target("the loop alone, forward, fraction of the FMA rate, worst case", 0.8, loop, min, False, every=True),
    ]


def targets_record(results: Results) -> list[dict[str, Any]]:
    """The targets as they stand in the file."""
    return [{**asdict(target), "met": target.met} for target in targets(results)]


@dataclass(frozen=True)
class Change:
    """How one comparison's ratio moved between two files."""

    case: str
    comparison: str
    before: float
    after: float
    significant: bool

    @property
    def factor(self) -> float:
        """Above 1: slower than before."""
        return self.after / self.before


def changes(base: Results, results: Results) -> list[Change]:
    """Every comparison that both files measured at the same sizes; significant where the quartiles do not overlap."""
    found = []
    sizes = ("name", "dtype", "steps", "batch_size", "input_size", "hidden_size", "num_layers", "bidirectional")
    earlier = {tuple(case[size] for size in sizes): case for case in base["cases"]}
    for case in results["cases"]:
        before = earlier.get(tuple(case[size] for size in sizes))
        for row in case["comparisons"] if before is not None else []:
            assert before is not None
            other = find(before, row["variant"], row["against"], row["mode"])
            if other is None or "ratio" not in other or "ratio" not in row:
                continue
            (low, high), (other_low, other_high) = row["ratio_quartiles"], other["ratio_quartiles"]
            name = f"{row['variant']} / {row['against']}, {row['mode']}"
            apart = high < other_low or low > other_high
            found.append(Change(f"{case['name']}, {case['dtype']}", name, other["ratio"], row["ratio"], apart))
    return found
