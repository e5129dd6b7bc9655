"""Where the first NaN or infinity comes from: which LSTM, layer, gate, step, row and unit, and what brought it in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusedreg.inspect import figures
from fusedreg.inspect.places import GATES, Place, by_gate, find_lstms, layer_tensors, places
from fusedreg.inspect.states import law, valid_steps
from fusedreg.inspect.tables import check_writer, to_pandas
from fusedreg.inspect.watching import GradientListener, Watcher
from fusedreg.layer import REVERSE, LayerResult
from fusedreg.recording import LayerCall, Layout

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_COLUMNS = ("module", "layer", "direction", "call", "phase", "stage", "gates", "step", "row", "unit", "kind", "source")
_STAGES = ("preactivation", "candidate_cell", "cell", "hidden")
_EQUATION = {"preactivation": "z", "candidate_cell": "c̃", "cell": "c", "hidden": "h"}


@dataclass(frozen=True)
class Finding:
    """A first value that is not finite.

    Attributes:
        place: module, layer and direction.
        call: the number of the call among those of its LSTM in the block, from 0.
        phase: ``"forward"`` or ``"backward"``.
        stage: what is not finite: in the forward the ``"preactivation"`` ``z`` of some gates, the ``"candidate_cell"``
            ``c̃``, the carried ``"cell"`` or ``"hidden"``, or the ``"output"`` alone; in the backward the gradient that
            reaches ``"hidden"`` or ``"cell"``.
        gates: those whose ``z`` it is, or those of the weight that brought it in; empty where it is no gate's.
        step: position in the input of the first such step processed; in the backward, of the last: where it comes in.
        row, unit: the first there.
        kind: ``"NaN"`` or ``"Inf"``: what stands at the source, or there.
        source: what brought it in: a parameter with its place, the input, the initial state; in the backward, what
            comes after the layer; or that it arose there from finite values.
    """

    place: Place
    call: int
    phase: Literal["forward", "backward"]
    stage: str
    gates: tuple[str, ...]
    step: int
    row: int
    unit: int
    kind: Literal["NaN", "Inf"]
    source: str

    def __str__(self) -> str:
        gates = f", gate {' '.join(self.gates)}" if self.gates else ""
        return (
            f"{self.kind} in the {self.phase} of {self.place.label}, call {self.call}: {self.stage}{gates} at step "
            f"{self.step}, row {self.row}, unit {self.unit}; from {self.source}"
        )


class NonFinite(Watcher):
    """Watches the calls in the block, and locates the first NaN or infinity of each.

    After each layer its weights, input and results are looked at, which makes a GPU wait; where something is not
    finite, the layer is computed once more by the reference, step by step, to find the first such value. Of an
    ``nn.LSTM`` every call is, since nothing inside of it can be seen, and its backward is not watched. A pre-activation
    that overflows to infinity opens or shuts its gate, and goes no further: it is found only where it leads to more.

    Args:
        model: a :class:`fusedreg.LSTM` or an ``nn.LSTM``, or a module with some inside.
        skip: names of LSTMs, and of cells (which are refused), to leave out.
        backward: watch the gradients that reach ``h`` and ``c`` too. The block goes around the backward then.
        raise_error: raise a :class:`FloatingPointError` at the first finding, instead of going on.

    Attributes:
        findings: at most one for the forward and one for the backward of each call, in the order they came about.

    Raises:
        FloatingPointError: with ``raise_error``. RuntimeError: as :class:`~fusedreg.inspect.States` raises it; and with
            ``backward``, by a named backend without probes.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4, num_layers=2)
        >>> lstm.weight_hh_l1.data[5, 2] = float("nan")
        >>> with fusedreg.inspect.NonFinite(lstm, backward=False) as found:
        ...     output, _ = lstm(torch.randn(7, 2, 3))
        >>> print(found.first)
        NaN in the forward of l1, call 0: preactivation, gate f at step 0, row 0, unit 1; from weight_hh[5, 2]
    """

    def __init__(
        self, model: nn.Module, *, skip: Iterable[str] = (), backward: bool = True, raise_error: bool = False
    ) -> None:
        found = find_lstms(model, skip)
        super().__init__(found)
        self._backward, self._raise = backward, raise_error
        self._counts = dict.fromkeys(found, 0)
        self.findings: list[Finding] = []

    @property
    def first(self) -> Finding | None:
        """The first finding, or ``None``."""
        return self.findings[0] if self.findings else None

    def _watch(self, name: str, layout: Layout) -> _Call:
        """A call begins."""
        self._counts[name] += 1
        return _Call(self, name, self._counts[name] - 1, self._backward)

    def _found(self, finding: Finding) -> None:
        self.findings.append(finding)
        if self._raise:
            raise FloatingPointError(f"fusedreg.inspect.NonFinite: {finding}")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every finding as a dictionary."""
        for finding in self.findings:
            own = {**asdict(finding), **finding.place._asdict(), "gates": "".join(finding.gates)}
            yield {name: own[name] for name in _COLUMNS}

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`rows` as a table.

        Raises:
            ImportError: pandas is not installed.
        """
        return to_pandas(self.rows(), _COLUMNS)

    def figure(self, *, width: float = figures.COLUMN_WIDTH) -> Figure:
        """A line a finding, a triangle at its step: it points the way that the pass went."""
        with figures.drawing():
            figure, ((axes,),) = figures.new_figure(width=width, row_height=0.5 + 0.3 * max(1, len(self.findings)))
            for phase, marker, colour in (("forward", ">", 0), ("backward", "<", 1)):
                own = [(at, finding) for at, finding in enumerate(self.findings) if finding.phase == phase]
                sign = {"marker": marker, "s": 20, "color": figures.COLOURS[colour]}
                axes.scatter([finding.step for _, finding in own], [at for at, _ in own], label=phase, **sign)
            labels = [f"{own.place.label}, call {own.call}:\n{own.kind} in {_short(own)}" for own in self.findings]
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(max(1, len(labels)) - 0.5, -0.5)
            axes.margins(x=0.1)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("step $t$ of the first value that is not finite")
            axes.set_ylabel("finding")
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return figure

    def write(self, writer: Any, step: int, *, prefix: str = "not_finite") -> None:
        """TensorBoard scalars: how many findings, and the step of each layer's first; and their texts."""
        check_writer(writer)
        writer.add_scalar(f"{prefix}/findings", len(self.findings), step)
        for finding in reversed(self.findings):
            writer.add_scalar(f"{prefix}/{finding.place.label}/{finding.phase}/step", finding.step, step)
        if self.findings and callable(getattr(writer, "add_text", None)):
            writer.add_text(prefix, "\n\n".join(map(str, self.findings)), step)


