"""The command line: see the package's docstring."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.programs import environment, page, runs, swap
from benchmarks.programs.catalogue import PROGRAMS, Program
from fusedreg.collect_env import processor


def measure(python: Path, folder: Path, program: Program, repeats: int) -> dict[str, Any]:
    """Tests with both; the example with every variant in turn, the shortest of its times."""
    found: dict[str, Any] = {"version": program.version}
    if program.tests:
        found["tests"] = {
            variant: runs.run_tests(python, folder, program, variant) for variant in ("nn.LSTM", "fusedreg")
        }
    example: dict[str, Any] = {}
    for _ in range(repeats):
        for variant in swap.VARIANTS:
            if variant == "replaced" and not program.gives_its_model:
                continue
            run = runs.run_example(python, folder, program, variant)
            print(f"{program.name}, {variant}: {run}", flush=True)
            earlier = example.setdefault(variant, run)
            earlier["seconds"] = min(earlier["seconds"], run["seconds"])
    found["example"] = example
    return found


def update(document: Path, results: dict[str, Any]) -> None:
    """Write the tables between the page's markers."""
    text = document.read_text()
    before, rest = text.split(page.BEGIN)
    _, after = rest.split(page.END)
    document.write_text(f"{before}{page.BEGIN}\n{page.markdown(results)}\n{page.END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    parser.add_argument("--environment", type=Path, help="the folder of the environment, which is made if need be")
    parser.add_argument("--json", type=Path, help="where the results go; programs that it has and that do not run stay")
    parser.add_argument("--only", action="append", help="the name of a program; may be given several times")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each example, of which the shortest counts")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="write the tables of RESULTS into this page")
    parser.add_argument("results", nargs="?", type=Path)
    arguments = parser.parse_args()
    if arguments.update:
        update(arguments.update, json.loads(arguments.results.read_text()))
        return
    if not arguments.environment or not arguments.json:
        parser.error("expected --environment and --json, or --update PAGE RESULTS")
    folder = arguments.environment.resolve()
    python = environment.make(folder)
    results: dict[str, Any] = {"programs": {}}
    if arguments.json.exists():
        results = json.loads(arguments.json.read_text())
    results["date"] = datetime.date.today().isoformat()
    results["machine"] = {
        "device": processor(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "fusedreg": importlib.metadata.version("fusedreg"),
    }
    for program in PROGRAMS:
        if arguments.only is None or program.name in arguments.only:
            results["programs"][program.name] = measure(python, folder, program, arguments.repeats)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
