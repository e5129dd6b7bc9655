"""Gates and states of every step, as the law computes them.

No kernel keeps all of them, so they are computed once more after each layer, by :mod:`fusedreg.reference` from what the
layer was given: the same input, initial state, weights, seed (and so the same masks) and statistics. They are what the
layer computed, within rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedreg import reference
from fusedreg.inspect.distributions import HeatMap, Histogram, histogram
from fusedreg.inspect.places import GATES, Place, find_lstms
from fusedreg.inspect.tables import to_pandas
from fusedreg.inspect.watching import GradientListener, Watcher
from fusedreg.layer import LayerResult
from fusedreg.recording import LayerCall, Layout

if TYPE_CHECKING:
    import pandas

STATE_NAMES = ("hidden", "cell")
_LABELS = {
    **{gate: f"gate {gate}" for gate in GATES},
    "hidden": "$h_t$",
    "cell": "$c_t$",
}
_COLUMNS = ("module", "call", "layer", "direction", "name", "step", "mean", "std", "smallest", "largest")


@dataclass(frozen=True, eq=False)
class LayerStates:
    """Gates and states of one layer and direction in one call.

    Attributes:
        place: module, layer and direction.
        call: the number of the call among those of its LSTM in the block, from 0.
        time_first: by name: the gates ``"i"``, ``"f"``, ``"g"``, ``"o"`` after their σ or tanh, and ``"cell"``, the
            carried ``c_s``, ``(T, B, H)``; ``"hidden"``, the carried ``h_s``, ``(T, B, P)``. By position in the input,
            in the compute type, 0 in padding.
        lengths: ``(B,)``, or ``None``.
        layout: the caller's.
    """

    place: Place
    call: int
    time_first: dict[str, Tensor]
    lengths: Tensor | None
    layout: Layout

    def __getitem__(self, name: str) -> Any:
        """A gate or a state by its name, in the caller's layout."""
        if name not in self.time_first:
            raise KeyError(f"expected one of {', '.join(self.time_first)}, got {name!r}")
        return self.layout.restore(self.time_first[name])

    @property
    def valid(self) -> Tensor:
        """``(T, B)``: which rows have a step there."""
        return valid_steps(self.time_first["hidden"], self.lengths)

    def values(self, name: str) -> Tensor:
        """``(N, units)``: the values of every row and step, without padding."""
        return self.time_first[name][self.valid]


def valid_steps(value: Tensor, lengths: Tensor | None) -> Tensor:
    """``(T, B)``: which rows of ``value (T, B, ·)`` have a step there."""
    steps, rows = value.shape[:2]
    if lengths is None:
        return torch.ones(steps, rows, dtype=torch.bool, device=value.device)
    return torch.arange(steps, device=value.device).unsqueeze(1) < lengths


