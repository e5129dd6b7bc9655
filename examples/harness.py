"""What the examples share: the command line, progress, the results file, and costs measured in pairs.

A results file holds one run of one example, and is all that its tables and figures are made from::

    {"format": 1, "kind": "example", "example": ..., "command": ..., "smoke": false, "machine": {...},
     "settings": {...}, "seeds": [...], "seconds": ...,
     "columns": {part: [[metric, heading, digits], ...]},
     "variants": [{"part", "name", "options", "parameters"}],
     "runs": [{"part", "variant", "seed", "seconds", "metrics": {...}, "curves": {name: [[x, y], ...]}}],
     "costs": {part: {variant: {"ratio", "quartiles", "pairs"}}}, "notes": {...}}

It is written after every run, so that what is ended early leaves what it has finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from benchmarks import machine
from benchmarks.timing import prepare, spread, time_pair

REPOSITORY = Path(__file__).resolve().parent.parent
COMMITTED = Path(__file__).resolve().parent / "results"
FORMAT = 1
Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the command line says. ``folder`` is where the results file and the figures go."""

    name: str
    seeds: tuple[int, ...]
    device: str
    threads: int
    smoke: bool
    folder: Path
    command: str

    def pick(self, full: int, smoke: int) -> int:
        """A size: of the full run, or of the smoke run, which only shows that everything works."""
        return smoke if self.smoke else full


def parser(name: str, description: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """The options that every example has."""
    made = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=description)
    made.add_argument("--smoke", action="store_true", help="seconds instead of minutes: shows that it works, no more")
    made.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="N", help="default: %(default)s")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (default: %(default)s)")
    made.add_argument("--device", default="cpu", help="default: %(default)s")
    made.add_argument("--out", type=Path, metavar="DIR", help=f"results and figures (default: build/examples/{name})")
    return made


