"""Weight norms and update-to-weight ratios over a training, by component and gate.

The ratio ``‖w_after − w_before‖ / ‖w_before‖`` of a step says how fast a weight moves for its size; about 1e-3 is usual
in a training that goes well, 1e-1 is wild and 1e-6 stands still.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedreg.inspect import figures
from fusedreg.inspect.places import GATES, by_gate, layer_tensors, places
from fusedreg.inspect.tables import check_writer, to_pandas
from fusedreg.modules import LSTM
from fusedreg.training.components import behind, classify
from fusedreg.training.components import places as parameter_places

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from typing_extensions import Self

_COLUMNS = ("step", "label", "component", "gate", "norm", "update", "ratio")


class Key(NamedTuple):
    """What a norm is of.

    ``label``: a layer and direction of an LSTM (``"encoder.l0"``), or the module that holds other parameters.
    ``component``: as :func:`fusedreg.training.classify` has it. ``gate``: ``""`` for what belongs to none.
    """

    label: str
    component: str
    gate: str


@dataclass(frozen=True)
class WeightStep:
    """One step of an optimiser.

    Attributes:
        step: its number among those that the tracker has come by, from 0.
        norm: Euclidean norm of the weights of a key, after the step.
        update: that of their change.
        ratio: the change's over that of the weights before: NaN where both are 0.
    """

    step: int
    norm: dict[Key, float]
    update: dict[Key, float]
    ratio: dict[Key, float]


def weights_by_key(model: nn.Module) -> dict[Key, list[Tensor]]:
    """Every weight of a model as its module uses it, once, by component and gate.

    Of LSTMs what a call reads: a parametrised weight is what the parametrisation makes. Shared parameters are listed
    where they come first. What other modules hold, cells among them, has no gate.
    """
    found: dict[Key, list[Tensor]] = {}
    listed: set[int] = set()
    has_lstms = any(isinstance(module, (LSTM, nn.LSTM)) for module in model.modules())
    with torch.no_grad():
        for place, module in places(model, refuse_cells=False) if has_lstms else ():
            tensors = layer_tensors(module, place)
            for own in parameter_places(module):
                parts = {id(part) for part in behind(module, own.name)}
                if (own.layer, own.direction) != place[1:] or (parts and parts <= listed):
                    continue
                listed |= parts
                for gate, value in by_gate(own.field, tensors[own.field].detach()).items():
                    found.setdefault(Key(place.label, own.component, gate), []).append(value)
    for classified in classify(model):
        if id(classified.parameter) not in listed:
            label = classified.names[0].rpartition(".")[0]
            found.setdefault(Key(label, classified.component, ""), []).append(classified.parameter.detach())
    return found


class WeightTracker:
    """Norms and update-to-weight ratios of each step of an optimiser.

    Args:
        model: any module; its LSTMs (:class:`fusedreg.LSTM` and ``nn.LSTM``) are told apart by layer, direction,
            component and gate, its other parameters by module and component.
        optimizer: its steps are measured while the ``with`` block lasts. Without one, or with several, put
            ``with tracker.measure():`` around what changes the weights.
        every: only each ``every``-th step is measured: that takes a copy of the weights and a wait for the device.

    Raises:
        ValueError: ``every`` below 1. TypeError: not an optimiser.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4)
        >>> optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
        >>> with fusedreg.inspect.WeightTracker(lstm, optimizer) as tracker:
        ...     lstm(torch.randn(5, 2, 3))[0].sum().backward()
        ...     optimizer.step()
        >>> sorted(tracker.steps[0].ratio)[:2]
        [Key(label='l0', component='bias', gate='f'), Key(label='l0', component='bias', gate='g')]
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, every: int = 1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an int of at least 1, got {every!r}")
        self._model, self._optimizer, self._every = model, optimizer, every
        self._handles: list[Any] = []
        self._count = 0
        self._before: dict[Key, list[Tensor]] | None = None
        self.steps: list[WeightStep] = []

    def __enter__(self) -> Self:
        if self._optimizer is None:
            raise RuntimeError(
                "WeightTracker: expected an optimizer to measure the steps of, got none; pass WeightTracker(model, "
                "optimizer), or use `with tracker.measure():` around each step"
            )
        if self._handles:
            raise RuntimeError("WeightTracker: expected to be entered once at a time; it is active already")
        self._handles = [
            self._optimizer.register_step_pre_hook(lambda *_: self._start()),
            self._optimizer.register_step_post_hook(lambda *_: self._finish()),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._before = [], None

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """One step: what changes between the block's beginning and its end."""
        self._start()
        yield
        self._finish()

    def _start(self) -> None:
        self._before = None
        if self._count % self._every == 0:
            weights = weights_by_key(self._model)
            self._before = {key: [value.clone() for value in values] for key, values in weights.items()}

    def _finish(self) -> None:
        before, self._before = self._before, None
        self._count += 1
        if before is None:
            return
        # One transfer for everything: a row of (before, update, after) for each key.
        rows = []
        for key, values in weights_by_key(self._model).items():
            olds = before[key]
            changes = [new.double() - old.double() for new, old in zip(values, olds, strict=True)]
            rows.append(torch.stack([_norm(olds), _norm(changes), _norm(values)]).cpu())
        numbers = dict(zip(before, torch.stack(rows).tolist() if rows else [], strict=True))
        self.steps.append(
            WeightStep(
                self._count - 1,
                {key: new for key, (_, _, new) in numbers.items()},
                {key: update for key, (_, update, _) in numbers.items()},
                {
                    key: update / old if old else float("nan" if update == 0 else "inf")
                    for key, (old, update, _) in numbers.items()
                },
            )
        )

    @property
    def labels(self) -> list[str]:
        """The layers and modules that were seen."""
        return list(dict.fromkeys(key.label for key in self.steps[0].norm)) if self.steps else []

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every step, component and gate as a dictionary."""
        for own in self.steps:
            for key, norm in own.norm.items():
                yield dict(zip(_COLUMNS, (own.step, *key, norm, own.update[key], own.ratio[key]), strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`rows` as a table.

        Raises:
            ImportError: pandas is not installed.
        """
        return to_pandas(self.rows(), _COLUMNS)

    def figure(self, label: str | None = None, *, width: float = figures.COLUMN_WIDTH) -> Figure:
        """Norms on the left, ratios on the right, a row a component and a line a gate, over the steps.

        Args:
            label: one of :attr:`labels`; ``None``: the first.
            width: in inches.

        Raises:
            RuntimeError: no step has been measured. ValueError: no such label.
        """
        if not self.steps:
            raise RuntimeError("WeightTracker: expected at least one measured step to draw, got none")
        label = self.labels[0] if label is None else label
        if label not in self.labels:
            raise ValueError(f"label: expected one of {', '.join(map(repr, self.labels))}, got {label!r}")
        keys = [key for key in self.steps[0].norm if key.label == label]
        components = list(dict.fromkeys(key.component for key in keys))
        steps = [own.step for own in self.steps]
        with figures.drawing():
            figure, rows = figures.new_figure(len(components), 2, width=width, row_height=1.15, sharex=True)
            for (left, right), component in zip(rows, components, strict=True):
                for key in keys:
                    if key.component == component:
                        line = figures.style(GATES.index(key.gate) if key.gate else 4)
                        left.plot(steps, [own.norm[key] for own in self.steps], label=key.gate or "no gate", **line)
                        right.plot(steps, [own.ratio[key] or float("nan") for own in self.steps], **line)
                left.set_ylabel(f"{component}\n$\\|w\\|_2$")
                right.set_ylabel("$\\|\\Delta w\\|/\\|w\\|$")
                right.set_yscale("log")
            for axes in rows[-1]:
                axes.set_xlabel("optimiser step")
            handles = {
                text: handle for row in rows for handle, text in zip(*row[0].get_legend_handles_labels(), strict=True)
            }
            figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, title=label or None)
        return figure

    def write(self, writer: Any, step: int, *, prefix: str = "weights") -> None:
        """The newest measured step as TensorBoard scalars: ``norm`` and ``update_ratio`` of each component and gate.

        Raises:
            RuntimeError: no step has been measured.
        """
        check_writer(writer)
        if not self.steps:
            raise RuntimeError("WeightTracker: expected at least one measured step to write, got none")
        newest = self.steps[-1]
        for key, norm in newest.norm.items():
            tag = "/".join(part for part in (prefix, *key) if part)
            writer.add_scalar(f"{tag}/norm", norm, step)
            writer.add_scalar(f"{tag}/update_ratio", newest.ratio[key], step)


def _norm(values: list[Tensor]) -> Tensor:
    return torch.stack([value.double().square().sum() for value in values]).sum().sqrt()
