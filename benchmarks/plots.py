"""Plots of results files, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import Results, find
from benchmarks.tables import NAMES, columns


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install matplotlib, or leave out --plots") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _title(results: Results) -> str:
    machine = results["machine"]
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}"


def plot_ratios(results: Results, folder: Path) -> list[Path]:
    """One picture for each baseline and dtype: bars of the median ratio by case, quartiles as whiskers."""
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for dtype in dict.fromkeys(case["dtype"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["dtype"] == dtype]
        for baseline, chosen in _groups(results).items():
            figure, axes = pyplot.subplots(figsize=(max(7.0, 1.1 * len(cases) * max(1.0, len(chosen) / 5)), 4.2))
            width = 0.8 / len(chosen)
            for position, column in enumerate(chosen):
                places, heights, low, high = [], [], [], []
                for number, case in enumerate(cases):
                    row = find(case, *column)
                    if row is None or "ratio" not in row:
                        continue
                    places.append(number + (position - (len(chosen) - 1) / 2) * width)
                    heights.append(row["ratio"])
                    low.append(row["ratio"] - row["ratio_quartiles"][0])
                    high.append(row["ratio_quartiles"][1] - row["ratio"])
                label = f"{column[0]}, {NAMES[column[2]]}"
                axes.bar(places, heights, width, yerr=[low, high], capsize=2, label=label)
            axes.axhline(1.0, color="black", linewidth=1)
            axes.set_xticks(range(len(cases)), [case["name"] for case in cases], rotation=30, ha="right")
            axes.set_ylabel(f"time / time of {baseline}")
            axes.set_title(f"{_title(results)}, {dtype}", fontsize=10)
            axes.legend(fontsize=7, ncols=2)
            figure.tight_layout()
            path = folder / f"ratios-{baseline.replace(' ', '-').replace('+', 'and')}-{dtype}.png"
            figure.savefig(path, dpi=120)
            pyplot.close(figure)
            paths.append(path)
    return paths


def _groups(results: Results) -> dict[str, list[tuple[str, str, str]]]:
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for column in columns(results):
        groups.setdefault(column[1], []).append(column)
    return groups


def plot_curves(results: Results, path: Path) -> Path:
    """The character model: training bits per character by step and by time, with held-out points."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for model in results["models"]:
        curve = model["curve"]
        for axes, key in zip(panels, ("step", "seconds"), strict=True):
            (line,) = axes.plot(
                [point[key] for point in curve], [point["bits"] for point in curve], label=model["name"]
            )
            held_out = model["held_out"]
            axes.plot(
                [point[key] for point in held_out],
                [point["bits"] for point in held_out],
                "o",
                color=line.get_color(),
                markersize=4,
            )
    for axes, label in zip(panels, ("training step", "seconds of training"), strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bits per character (line: training, dot: held out)")
    panels[1].legend(fontsize=8)
    figure.suptitle(f"Shakespeare's plays, {_title(results)}", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