def settings(name: str, options: argparse.Namespace, arguments: Sequence[str] | None) -> Settings:
    """The parsed options; torch's threads are set here."""
    if options.threads < 1:
        raise SystemExit(f"--threads: expected at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else list(arguments)
    return Settings(
        name=name,
        seeds=tuple(options.seeds[:1] if options.smoke else options.seeds),
        device=options.device,
        threads=options.threads,
        smoke=options.smoke,
        folder=options.out or REPOSITORY / "build" / "examples" / name,
        command=shlex.join(["python", "-m", f"examples.{name}", *_without_folder(given)]),
    )


def _without_folder(arguments: list[str]) -> list[str]:
    """A command line but for where its results went: that says nothing about them."""
    kept = [argument for argument in arguments if not argument.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept


@dataclass
class Experiment:
    """The runs of one example as they are made, its progress bar and its results file."""

    settings: Settings
    columns: Mapping[str, Sequence[tuple[str, str, int]]]
    constants: Mapping[str, Any]
    console: Console = field(default_factory=lambda: Console(width=None if sys.stdout.isatty() else 160))

    def __post_init__(self) -> None:
        self.variants: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.costs: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._begin = self._last = time.perf_counter()
        self._machine = machine.describe(self.settings.device)

    def variant(self, part: str, name: str, options: str, model: nn.Module) -> None:
        """Say what ``name`` is; once for each of a part's variants."""
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if not any((one["part"], one["name"]) == (part, name) for one in self.variants):
            self.variants.append({"part": part, "name": name, "options": options, "parameters": parameters})

    def restart_clock(self) -> None:
        """The next run's time starts now: what was done since the last one is no part of it."""
        self._last = time.perf_counter()

    def add(
        self,
        part: str,
        variant: str,
        seed: int,
        metrics: Mapping[str, float],
        curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    ) -> None:
        """Keep what one run found, and say it."""
        now = time.perf_counter()
        self.runs.append(
            {
                "part": part,
                "variant": variant,
                "seed": seed,
                "seconds": now - self._last,
                "metrics": dict(metrics),
                "curves": {name: [list(point) for point in points] for name, points in (curves or {}).items()},
            }
        )
        shown = ", ".join(f"{heading} {metrics[key]:.{digits}f}" for key, heading, digits in self.columns[part])
        self.console.print(f"{part}: {variant}, seed {seed}: {shown} ({now - self._last:.0f} s)", highlight=False)
        self._last = now

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A bar over ``total`` training steps of all runs; what it gives is called with each step's description."""
        bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            # A log is no place for a bar: there, each finished run has its line.
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task("", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)

    def results(self) -> Results:
        """What has been found until now, in the file's layout."""
        return {
            "format": FORMAT,
            "kind": "example",
            "example": self.settings.name,
            "command": self.settings.command,
            "smoke": self.settings.smoke,
            "machine": self._machine,
            "settings": dict(self.constants),
            "seeds": sorted({run["seed"] for run in self.runs}),
            "seconds": time.perf_counter() - self._begin,
            "columns": {part: [list(column) for column in columns] for part, columns in self.columns.items()},
            "variants": self.variants,
            "runs": self.runs,
            "costs": self.costs,
            "notes": self.notes,
        }

    def save(self, name: str | None = None) -> Path:
        """Write the results file."""
        return save(self.results(), self.settings.folder / f"{name or self.settings.name}.json")


def save(results: Results, path: Path) -> Path:
    """Write ``results`` as JSON, after :func:`validate`; a run that is ended meanwhile leaves the file before it."""
    validate(results, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(_rounded(results), indent=1) + "\n")
    beside.replace(path)
    return path


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of these numbers has."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value


def load(path: Path) -> Results:
    """Read a results file; raises ``ValueError`` naming it and what is wrong with it."""
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected a file that an example wrote") from error
    validate(results, str(path))
    assert isinstance(results, dict)
    return results


def validate(results: Any, origin: str) -> None:
    """Raise ``ValueError`` unless ``results`` has the layout above."""

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(f"{origin}: {problem}; expected a results file of this version's examples")

    require(isinstance(results, dict), f"not an object but {type(results).__name__}")
    require(results.get("format") == FORMAT and results.get("kind") == "example", "another format or kind")
    for key, kind in (("machine", dict), ("seeds", list), ("runs", list), ("columns", dict), ("costs", dict)):
        require(isinstance(results.get(key), kind), f"{key} is missing or no {kind.__name__}")
    for key in ("device", "commit", "versions"):
        require(key in results["machine"], f"machine has no {key}")
    require(bool(results["runs"]), "no runs")
    known = {(variant["part"], variant["name"]) for variant in results["variants"]}
    for run in results["runs"]:
        where = f"run {run['variant']}, seed {run['seed']}"
        require((run["part"], run["variant"]) in known, f"{where}: its variant is not described")
        for metric, _, _ in results["columns"][run["part"]]:
            require(metric in run["metrics"], f"{where}: no {metric}")


def describe(options: Mapping[str, Any]) -> str:
    """Options as they are typed, those of a norm too where they differ from its defaults."""
    shown = []
    for name, value in options.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [(field.name, getattr(value, field.name), field.default) for field in dataclasses.fields(value)]
            inside = ", ".join(f"{key}={entry!r}" for key, entry, default in fields if entry != default)
            shown.append(f"`{name}={type(value).__name__}({inside})`")
        else:
            shown.append(f"`{name}={value!r}`")
    return ", ".join(shown) or "none"


def cost(work: Callable[[], None], baseline: Callable[[], None], device: str, pairs: int) -> dict[str, Any]:
    """Time of ``work`` over time of ``baseline``, called in turn: median and quartiles of ``pairs`` ratios.

    Both are in one process and every ratio is of neighbours in time, so that a busy machine slows both of a pair.
    """
    contestants = prepare(work, device, 0.0), prepare(baseline, device, 0.0)
    ratios = []
    for number in range(pairs):
        own, other = time_pair(*contestants, device, swap=number % 2 == 1)
        ratios.append(own / other)
    found = spread(ratios)
    return {"ratio": found.median, "quartiles": [found.lower, found.upper], "pairs": pairs}


def main(run: Callable[[], None]) -> int:
    """``run``'s exit status: what is missing is said in a line, without a traceback."""
    try:
        run()
    except (RuntimeError, ModuleNotFoundError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        return 2
    return 0
