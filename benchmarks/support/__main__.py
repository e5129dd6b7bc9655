"""The command line: see the package's docstring."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import table
from benchmarks.support.features import FEATURES
from benchmarks.support.outcomes import outcomes
from benchmarks.support.places import Place, places
from fusedreg.collect_env import processor

ROOT = Path(__file__).resolve().parents[2]


def run_place(place: Place) -> dict[str, Any]:
    """Every check of one column. Raises where one fails."""
    reason = place.unavailable()
    if reason is not None:
        raise SystemExit(f"{place.backend}: not run: {reason}")
    found: dict[str, Any] = {}
    for feature in FEATURES:
        if feature.only and place.backend not in feature.only:
            continue
        if feature.evidence:
            subprocess.run([sys.executable, "-m", "pytest", feature.evidence], cwd=ROOT, check=True)
            found[feature.key] = {"all": "passed"}
        else:
            found[feature.key] = outcomes(feature, place)
        print(f"{place.backend}: {feature.key}: {found[feature.key]}", flush=True)
    return found


def run(path: Path, only: list[str] | None) -> dict[str, Any]:
    """Each column in a process of its own: Triton's interpreter is switched on for a whole process."""
    results: dict[str, Any] = {"places": {}, "stand_ins": {}}
    if path.exists():
        results = json.loads(path.read_text())
    results["date"] = datetime.date.today().isoformat()
    results["machine"] = {"processor": processor(), "torch": torch.__version__}
    for place in places():
        if only is not None and place.backend not in only:
            continue
        surroundings = dict(os.environ)
        if place.stand_in == "interpreter":
            surroundings["TRITON_INTERPRET"] = "1"
        part = path.with_name(f"{place.backend}.part.json")
        command = [sys.executable, "-m", "benchmarks.support", "--place", place.backend, "--json", str(part)]
        subprocess.run(command, check=True, env=surroundings, cwd=ROOT)
        results["places"][place.backend] = json.loads(part.read_text())
        results["stand_ins"][place.backend] = place.stand_in
        part.unlink()
    path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def update(document: Path, results: dict[str, Any]) -> None:
    """Write the table between the document's markers."""
    before, rest = document.read_text().split(table.BEGIN)
    _, after = rest.split(table.END)
    document.write_text(f"{before}{table.BEGIN}\n{table.markdown(results)}\n{table.END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the results file; columns not run stay as they are")
    parser.add_argument("--only", action="append", help="a backend; may be given several times")
    parser.add_argument("--place", help=argparse.SUPPRESS)  # one column, in this process
    parser.add_argument("--update", type=Path, help="write the table between the markers of this document")
    parser.add_argument("--table-only", action="store_true", help="run nothing: the table of the file as it is")
    arguments = parser.parse_args()
    path = arguments.json.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.place:
        torch.set_num_threads(1)
        (place,) = (place for place in places() if place.backend == arguments.place)
        path.write_text(json.dumps(run_place(place)))
        return
    results = json.loads(path.read_text()) if arguments.table_only else run(path, arguments.only)
    if arguments.update:
        update(arguments.update, results)


if __name__ == "__main__":
    main()
