"""Histograms and heat maps by gate and channel, of weights, gates, states and gradients alike.

A :class:`Histogram` says how one kind of value is distributed, gate by gate; a :class:`HeatMap` says which channel
(unit) has it, over time or over the columns of a weight. Where they come from: :func:`weight_histograms`,
:func:`weight_maps`, and the ``histograms()`` and ``maps()`` of :class:`~fusedreg.inspect.States` and
:class:`~fusedreg.inspect.GradientFlow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedreg.inspect import figures
from fusedreg.inspect.places import by_gate, layer_tensors, places
from fusedreg.inspect.tables import check_writer, to_pandas

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_HISTOGRAM_COLUMNS = ("name", "gate", "low", "high", "count")
_MAP_COLUMNS = ("name", "gate", "channel", "column", "value")


@dataclass(frozen=True, eq=False)
class Histogram:
    """How values are distributed, one row of counts a gate, over bins that all of them share.

    Attributes:
        name: what it is of: ``"encoder.l0 weight_hh"``.
        quantity: the label of its axis: what a value is, with its unit where it has one.
        gates: names of the rows; ``("",)`` for what belongs to no gate.
        edges: ``(bins + 1,)``.
        counts: ``(gates, bins)``.
        not_finite: ``(gates,)``: how many values are NaN or infinite, which no bin holds.
    """

    name: str
    quantity: str
    gates: tuple[str, ...]
    edges: Tensor
    counts: Tensor
    not_finite: Tensor

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every gate and bin as a dictionary."""
        edges = self.edges.tolist()
        for gate, counts in zip(self.gates, self.counts.tolist(), strict=True):
            for low, high, count in zip(edges, edges[1:], counts, strict=False):
                yield dict(zip(_HISTOGRAM_COLUMNS, (self.name, gate, low, high, count), strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`rows` as a table."""
        return to_pandas(self.rows(), _HISTOGRAM_COLUMNS)

    def figure(self, *, width: float = figures.COLUMN_WIDTH) -> Figure:
        """A line a gate: the share of the values in each bin."""
        with figures.drawing():
            figure, ((axes,),) = figures.new_figure(width=width)
            for position, (gate, counts) in enumerate(zip(self.gates, self.counts, strict=True)):
                share = counts.double() / counts.sum().clamp(min=1) * 100
                axes.stairs(share.numpy(), self.edges.numpy(), label=gate or None, **figures.style(position))
            axes.set_xlabel(self.quantity)
            axes.set_ylabel("values (%)")
            axes.set_title(self.name)
            if len(self.gates) > 1:
                axes.legend(ncols=2)
        return figure

    def write(self, writer: Any, step: int, *, prefix: str = "histogram") -> None:
        """The counts as TensorBoard histograms, one a gate."""
        check_writer(writer)
        if not callable(getattr(writer, "add_histogram_raw", None)):
            raise TypeError(f"writer: expected add_histogram_raw, as SummaryWriter has it, got {type(writer).__name__}")
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        for gate, counts in zip(self.gates, self.counts.double(), strict=True):
            number = int(counts.sum())
            if not number:
                continue
            writer.add_histogram_raw(
                _tag(prefix, self.name, gate),
                min=float(self.edges[0]),
                max=float(self.edges[-1]),
                num=number,
                sum=float((counts * centres).sum()),
                sum_squares=float((counts * centres.square()).sum()),
                bucket_limits=self.edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )


@dataclass(frozen=True, eq=False)
class HeatMap:
    """One value for each channel and column, a panel a gate.

    Attributes:
        name: what it is of.
        quantity: what a value is, for the colour bar.
        gates: names of the panels; ``("",)`` for what belongs to no gate.
        values: ``(gates, channels, columns)``. A channel is a unit of the layer.
        columns: what a column is: ``"step t"``, or the unit or feature that a weight reads.
        diverging: whether values have a sign.
    """

    name: str
    quantity: str
    gates: tuple[str, ...]
    values: Tensor
    columns: str
    diverging: bool

    def channels(self) -> Tensor:
        """``(gates, channels)``: the root mean square over the columns."""
        return self.values.double().square().mean(-1).sqrt()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every gate, channel and column as a dictionary."""
        for gate, panel in zip(self.gates, self.values.tolist(), strict=True):
            for channel, values in enumerate(panel):
                for column, value in enumerate(values):
                    yield dict(zip(_MAP_COLUMNS, (self.name, gate, channel, column, value), strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`rows` as a table."""
        return to_pandas(self.rows(), _MAP_COLUMNS)

    def figure(self, *, width: float = figures.COLUMN_WIDTH) -> Figure:
        """A panel a gate, channels downwards, with one colour bar. What is not finite is red."""
        with figures.drawing():
            across = 2 if len(self.gates) > 1 else 1
            down = -(-len(self.gates) // across)
            figure, grid = figures.new_figure(down, across, width=width, sharex=True, sharey=True, row_height=1.3)
            finite = self.values[torch.isfinite(self.values)]
            limit = float(finite.abs().max()) if finite.numel() else 0.0
            panels = [axes for row in grid for axes in row]
            for axes, gate, values in zip(panels, self.gates, self.values.double().numpy(), strict=False):
                image = figures.heat_map(axes, values, diverging=self.diverging, limit=limit or 1.0)
                axes.set_title(f"gate {gate}" if gate else "")
            for row in grid:
                row[0].set_ylabel("unit")
            for axes in grid[-1]:
                axes.set_xlabel(self.columns)
            figure.suptitle(self.name)
            figure.colorbar(image, ax=panels, label=self.quantity, pad=0.02)
        return figure

    def write(self, writer: Any, step: int, *, prefix: str = "channels") -> None:
        """A TensorBoard histogram a gate of :meth:`channels`, and its largest and its mean as scalars."""
        check_writer(writer)
        for gate, channels in zip(self.gates, self.channels(), strict=True):
            tag, finite = _tag(prefix, self.name, gate), channels[torch.isfinite(channels)]
            if finite.numel():
                writer.add_histogram(tag, finite, step)
                writer.add_scalar(f"{tag}/mean", finite.mean().item(), step)
                writer.add_scalar(f"{tag}/largest", finite.max().item(), step)


def _tag(*parts: str) -> str:
    return "/".join(part.replace(" ", "/") for part in parts if part)


def histogram(name: str, quantity: str, values: Mapping[str, Tensor], bins: int = 50) -> Histogram:
    """Count values by gate.

    Args:
        name, quantity: of the :class:`Histogram`.
        values: by gate, of any shape.
        bins: how many, between the smallest and the largest finite value of all gates.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins: expected an int of at least 1, got {bins!r}")
    flat = {gate: value.detach().flatten().cpu().double() for gate, value in values.items()}
    finite = {gate: value[torch.isfinite(value)] for gate, value in flat.items()}
    everything = torch.cat(list(finite.values()))
    low, high = (everything.min().item(), everything.max().item()) if everything.numel() else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    counts = [torch.histc(value, bins, low, high).to(torch.int64) for value in finite.values()]
    missing = [flat[gate].numel() - value.numel() for gate, value in finite.items()]
    return Histogram(name, quantity, tuple(flat), edges, torch.stack(counts), torch.tensor(missing))


def _weights(model: nn.Module, skip: Iterable[str], gradients: bool) -> Iterator[tuple[str, str, str, Tensor]]:
    """``(label, field, quantity, value)`` of every weight or of its gradient."""
    for place, module in places(model, skip):
        for field, weight in layer_tensors(module, place).items():
            if not gradients:
                yield place.label, field, "weight", weight.detach()
                continue
            if not weight.is_leaf:
                raise ValueError(
                    f"gradients: expected plain parameters, got {place.label} {field}, which is parametrised and has "
                    f"no gradient of its own; look at model.parametrizations, or leave the LSTM out with skip=..."
                )
            if weight.grad is not None:
                yield place.label, f"d{field}", "gradient of the loss", weight.grad.detach()


def weight_histograms(
    model: nn.Module, *, gradients: bool = False, bins: int = 50, skip: Iterable[str] = ()
) -> list[Histogram]:
    """How the parameters of each layer and direction are distributed, gate by gate; biases and gains too.

    Args:
        model: a :class:`fusedreg.LSTM` or an ``nn.LSTM``, or a module with some inside.
        gradients: the parameters' ``.grad`` instead, of those that have one.
        bins: how many.
        skip: names of LSTMs, and of cells (which are refused), to leave out.

    Example:
        >>> import torch, fusedreg
        >>> first = fusedreg.inspect.weight_histograms(torch.nn.LSTM(3, 4))[0]
        >>> first.name, first.gates, first.counts.sum(1)
        ('l0 weight_ih', ('i', 'f', 'g', 'o'), tensor([12, 12, 12, 12]))
    """
    return [
        histogram(f"{label} {field}", quantity, by_gate(field.removeprefix("d"), value), bins)
        for label, field, quantity, value in _weights(model, skip, gradients)
    ]


def weight_maps(model: nn.Module, *, gradients: bool = False, skip: Iterable[str] = ()) -> list[HeatMap]:
    """Every weight matrix, a panel a gate: unit by the feature or unit that it reads.

    Args:
        model, gradients, skip: as for :func:`weight_histograms`.

    Example:
        >>> import torch, fusedreg
        >>> fusedreg.inspect.weight_maps(torch.nn.LSTM(3, 5))[1].values.shape
        torch.Size([4, 5, 5])
    """
    made = []
    for label, field, quantity, value in _weights(model, skip, gradients):
        if value.dim() == 2:
            panels = by_gate(field.removeprefix("d"), value.cpu())
            columns = "input feature" if field.endswith("ih") else "unit read"
            values = torch.stack(list(panels.values()))
            made.append(HeatMap(f"{label} {field}", quantity, tuple(panels), values, columns, diverging=True))
    return made
