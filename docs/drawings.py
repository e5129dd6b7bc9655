"""The pictures of the regularisers' pages, drawn from the masks that the library itself makes.

``mkdocs`` calls :func:`draw_all` through ``docs/hooks.py``; nothing of it is committed. To look at them without the
site: ``python docs/hooks.py build/drawings``.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import fusedreg

SEED, STEPS, ROWS, UNITS = 2, 24, 4, 16
KEPT, DROPPED, OTHER = "#e8e8e8", "#0072b2", "#e69f00"  # told apart by colour-blind readers, and in grey

Options = dict[str, Any]


def made(**options: Any) -> Any:
    """The masks of one layer, with ``dropout`` shown as the lower of two layers'."""
    regularization = fusedreg.Regularization(**options)
    sizes = {"input_size": UNITS, "hidden_size": UNITS, "batch_size": ROWS, "steps": STEPS}
    return fusedreg.masks(SEED, regularization, num_layers=2, **sizes)["l0"]


def _grid(axes: Any, values: torch.Tensor, title: str, x_label: str, y_label: str) -> None:
    axes.pcolormesh(
        values.int().numpy(), cmap=ListedColormap([KEPT, DROPPED]), vmin=0, vmax=1, edgecolors="white", linewidth=0.4
    )
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.invert_yaxis()


def _over_time(panels: list[tuple[str, str, Options]], marked: str, rest: str = "kept") -> Any:
    """One panel a mask: units down, steps across, of the batch's first row."""
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(3.3 * len(panels), 2.7), squeeze=False, layout="constrained"
    )
    for axes, (title, field, options) in zip(grid[0], panels, strict=True):
        mask = getattr(made(**options), field)
        row = mask[:, 0] if mask.dim() == 3 and mask.shape[0] == STEPS else mask[0].expand(STEPS, -1)
        _grid(axes, row.T, title, "step", "unit")
    _legend(figure, marked, rest)
    return figure


def _legend(figure: Any, marked: str, rest: str = "kept") -> None:
    handles = [Patch(color=DROPPED, label=marked), Patch(color=KEPT, label=rest)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def dropout() -> Any:
    """Dropout between layers: every step anew."""
    return _over_time([("dropout, the lower layer's output", "dropout", {"dropout": 0.5})], "dropped")


def variational() -> Any:
    """Tied masks: one for the sequence."""
    panels = [
        ("input_dropout", "input_dropout", {"input_dropout": 0.5}),
        ("hidden_dropout", "hidden_dropout", {"hidden_dropout": 0.5}),
        ("output_dropout", "output_dropout", {"output_dropout": 0.5}),
    ]
    return _over_time(panels, "dropped")


def untied() -> Any:
    """Four masks of ``h``, one a gate."""
    mask = made(hidden_dropout=0.5, gate_masks="untied").hidden_dropout[0]
    figure, grid = pyplot.subplots(1, 4, figsize=(7.0, 2.4), layout="constrained")
    for axes, name, gate in zip(grid, "ifgo", mask, strict=True):
        _grid(axes, gate.expand(STEPS, -1).T, f"hidden_dropout, gate {name}", "step", "unit")
    _legend(figure, "dropped")
    return figure


def recurrent_dropout() -> Any:
    """Dropout of the cell's update, by step and by sequence."""
    rate = {"update_dropout": 0.5}
    panels = [
        ('update_mask="step"', "update_dropout", rate),
        ('update_mask="sequence"', "update_dropout", {**rate, "update_mask": "sequence"}),
    ]
    return _over_time(panels, "update dropped")


def rnndrop() -> Any:
    """Dropout of the cell itself."""
    return _over_time([("cell_dropout", "cell_dropout", {"cell_dropout": 0.5})], "cell is 0")


def zoneout() -> Any:
    """Zoneout of both states, independently, at every step."""
    options = {"zoneout_hidden": 0.3, "zoneout_cell": 0.5}
    panels = [("zoneout_hidden", "zoneout_hidden", options), ("zoneout_cell", "zoneout_cell", options)]
    return _over_time(panels, "keeps its previous value", "takes its new value")


def weight_dropout() -> Any:
    """DropConnect by element and by row."""
    figure, grid = pyplot.subplots(1, 2, figsize=(6.6, 4.2), layout="constrained")
    for axes, kind in zip(grid, ("element", "row"), strict=True):
        mask = made(weight_dropout=0.5, weight_mask=kind).weight_dropout.expand(4 * UNITS, UNITS)
        _grid(axes, mask, f'weight_mask="{kind}"', "from unit of h", "to unit of gates i, f, g, o")
        for gate in (1, 2, 3):
            axes.axhline(gate * UNITS, color="black", linewidth=0.8)
    _legend(figure, "dropped, for all rows and steps")
    return figure


def _pooled(panels: list[tuple[str, Callable[[int, int, int], bool]]]) -> Any:
    """Which values one mean and variance is taken over: a batch's rows × a gate's units, at three steps."""
    rows, units, steps = 6, 8, 3
    figure, grid = pyplot.subplots(len(panels), steps, figsize=(6.0, 1.7 * len(panels)), layout="constrained")
    for line, (title, pooled) in zip(grid, panels, strict=True):
        for step, axes in enumerate(line):
            values = torch.tensor([[pooled(step, row, unit) for unit in range(units)] for row in range(rows)])
            axes.pcolormesh(
                values.int().numpy(), cmap=ListedColormap([KEPT, OTHER]), vmin=0, vmax=1, edgecolors="white"
            )
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"unit, step {step}", fontsize=8)
        line[0].set_ylabel("row", fontsize=8)
        line[1].set_title(title, fontsize=9)
    figure.legend(
        handles=[Patch(color=OTHER, label="one mean and variance")],
        loc="outside lower center",
        fontsize=8,
        frameon=False,
    )
    return figure


def batch_norm() -> Any:
    """Statistics of a step, and pooled over the steps."""
    return _pooled(
        [
            ('BatchNorm, each step: input_statistics="step"', lambda step, row, unit: step == 1 and unit == 3),
            ('its input term, pooled: input_statistics="sequence"', lambda step, row, unit: unit == 3),
        ]
    )


def layer_norm() -> Any:
    """Statistics of a row."""
    return _pooled(
        [
            ("LayerNorm", lambda step, row, unit: step == 1 and row == 2),
            ("the same row, one step on", lambda step, row, unit: step == 2 and row == 2),
        ]
    )


DRAWINGS: dict[str, Callable[[], Any]] = {
    "dropout": dropout,
    "variational": variational,
    "untied": untied,
    "recurrent_dropout": recurrent_dropout,
    "rnndrop": rnndrop,
    "zoneout": zoneout,
    "weight_dropout": weight_dropout,
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
}


def draw_all() -> dict[str, bytes]:
    """Every drawing as a PNG file, by the file's name."""
    results = {}
    for name, draw in DRAWINGS.items():
        figure, file = draw(), BytesIO()
        figure.savefig(file, format="png", dpi=160)
        pyplot.close(figure)
        results[f"{name}.png"] = file.getvalue()
    return results
