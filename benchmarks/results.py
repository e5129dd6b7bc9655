"""The results file: its layout, its checks, and what is read off it (comparison with an earlier file).

A file holds one run on one device::

    {"format": 1, "kind": "cases", "preset": ..., "machine": {...},
     "rates": {"fma": {...}, "loop": [...], "device": {...}},
     "cases": [{"name", "source", "dtype", sizes, "checks", "comparisons": [...], "memory": {...}}],
     "left_out": [...], "targets": [...]}

A comparison's ``status`` is ``ok``, ``wrong`` (its numbers failed the check: it has no times), ``failed`` (it raised),
``unavailable`` or ``impossible``, with a ``reason``. Ratios are times of ``variant`` over times of ``against``: below
1 is faster. ``rates["device"]`` holds a GPU's ceilings (:mod:`benchmarks.ceilings`); ``left_out`` names the cases that
a limit of time left out. A file of ``"kind": "gpu"``, by ``tools/gpu.py``, has the outcomes of its ``phases``, and such
a run as its ``"benchmarks"`` and ``"sweep"``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
STATUSES = ("ok", "wrong", "failed", "unavailable", "impossible")
Results = dict[str, Any]


def save(results: Results, path: Path) -> None:
    """Write ``results`` as JSON, after :func:`validate`."""
    validate(results, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that is ended while it writes leaves the file before it whole.
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(path)


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
    _require(results.get("kind") in ("cases", "character_model", "gpu"), origin, f"kind {results.get('kind')!r}")
    _require("machine" in results and "commit" in results["machine"], origin, "no machine or commit")
    if results["kind"] == "character_model":
        _require(bool(results.get("models")), origin, "no models")
        return
    if results["kind"] == "gpu":
        _require(bool(results.get("phases")), origin, "no phases")
        for part in measured(results):
            validate(part, origin)
        return
    for case in results.get("cases", []):
        for row in case["comparisons"]:
            where = f"case {case['name']}, {row['variant']} / {row['against']}"
            _require(row["status"] in STATUSES, origin, f"{where}: status {row['status']!r}")
            _require(row["status"] == "ok" or "ratio" not in row, origin, f"{where}: a speed without a passed check")
            _require(row["status"] != "ok" or row.get("ratio", 0) > 0, origin, f"{where}: no ratio")


def measured(results: Results) -> list[Results]:
    """The runs of cases in a file: itself, or those that ``tools/gpu.py`` put into its own."""
    if results["kind"] == "cases":
        return [results]
    return [results[name] for name in ("benchmarks", "sweep") if name in results]


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
