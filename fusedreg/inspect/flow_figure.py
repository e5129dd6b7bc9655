"""The picture of a gradient's way back: norm over time by layer, with the steps where it vanishes or explodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusedreg.inspect import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fusedreg.inspect.gradient_flow import LayerFlow

_PANELS = {"hidden": r"$\|\partial L/\partial h_t\|_2$", "cell": r"$\|\partial L/\partial c_t\|_2$"}


def draw(layers: Sequence[LayerFlow], *, width: float, bounds: Mapping[str, Any]) -> Figure:
    """One panel for ``h`` and one for ``c``, a line a layer and direction.

    Args:
        layers: what to draw.
        width: in inches.
        bounds: of ``LayerFlow.marks``.
    """
    with figures.drawing():
        figure, rows = figures.new_figure(2, 1, width=width, row_height=1.45, sharex=True)
        marked = {"vanishing": False, "exploding": False}
        for (axes,), (state, label) in zip(rows, _PANELS.items(), strict=True):
            for position, layer in enumerate(layers):
                norms = layer.norm_over_time(state).cpu()  # type: ignore[arg-type]
                line = figures.style(position)
                axes.plot(norms.where(norms > 0, float("nan")), label=layer.place.label, **line)
                marks = layer.marks(state, **bounds)  # type: ignore[arg-type]
                for kind, sign in (("vanishing", "v"), ("exploding", "^")):
                    steps = getattr(marks, kind)
                    if not steps:
                        continue
                    marked[kind] = True
                    # What cannot stand on a logarithmic axis, 0 or not finite, is marked at the frame.
                    inside = [step for step in steps if norms[step].isfinite() and norms[step] > 0]
                    outside = [step for step in steps if step not in inside]
                    sizes = {"s": 9, "color": line["color"], "marker": sign, "linewidths": 0, "zorder": 3}
                    axes.scatter(inside, norms[inside], **sizes)
                    edge = 0.02 if kind == "vanishing" else 0.98
                    axes.scatter(outside, [edge] * len(outside), transform=axes.get_xaxis_transform(), **sizes)
            axes.set_yscale("log")
            axes.set_ylabel(f"{label}\n(RMS over rows)")
        rows[-1][0].set_xlabel("step $t$")
        axes = rows[0][0]
        for kind, sign in (("vanishing", "v"), ("exploding", "^")):
            if marked[kind]:
                axes.scatter([], [], s=9, color="0.3", marker=sign, linewidths=0, label=kind)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
