"""Saturated gates and dead units.

A gate is saturated where it is nearly shut or nearly open, and passes next to no gradient: right-saturated above
``high``, left-saturated below ``low`` (Karpathy, Johnson and Fei-Fei 2015, who count how often each unit is). ``g``, a
tanh, is saturated left below ``-high`` and right above ``high``. A unit is dead where its ``h`` is the same at every
step and in every row: it tells the layers above nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusedreg.inspect import figures
from fusedreg.inspect.places import GATES, Place
from fusedreg.inspect.states import LayerStates, States
from fusedreg.inspect.tables import check_writer, to_pandas

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_COLUMNS = ("module", "layer", "direction", "gate", "unit", "left", "right")


@dataclass(frozen=True, eq=False)
class LayerSaturation:
    """Of one layer and direction.

    Attributes:
        place: module, layer and direction.
        left, right: by gate ``(H,)``: how often, from 0 to 1, the unit's gate is left- and right-saturated.
        spread: ``(P,)``: the standard deviation of each unit's ``h`` over all steps and rows.
        dead: ``(P,)`` bool: whether that is below the threshold.
    """

    place: Place
    left: dict[str, Tensor]
    right: dict[str, Tensor]
    spread: Tensor
    dead: Tensor


@dataclass(frozen=True)
class Saturation:
    """Of the newest calls of some LSTMs, by layer and direction: ``layers``."""

    layers: tuple[LayerSaturation, ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every layer, gate and unit as a dictionary."""
        for layer in self.layers:
            for gate in GATES:
                both = zip(layer.left[gate].tolist(), layer.right[gate].tolist(), strict=True)
                for unit, (left, right) in enumerate(both):
                    yield dict(zip(_COLUMNS, (*layer.place, gate, unit, left, right), strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`rows` as a table.

        Raises:
            ImportError: pandas is not installed.
        """
        return to_pandas(self.rows(), _COLUMNS)

    def figure(self, *, width: float = figures.COLUMN_WIDTH) -> Figure:
        """A dot a unit, in a panel a layer and direction: how often its gate is shut against how often it is open.

        Units on the diagonal are saturated at every step; at the origin, never.
        """
        with figures.drawing():
            across = min(2, len(self.layers))
            down = -(-len(self.layers) // across)
            figure, grid = figures.new_figure(
                down, across, width=width, row_height=0.4 + width / across * 0.9, sharex=True, sharey=True
            )
            panels = [axes for row in grid for axes in row]
            for axes in panels[len(self.layers) :]:
                axes.set_visible(False)
            for axes, layer in zip(panels, self.layers, strict=False):
                for position, (gate, marker) in enumerate(zip(GATES, "osD^", strict=True)):
                    colour = figures.COLOURS[position]
                    own = {"s": 10, "marker": marker, "facecolors": "none", "edgecolors": colour, "linewidths": 0.7}
                    axes.scatter(layer.left[gate], layer.right[gate], label=gate, clip_on=False, **own)
                axes.plot([0, 1], [1, 0], color="0.6", linewidth=0.6, zorder=0)
                axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
                axes.set_title(f"{layer.place.label}\n{int(layer.dead.sum())} of {len(layer.dead)} units dead")
            for row in grid:
                row[0].set_ylabel("right-saturated\n(share of steps)")
            for axes in grid[-1]:
                axes.set_xlabel("left-saturated\n(share of steps)")
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return figure

    def write(self, writer: Any, step: int, *, prefix: str = "saturation") -> None:
        """For each layer TensorBoard scalars of the dead units and, by gate, the mean shares; and their histograms."""
        check_writer(writer)
        for layer in self.layers:
            name = f"{prefix}/{layer.place.label}"
            writer.add_scalar(f"{name}/dead_units", int(layer.dead.sum()), step)
            for gate in GATES:
                for side, shares in (("left", layer.left[gate]), ("right", layer.right[gate])):
                    writer.add_scalar(f"{name}/{gate}/{side}", shares.mean().item(), step)
                    writer.add_histogram(f"{name}/{gate}/{side}", shares, step)


def saturation(
    states: States | Sequence[LayerStates], *, low: float = 0.1, high: float = 0.9, dead: float = 1e-3
) -> Saturation:
    """How often each unit's gates are saturated, and which units are dead.

    Args:
        states: what :class:`~fusedreg.inspect.States` saw: its newest calls, or some of its layers.
        low: a gate is left-saturated below it (``g``: below ``-high``).
        high: and right-saturated above it.
        dead: a unit is dead where the standard deviation of its ``h`` over all steps and rows is below it.

    Raises:
        ValueError: thresholds out of order.

    Example:
        >>> import torch, fusedreg
        >>> lstm = torch.nn.LSTM(3, 4)
        >>> _ = torch.nn.init.constant_(lstm.bias_ih_l0.data[4:8], 10.0)  # forget gates wide open
        >>> with fusedreg.inspect.States(lstm) as states:
        ...     _ = lstm(torch.randn(7, 2, 3))
        >>> fusedreg.inspect.saturation(states).layers[0].right["f"]
        tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low, high: expected 0 <= low < high <= 1, got {low} and {high}")
    if not dead >= 0:
        raise ValueError(f"dead: expected a standard deviation of at least 0, got {dead}")
    made = []
    for layer in states.layers if isinstance(states, States) else states:
        left, right = {}, {}
        for gate in GATES:
            value = layer.values(gate).cpu().double()
            left[gate] = (value < (-high if gate == "g" else low)).double().mean(0)
            right[gate] = (value > high).double().mean(0)
        spread = layer.values("hidden").cpu().double().std(0, correction=0)
        made.append(LayerSaturation(layer.place, left, right, spread, spread < dead))
    return Saturation(tuple(made))
