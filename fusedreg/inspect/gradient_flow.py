"""The gradient that reaches ``h`` and ``c`` at every step, seen from a normal backward.

``dL/dh_s`` is what arrives at the carried ``h_s``: through the output ``y_t``, through step ``s+1`` and through
``h_n``. ``dL/dc_s`` is what arrives at the cell of step ``s`` through ``h_s``, through step ``s+1``, through ``c_n``
and through returned cell states. An LSTM whose ``dL/dc_s`` shrinks by a factor a step going back cannot learn from
what came that many steps ago (Hochreiter 1991; Pascanu, Mikolov and Bengio 2013).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusedreg.inspect import flow_figure
from fusedreg.inspect.distributions import HeatMap, Histogram, histogram
from fusedreg.inspect.places import Place, find_lstms
from fusedreg.inspect.states import check_keep, mean_over_rows, valid_steps
from fusedreg.inspect.tables import check_writer, to_pandas
from fusedreg.inspect.watching import GradientListener, Watcher
from fusedreg.layer import REVERSE, LayerResult
from fusedreg.modules import LSTM
from fusedreg.recording import LayerCall, Layout

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

State = Literal["hidden", "cell"]
STATES: tuple[State, State] = ("hidden", "cell")

LABELS = {"hidden": r"$\partial L/\partial h_t$", "cell": r"$\partial L/\partial c_t$"}

_COLUMNS = ("module", "call", "layer", "direction", "state", "step", "norm", "largest", "mark")


@dataclass(frozen=True)
class Marks:
    """The steps at which a gradient vanishes or explodes, and the norm they were measured against."""

    vanishing: tuple[int, ...]
    exploding: tuple[int, ...]
    reference: float


@dataclass(eq=False)
class LayerFlow:
    """What reached one layer and direction in one call.

    Attributes:
        place: module, layer and direction.
        time_first: ``"hidden"`` to ``dL/dh (T, B, P)`` and ``"cell"`` to ``dL/dc (T, B, H)``, by position in the
            input, 0 in padding. Summed over backwards through the same call, as ``.grad`` is.
        lengths: ``(B,)``, or ``None``.
        layout: the caller's.
    """

    place: Place
    time_first: dict[str, Tensor]
    lengths: Tensor | None
    layout: Layout

    @property
    def hidden(self) -> Any:
        """``dL/dh`` in the caller's layout: ``(T, B, P)``, ``(B, T, P)``, ``(T, P)``, or a ``PackedSequence``."""
        return self.layout.restore(self.time_first["hidden"])

    @property
    def cell(self) -> Any:
        """``dL/dc`` in the caller's layout, ``H`` wide."""
        return self.layout.restore(self.time_first["cell"])

    @property
    def valid(self) -> Tensor:
        """``(T, B)``: which rows have a step there."""
        return valid_steps(self.time_first["hidden"], self.lengths)

    def norms(self, state: State = "hidden") -> Tensor:
        """``(T, B)``: the Euclidean norm over the units, by step and row; 0 in padding."""
        norms: Tensor = torch.linalg.vector_norm(_state(self.time_first, state).double(), dim=-1)
        return norms

    def norm_over_time(self, state: State = "hidden") -> Tensor:
        """``(T,)``: the root mean square over the rows that have the step; NaN where none has."""
        valid = self.valid
        squares = torch.where(valid, self.norms(state).square(), 0.0).sum(1)
        return torch.sqrt(squares / valid.sum(1))

    def marks(
        self,
        state: State = "hidden",
        *,
        vanishing: float = 1e-3,
        exploding: float = 1e3,
        relative_to: float | Literal["last"] = "last",
    ) -> Marks:
        """The steps whose norm over time is out of bounds.

        Args:
            state: ``"hidden"`` or ``"cell"``.
            vanishing: a step is marked below ``vanishing`` times the reference.
            exploding: and above ``exploding`` times it, and where the norm is not finite.
            relative_to: the reference: ``"last"`` is the norm at the last step processed (the first position in the
                reverse direction) that any gradient reached, where the way back begins; steps after it have nothing
                to lose and are not marked. Or a number, which makes the bounds absolute.
        """
        if not 0 <= vanishing <= exploding:
            raise ValueError(
                f"vanishing, exploding: expected 0 <= vanishing <= exploding, got {vanishing}, {exploding}"
            )
        if relative_to != "last" and not (isinstance(relative_to, (int, float)) and relative_to > 0):
            raise ValueError(f"relative_to: expected 'last' or a number above 0, got {relative_to!r}")
        norms, reached = self.norm_over_time(state).tolist(), self.valid.any(1).tolist()
        present = [(step, norm) for step, norm in enumerate(norms) if reached[step]]
        if relative_to == "last":
            back = present if self.place.direction == REVERSE else present[::-1]  # as the gradient goes
            unreached = next((at for at, (_, norm) in enumerate(back) if norm != 0), 0)
            reference = next((norm for _, norm in back if math.isfinite(norm) and norm > 0), 0.0)
            present = sorted(back[unreached:])
        else:
            reference = float(relative_to)
        return Marks(
            tuple(step for step, norm in present if norm < vanishing * reference or norm == 0),
            tuple(step for step, norm in present if norm > exploding * reference or not math.isfinite(norm)),
            reference,
        )