def not_finite_gradients(model: nn.Module, *, skip: Iterable[str] = ()) -> list[tuple[str, str, str]]:
    """The parameters whose ``.grad`` is not finite: ``(label, field, gate)``, after a backward.

    Example:
        >>> import torch, fusedreg
        >>> lstm = torch.nn.LSTM(3, 4)
        >>> (lstm(torch.randn(5, 2, 3))[1][1].sum() * float("inf")).backward()
        >>> fusedreg.inspect.not_finite_gradients(lstm)[1]
        ('l0', 'weight_ih', 'f')
    """
    return [
        (place.label, field, gate)
        for place, module in places(model, skip)
        for field, weight in layer_tensors(module, place).items()
        if weight.is_leaf and weight.grad is not None
        for gate, block in by_gate(field, weight.grad).items()
        if not block.isfinite().all()
    ]


def _short(finding: Finding) -> str:
    if finding.phase == "backward":
        return f"$dL/d{'h' if finding.stage == 'hidden' else 'c'}$"
    name = _EQUATION.get(finding.stage, finding.stage)
    return f"{name} of {' '.join(finding.gates)}" if finding.gates else name


class _Call:
    """Looks at one call, layer by layer, until something is found."""

    def __init__(self, owner: NonFinite, module: str, index: int, backward: bool) -> None:
        self._owner, self._module, self._index, self.differentiates = owner, module, index, backward
        self._forward_found = self._backward_found = False

    def gradient_listener(self, call: LayerCall) -> GradientListener:
        """Looks at what reaches a layer's states. The upper layers' come first."""
        lengths = None if call.lengths is None else call.lengths.clamp(0, call.input.shape[0])
        place = Place(self._module, call.options.layer, call.options.direction)

        def listen(state: str, gradient: Tensor) -> None:
            if self._backward_found or gradient.isfinite().all():
                return
            self._backward_found = True
            step, row, unit = _first(~gradient.isfinite(), lengths, place.direction, backward=True)
            source = "what comes after the layer, or after that step"
            kind = _kind(gradient[step, row, unit])
            own = (place, self._index, "backward", state, (), step, row, unit, kind, source)
            self._owner._found(Finding(*own))  # type: ignore[arg-type]

        return listen

    def seen(self, call: LayerCall, result: LayerResult) -> None:
        """Looks for anything that is not finite, in one transfer; then for where it began."""
        if self._forward_found:
            return
        valid = valid_steps(call.input, call.lengths).unsqueeze(-1)
        results = (result.output, result.final_hidden, result.final_cell, result.cells)
        values = [
            torch.where(valid, call.input, 0.0),
            call.initial_hidden,
            call.initial_cell,
            *call.parameters,
            *results,
        ]
        with torch.no_grad():
            finite = torch.stack([value.isfinite().all() for value in values if value is not None]).all()
        if not finite:
            finding = self._locate(call, result)
            if finding is not None:
                self._forward_found = True
                self._owner._found(finding)

    def _locate(self, call: LayerCall, result: LayerResult) -> Finding | None:
        place = Place(self._module, call.options.layer, call.options.direction)
        lengths = None if call.lengths is None else call.lengths.clamp(0, call.input.shape[0])
        seen = law(call)
        bad = {stage: ~seen[stage].isfinite() for stage in _STAGES}
        anywhere = torch.cat([value.any(-1, keepdim=True) for value in bad.values()], -1).any(-1, keepdim=True)
        if not anywhere.any():
            # Finite inside: a row without a step, or a rounding to 16 bits on the way out.
            if result.output.isfinite().all():
                return None
            step, row, unit = _first(~result.output.isfinite(), lengths, place.direction)
            kind = _kind(result.output[step, row, unit])
            source = f"rounding to {str(result.output.dtype).removeprefix('torch.')}"
            return Finding(place, self._index, "forward", "output", (), step, row, unit, kind, source)
        step, row, _ = _first(anywhere, lengths, place.direction)
        stage = next(stage for stage in _STAGES if bad[stage][step, row].any())
        here = bad[stage][step, row]
        channel = int(here.nonzero()[0])
        gates: tuple[str, ...] = ()
        hidden_size = seen["cell"].shape[-1]
        if stage == "preactivation":
            gates = tuple(gate for gate, block in zip(GATES, here.chunk(4), strict=True) if block.any())
        source, of_gates, value = _source(call, step, row)
        kind = _kind(seen[stage][step, row, channel] if value is None else value)
        unit = channel % hidden_size
        return Finding(place, self._index, "forward", stage, of_gates or gates, step, row, unit, kind, source)