class States(Watcher):
    """The gates and states of every step of the calls made in the block, in training and in evaluation.

    They are computed once more after each layer by the reference, step by step, which takes its time and memory: put
    the block around a few calls, not around a training. Nothing in the model or in its masks changes. With a batch norm
    over a process group, every rank has to watch.

    Args:
        model: a :class:`fusedreg.LSTM` or an ``nn.LSTM``, or a module with some inside.
        skip: names of LSTMs, and of cells (which are refused), to leave out.
        keep: only the newest ``keep`` calls of each LSTM; ``None``: all.

    Raises:
        RuntimeError: in a call that is compiled as a whole (``fullgraph=True``; else it runs eagerly inside the block)
            or under a ``torch.func`` transform; and for an ``nn.LSTM`` with dropout between its layers in training,
            whose masks nobody knows.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4, zoneout_cell=0.5)
        >>> with fusedreg.inspect.States(lstm) as states:
        ...     output, _ = lstm(torch.randn(7, 2, 3))
        >>> forget_gate = states.layers[0]["f"]
        >>> forget_gate.shape
        torch.Size([7, 2, 4])
    """

    def __init__(self, model: nn.Module, *, skip: Iterable[str] = (), keep: int | None = None) -> None:
        found = find_lstms(model, skip)
        check_keep(keep)
        super().__init__(found)
        self._counts = dict.fromkeys(found, 0)
        self._calls: dict[str, deque[list[LayerStates]]] = {name: deque(maxlen=keep) for name in found}

    def _watch(self, name: str, layout: Layout) -> _Call:
        """A call begins."""
        layers: list[LayerStates] = []
        self._calls[name].append(layers)
        self._counts[name] += 1
        return _Call(name, self._counts[name] - 1, layers, layout)

    @property
    def calls(self) -> list[list[LayerStates]]:
        """The layers of each call: by LSTM in the model's order, then as they were made."""
        return [call for calls in self._calls.values() for call in calls]

    @property
    def layers(self) -> list[LayerStates]:
        """The newest call of each LSTM, layer by layer.

        Raises:
            RuntimeError: there was no call in the block.
        """
        newest = [layer for calls in self._calls.values() if calls for layer in calls[-1]]
        if not newest:
            raise RuntimeError("States: expected a call of the model inside the block, got none")
        return newest

    def clear(self) -> None:
        """Forget all calls so far."""
        for calls in self._calls.values():
            calls.clear()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every call, layer, gate or state, and step as a dictionary: mean, spread and ends over rows and units."""
        for call in self.calls:
            for layer in call:
                valid = layer.valid
                for name, value in layer.time_first.items():
                    for step, present in enumerate(valid):
                        own = value[step][present]
                        if not own.numel():
                            continue
                        numbers = (own.mean(), own.std(correction=0), own.min(), own.max())
                        row = (layer.place.module, layer.call, layer.place.layer, layer.place.direction, name, step)
                        yield dict(zip(_COLUMNS, (*row, *(float(number) for number in numbers)), strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`rows` as a table.

        Raises:
            ImportError: pandas is not installed.
        """
        return to_pandas(self.rows(), _COLUMNS)

    def histograms(self, *, bins: int = 50) -> list[Histogram]:
        """Of the newest calls, for each layer: one of the gates, one of ``h`` and one of ``c``."""
        made = []
        for layer in self.layers:
            label = layer.place.label
            gates = {gate: layer.values(gate) for gate in GATES}
            made.append(histogram(f"{label} gates", "gate", gates, bins))
            made += [
                histogram(f"{label} {name}", _LABELS[name], {"": layer.values(name)}, bins) for name in STATE_NAMES
            ]
        return made

    def maps(self) -> list[HeatMap]:
        """Of the newest calls, for each layer: gates, ``h`` and ``c`` by unit and step, the mean over the rows."""
        made = []
        for layer in self.layers:
            valid, label = layer.valid, layer.place.label
            gates = torch.stack([mean_over_rows(layer.time_first[gate], valid) for gate in GATES])
            made.append(HeatMap(f"{label} gates", "gate (mean over rows)", GATES, gates, "step $t$", diverging=True))
            for name in STATE_NAMES:
                values = mean_over_rows(layer.time_first[name], valid).unsqueeze(0)
                quantity = f"{_LABELS[name]} (mean over rows)"
                made.append(HeatMap(f"{label} {name}", quantity, ("",), values, "step $t$", diverging=True))
        return made


def mean_over_rows(value: Tensor, valid: Tensor) -> Tensor:
    """``(T, B, N)`` to ``(N, T)`` on the host: the mean over the rows that have the step, NaN where none has."""
    total = torch.where(valid.unsqueeze(-1), value, 0.0).sum(1)
    return (total / valid.sum(1, keepdim=True)).t().cpu()


def check_keep(keep: int | None) -> None:
    """Raise a :class:`ValueError` unless ``keep`` is a number of calls or ``None``."""
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep: expected an int of at least 1, or None for all, got {keep!r}")


def law(call: LayerCall) -> dict[str, Tensor]:
    """The intermediate values of a layer's call, by the reference; see ``reference.lstm_layer``."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        reference.lstm_layer(
            *call[:5], lengths=call.lengths, reset=call.reset, seed=call.seed, running=call.running, intermediates=seen
        )
    return seen


class _Call:
    """Computes the gates of one call, layer by layer."""

    differentiates = False

    def __init__(self, module: str, index: int, layers: list[LayerStates], layout: Layout) -> None:
        self._module, self._index, self._layers, self._layout = module, index, layers, layout

    def gradient_listener(self, call: LayerCall) -> GradientListener:
        raise NotImplementedError

    def seen(self, call: LayerCall, result: LayerResult) -> None:
        """Gates from their pre-activations, states as they are carried."""
        own = law(call)
        i, f, g, o = own["preactivation"].chunk(4, -1)
        valid = valid_steps(i, call.lengths).unsqueeze(-1)
        gates = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
        values = {name: torch.where(valid, gate, 0.0) for name, gate in gates.items()}
        values |= {"cell": own["cell"], "hidden": own["hidden"]}
        place = Place(self._module, call.options.layer, call.options.direction)
        lengths = None if call.lengths is None else call.lengths.clamp(0, call.input.shape[0])
        self._layers.append(LayerStates(place, self._index, values, lengths, self._layout))