@dataclass(eq=False)
class FlowCall:
    """One forward of one LSTM that a backward has come through.

    Attributes:
        module: the LSTM's name in the model.
        index: the number of this forward among those of the block, from 0.
        layers: by layer, then direction.
        backwards: how many backwards have come through.
    """

    module: str
    index: int
    layers: list[LayerFlow] = field(default_factory=list)
    backwards: int = 0


class GradientFlow(Watcher):
    """The gradient reaching ``h_t`` and ``c_t`` at each step, for each layer, direction, row and unit.

    Put it around a forward and its ``loss.backward()``. Nothing is run twice, and neither the model nor its gradients
    and masks change; a forward in the block takes no more memory, a backward that of the gradients shown, which go
    where the input is.

    Every forward is a call of its own, so that pieces of a truncated run, or two forwards before one backward, stand
    beside each other in ``calls``. A second backward through the same forward (``retain_graph=True``) adds to what
    the first left, as ``.grad`` does. Under activation checkpointing the backward belongs into the block too.

    Args:
        model: a :class:`fusedreg.LSTM`, or a module with some inside.
        skip: names of LSTMs, and of cells (which are refused), to leave out.
        keep: only the newest ``keep`` calls of each LSTM; ``None``: all of them, until :meth:`clear`.

    Raises:
        ValueError: the model has an ``nn.LSTM`` that is not skipped: its steps are inside one library call, where
            nothing can be seen. Replace it with :func:`fusedreg.replace_lstms` (or make the one module a
            :meth:`fusedreg.LSTM.from_torch`), which computes the same.
        RuntimeError: in a call that is compiled as a whole (``fullgraph=True``; else it runs eagerly inside the block)
            or under a ``torch.func`` transform, or by a named backend without probes; and where flow is asked for
            before a backward has come through. ``torch.autograd.grad`` and ``backward(inputs=...)`` go to what they
            name and nowhere else: use ``loss.backward()``.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4, num_layers=2)
        >>> with fusedreg.inspect.GradientFlow(lstm) as flow:
        ...     lstm(torch.randn(7, 2, 3))[0][-1].sum().backward()
        >>> flow.layers[1].hidden.shape, flow.layers[1].norm_over_time("cell").shape
        (torch.Size([7, 2, 4]), torch.Size([7]))
    """

    def __init__(self, model: nn.Module, *, skip: Iterable[str] = (), keep: int | None = None) -> None:
        found = find_lstms(model, skip)
        if hidden := [name or "the model itself" for name, module in found.items() if not isinstance(module, LSTM)]:
            raise ValueError(
                f"model: expected fusedreg.LSTM, got nn.LSTM at {', '.join(hidden)}, which has its steps in one "
                "library call, where their gradients cannot be seen; fusedreg.replace_lstms(model), or "
                "fusedreg.LSTM.from_torch(module) for a module itself, computes the same; or pass skip=..."
            )
        check_keep(keep)
        super().__init__(found)
        self._keep = keep
        self._counts = dict.fromkeys(found, 0)
        self._calls: dict[str, deque[FlowCall]] = {name: deque() for name in found}

    def _watch(self, name: str, layout: Layout) -> _Call:
        """A call begins; it is listed when a backward reaches it."""
        call = FlowCall(name, self._counts[name])
        self._counts[name] += 1
        return _Call(self, call, layout)

    def _reached(self, call: FlowCall) -> None:
        calls = self._calls[call.module]
        if call not in calls:
            calls.append(call)
            self._calls[call.module] = calls = deque(sorted(calls, key=lambda own: own.index), maxlen=self._keep)

    @property
    def calls(self) -> list[FlowCall]:
        """The forwards that a backward has come through: by LSTM in the model's order, then as they were made."""
        return [call for calls in self._calls.values() for call in calls]

    @property
    def layers(self) -> list[LayerFlow]:
        """The newest call of each LSTM, layer by layer.

        Raises:
            RuntimeError: no backward has come through.
        """
        newest = [calls[-1] for calls in self._calls.values() if calls]
        if not newest:
            forwards = sum(self._counts.values())
            raise RuntimeError(
                f"GradientFlow: expected a forward inside the block and loss.backward() after it, got {forwards} "
                "forwards and no gradient; torch.autograd.grad(...) and backward(inputs=...) do not pass here, nor "
                "does a forward under torch.no_grad()"
            )
        return [layer for call in newest for layer in call.layers]

    def clear(self) -> None:
        """Forget all calls so far."""
        for calls in self._calls.values():
            calls.clear()

    def rows(self, **bounds: Any) -> Iterator[dict[str, Any]]:
        """Every call, layer, state and step as a dictionary; ``bounds`` are those of :meth:`LayerFlow.marks`.

        ``norm`` is :meth:`LayerFlow.norm_over_time`, ``largest`` the largest row's, ``mark`` ``"vanishing"``,
        ``"exploding"`` or ``""``.
        """
        for call in self.calls:
            for layer in call.layers:
                for state in STATES:
                    marks = layer.marks(state, **bounds)
                    norms = layer.norms(state)
                    largest = norms.amax(1).tolist() if norms.shape[1] else [math.nan] * norms.shape[0]
                    for step, norm in enumerate(layer.norm_over_time(state).tolist()):
                        mark = (
                            "vanishing" if step in marks.vanishing else "exploding" if step in marks.exploding else ""
                        )
                        own = (call.module, call.index, layer.place.layer, layer.place.direction, state, step)
                        yield dict(zip(_COLUMNS, (*own, norm, largest[step], mark), strict=True))

    def to_pandas(self, **bounds: Any) -> pandas.DataFrame:
        """:meth:`rows` as a table.

        Raises:
            ImportError: pandas is not installed.
        """
        return to_pandas(self.rows(**bounds), _COLUMNS)

    def figure(self, *, width: float = 3.4, **bounds: Any) -> Figure:
        """The norms of the newest calls over time, with marks where they vanish (▽) or explode (△).

        Args:
            width: of the figure, in inches.
            **bounds: of :meth:`LayerFlow.marks`.

        Raises:
            RuntimeError: no backward has come through. ImportError: matplotlib is not installed.
        """
        return flow_figure.draw(self.layers, width=width, bounds=bounds)

    def histograms(self, *, bins: int = 50) -> list[Histogram]:
        """Of the newest calls, for each layer: one of ``dL/dh`` and one of ``dL/dc``, over steps, rows and units."""
        return [
            histogram(f"{layer.place.label} d{state}", LABELS[state], {"": layer.time_first[state][layer.valid]}, bins)
            for layer in self.layers
            for state in STATES
        ]

    def maps(self) -> list[HeatMap]:
        """Of the newest calls, for each layer: ``dL/dh`` and ``dL/dc`` by unit and step, root mean square over rows."""
        made = []
        for layer in self.layers:
            for state in STATES:
                squares = mean_over_rows(layer.time_first[state].double().square(), layer.valid)
                values, quantity = squares.sqrt().unsqueeze(0), f"{LABELS[state]} (RMS over rows)"
                name = f"{layer.place.label} d{state}"
                made.append(HeatMap(name, quantity, ("",), values, "step $t$", diverging=False))
        return made

    def write(self, writer: Any, step: int, *, prefix: str = "gradient_flow", **bounds: Any) -> None:
        """The newest calls as TensorBoard scalars and histograms.

        For each layer and state ``first_step``, ``last_step`` (the norm at the two ends of the input), ``smallest``
        and ``largest`` over the steps, ``vanishing_steps`` and ``exploding_steps`` (how many), and a histogram of the
        gradient.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``.
            step: of the training.
            prefix: of the names.
            **bounds: of :meth:`LayerFlow.marks`.
        """
        check_writer(writer)
        for layer in self.layers:
            for state in STATES:
                name, marks = f"{prefix}/{layer.place.label}/{state}", layer.marks(state, **bounds)
                norms = layer.norm_over_time(state)
                norms = norms[layer.valid.any(1)]
                if norms.numel():
                    ends = {
                        "first_step": norms[0],
                        "last_step": norms[-1],
                        "smallest": norms.min(),
                        "largest": norms.max(),
                    }
                    for key, norm in ends.items():
                        writer.add_scalar(f"{name}/{key}", norm.item(), step)
                writer.add_scalar(f"{name}/vanishing_steps", len(marks.vanishing), step)
                writer.add_scalar(f"{name}/exploding_steps", len(marks.exploding), step)
                values = layer.time_first[state][layer.valid].float()
                values = values[torch.isfinite(values)]  # the writer refuses others
                if values.numel():
                    writer.add_histogram(name, values, step)


