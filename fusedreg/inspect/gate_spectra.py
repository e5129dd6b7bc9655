"""Singular values and spectral radius of each gate's block of ``W_hh``.

They bound how a gradient changes on its way back through the recurrent product: a largest singular value below 1 makes
it shrink at every step, and one above 1 is needed for it to explode (Pascanu, Mikolov and Bengio 2013). In an LSTM
that is one of two ways back: the cell's own, ``f ⊙ dc``, does not pass through ``W_hh``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedreg.inspect import figures
from fusedreg.inspect.places import GATES, Place, layer_tensors, places
from fusedreg.inspect.tables import check_writer, to_pandas

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_COLUMNS = ("module", "layer", "direction", "gate", "spectral_norm", "smallest", "rank", "spectral_radius")


@dataclass(frozen=True, eq=False)
class GateSpectrum:
    """Of one gate's ``(H, P)`` block of ``W_hh``.

    Attributes:
        place: module, layer and direction.
        gate: ``"i"``, ``"f"``, ``"g"`` or ``"o"``.
        singular_values: ``(min(H, P),)``, the largest first: that is the spectral norm.
        spectral_radius: the largest absolute eigenvalue. With a projection, of ``W_hr W_hh``, the square matrix that
            takes one projected state to the next.
    """

    place: Place
    gate: str
    singular_values: Tensor
    spectral_radius: float

    @property
    def spectral_norm(self) -> float:
        """The largest singular value."""
        return float(self.singular_values[0])


@dataclass(frozen=True)
class Spectra:
    """The spectra of every layer, direction and gate of a model: ``gates``."""

    gates: tuple[GateSpectrum, ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every gate as a dictionary: the ends of its singular values, its rank in float64 and its radius."""
        for own in self.gates:
            values = own.singular_values
            rank = int((values > values[0] * max(values.shape) * torch.finfo(values.dtype).eps).sum())
            row = (*own.place, own.gate, own.spectral_norm, float(values[-1]), rank, own.spectral_radius)
            yield dict(zip(_COLUMNS, row, strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`rows` as a table."""
        return to_pandas(self.rows(), _COLUMNS)

    def figure(self, *, width: float = figures.COLUMN_WIDTH) -> Figure:
        """Singular values in order, a panel a layer and direction and a line a gate; a dot is the spectral radius."""
        with figures.drawing():
            labels = list(dict.fromkeys(own.place.label for own in self.gates))
            figure, rows = figures.new_figure(len(labels), 1, width=width, row_height=1.4, sharex=True)
            for (axes,), label in zip(rows, labels, strict=True):
                for own in self.gates:
                    if own.place.label != label:
                        continue
                    line = figures.style(GATES.index(own.gate))
                    axes.plot(range(1, len(own.singular_values) + 1), own.singular_values, label=own.gate, **line)
                    axes.scatter([1], [own.spectral_radius], s=12, color=line["color"], zorder=3)
                axes.axhline(1.0, color="0.6", linewidth=0.6, zorder=0)
                axes.set_ylabel("singular value")
                axes.set_title(label)
            rows[-1][0].set_xlabel("index (dot at 1: spectral radius)")
            rows[0][0].legend(ncols=4)
        return figure

    def write(self, writer: Any, step: int, *, prefix: str = "spectrum") -> None:
        """For each gate TensorBoard scalars of the spectral norm and radius, and a histogram of the singular values."""
        check_writer(writer)
        for own in self.gates:
            tag = f"{prefix}/{own.place.label}/{own.gate}"
            writer.add_scalar(f"{tag}/spectral_norm", own.spectral_norm, step)
            writer.add_scalar(f"{tag}/spectral_radius", own.spectral_radius, step)
            writer.add_histogram(tag, own.singular_values, step)


def spectra(model: nn.Module, *, skip: Iterable[str] = ()) -> Spectra:
    """Singular values and spectral radius of each gate's ``W_hh``, computed in float64 on the CPU.

    Args:
        model: a :class:`fusedreg.LSTM` or an ``nn.LSTM``, or a module with some inside.
        skip: names of LSTMs, and of cells (which are refused), to leave out.

    Raises:
        ValueError: a weight is not finite; :class:`~fusedreg.inspect.NonFinite` says where.

    Example:
        >>> import torch, fusedreg
        >>> lstm = torch.nn.LSTM(3, 4)
        >>> _ = torch.nn.init.eye_(lstm.weight_hh_l0.data[4:8])
        >>> forget = fusedreg.inspect.spectra(lstm).gates[1]
        >>> forget.gate, forget.spectral_norm, forget.spectral_radius
        ('f', 1.0, 1.0)
    """
    made = []
    for place, module in places(model, skip):
        tensors = {field: value.detach().cpu().double() for field, value in layer_tensors(module, place).items()}
        weight_hh, weight_hr = tensors["weight_hh"], tensors.get("weight_hr")
        if not weight_hh.isfinite().all() or (weight_hr is not None and not weight_hr.isfinite().all()):
            raise ValueError(
                f"model: expected finite recurrent weights, got NaN or Inf in {place.label}; "
                "fusedreg.inspect.NonFinite says where it comes from"
            )
        for gate, block in zip(GATES, weight_hh.chunk(4), strict=True):
            square = block if weight_hr is None else weight_hr @ block
            radius = torch.linalg.eigvals(square).abs().max().item()
            made.append(GateSpectrum(place, gate, torch.linalg.svdvals(block), radius))
    return Spectra(tuple(made))
