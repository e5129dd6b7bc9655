"""Figures from results: curves with their spread over seeds, and bars."""

from __future__ import annotations

import math
import statistics
import textwrap
from pathlib import Path
from typing import Any

from examples.harness import Results
from examples.report import values


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RuntimeError("figures need matplotlib; install it: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def finish(figure: Any, path: Path) -> Path:
    """Write the figure and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
    return path


def draw_curves(panel: Any, results: Results, part: str, curve: str) -> None:
    """A line a variant into one panel: the mean over seeds; a band from the lowest to the highest seed.

    On a logarithmic axis, which is set before, the mean is the geometric one. A seed that is no longer finite ends.
    """
    log = panel.get_yscale() == "log"
    for variant in results["variants"]:
        if variant["part"] != part:
            continue
        runs = [run for run in results["runs"] if (run["part"], run["variant"]) == (part, variant["name"])]
        lines = [run["curves"][curve] for run in runs if curve in run["curves"]]
        if not lines:
            continue
        places = [point[0] for point in lines[0]]
        heights = [
            [point[1] for point in points if point[1] is not None and (point[1] > 0 or not log)]
            for points in zip(*lines, strict=True)
        ]
        low, middle, high = ([summary(height, log)[at] for height in heights] for at in range(3))
        panel.plot(places, middle, label=variant["name"], linewidth=1.2)
        panel.fill_between(places, low, high, alpha=0.15)


def summary(height: list[float], log: bool) -> tuple[float, float, float]:
    """Lowest, mean and highest; NaN of nothing."""
    if not height:
        return math.nan, math.nan, math.nan
    mean = statistics.geometric_mean(height) if log else statistics.fmean(height)
    return min(height), mean, max(height)


def curves(results: Results, part: str, curve: str, path: Path, axes: tuple[str, str], log: bool = False) -> Path:
    """One panel of :func:`draw_curves`."""
    figure, panel = pyplot().subplots(figsize=(7.0, 4.2))
    panel.set_yscale("log" if log else "linear")
    draw_curves(panel, results, part, curve)
    panel.set_xlabel(axes[0])
    panel.set_ylabel(textwrap.fill(axes[1], 45))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return finish(figure, path)


def bars(results: Results, part: str, metric: str, path: Path, label: str) -> Path:
    """A bar a variant: the mean over seeds, the seeds themselves as dots."""
    names = [variant["name"] for variant in results["variants"] if variant["part"] == part]
    figure, panel = pyplot().subplots(figsize=(max(5.0, 1.0 * len(names)), 4.0))
    for place, name in enumerate(names):
        numbers = values(results, part, name, metric)
        panel.bar(place, statistics.fmean(numbers), 0.7, alpha=0.6)
        panel.plot([place] * len(numbers), numbers, "k.", markersize=5)
    panel.set_xticks(range(len(names)), names, rotation=25, ha="right")
    panel.set_ylabel(label)
    lowest = min(value for name in names for value in values(results, part, name, metric))
    highest = max(value for name in names for value in values(results, part, name, metric))
    margin = 0.15 * (highest - lowest) or 0.1 * abs(highest) or 1.0
    # Bars that start at 0 would hide differences that matter: the axis says where it starts.
    panel.set_ylim(lowest - margin, highest + margin)
    panel.grid(axis="y", alpha=0.3)
    return finish(figure, path)