def _source(call: LayerCall, step: int, row: int) -> tuple[str, tuple[str, ...], Tensor | None]:
    """What brought a value in that is first seen at this step: in words, the gate if it is a weight's, the value."""
    for field, weight in zip(call.parameters._fields, call.parameters, strict=True):
        if weight is not None and not weight.isfinite().all():
            position = tuple((~weight.isfinite()).nonzero()[0].tolist())
            gates = tuple(gate for gate, block in by_gate(field, weight).items() if gate and not block.isfinite().all())
            return f"{field}[{', '.join(map(str, position))}]", gates, weight[position]
    # A batch norm spreads what one row brings over all rows of a step, or of all steps: look there too.
    bad = ~call.input.isfinite() & valid_steps(call.input, call.lengths).unsqueeze(-1)
    found = bad.nonzero().tolist()
    if found:
        index = min(found, key=lambda own: (own[0] != step, own[1] != row))
        whose = "the input" if call.options.layer == 0 else "the layer below"
        where = "step {}, row {}, feature {}".format(*index)
        return f"{whose}, {where}", (), call.input[tuple(index)]
    for name in ("initial_hidden", "initial_cell"):
        state = getattr(call, name)
        if state is not None and not state[row].isfinite().all():
            unit = int((~state[row].isfinite()).nonzero()[0])
            return f"{name}, row {row}, unit {unit}", (), state[row, unit]
    return "finite values: it arises there, by overflow or in a norm over the batch's other rows", (), None


def _first(bad: Tensor, lengths: Tensor | None, direction: int, backward: bool = False) -> tuple[int, int, int]:
    """``(step, row, unit)`` of the first in ``bad (T, B, N)`` as steps are processed, or the last for a backward.

    In the reverse direction rows of different length are at different positions of the same step processed.
    """
    found = bad.nonzero()
    processed = found[:, 0]
    if direction == REVERSE:
        last = bad.shape[0] - 1 if lengths is None else lengths[found[:, 1]] - 1
        processed = last - processed
    order = (-processed if backward else processed) * bad.shape[1] + found[:, 1]
    chosen = order.sort(stable=True).indices[0]
    step, row, unit = found[chosen].tolist()
    return step, row, unit


def _kind(value: Tensor) -> Literal["NaN", "Inf"]:
    return "NaN" if bool(value.isnan()) else "Inf"