class _Call:
    """Gathers the gradients of one call as a backward brings them."""

    differentiates = True

    def __init__(self, flow: GradientFlow, call: FlowCall, layout: Layout) -> None:
        self._flow, self._call, self._layout = flow, call, layout

    def gradient_listener(self, call: LayerCall) -> GradientListener:
        """A layer's gradients are zeros until they come: none comes where no way leads from the loss."""
        steps, rows = call.input.shape[:2]
        options = call.options
        place = Place(self._call.module, options.layer, options.direction)
        lengths = None if call.lengths is None else call.lengths.detach().clamp(0, steps)
        sizes = {"hidden": call.parameters.weight_hh.shape[1], "cell": call.parameters.weight_ih.shape[0] // 4}
        nothing = {
            state: torch.zeros((), dtype=call.input.dtype, device=call.input.device).expand(steps, rows, size)
            for state, size in sizes.items()
        }
        layer, arrived = LayerFlow(place, nothing, lengths, self._layout), dict.fromkeys(sizes, 0)
        self._call.layers.append(layer)

        def listen(state: str, gradient: Tensor) -> None:
            layer.time_first[state] = layer.time_first[state] + gradient if arrived[state] else gradient
            arrived[state] += 1
            self._call.backwards = max(self._call.backwards, arrived[state])
            self._flow._reached(self._call)

        return listen

    def seen(self, call: LayerCall, result: LayerResult) -> None:
        """Everything comes with the backward."""


def _state(values: dict[str, Tensor], state: str) -> Tensor:
    if state not in STATES:
        raise ValueError(f"state: expected 'hidden' or 'cell', got {state!r}")
    return values[state]
