"""The options that regularise a recurrent layer: what they are, where each comes from, and their checks.

The three classes are frozen dataclasses: checked when made, comparable, hashable, and shared freely between
modules. What each option does to a step is stated in :mod:`fusedreg.reference`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from fusedreg.presets import Presets

if TYPE_CHECKING:
    from fusedreg.layer import LayerOptions

GateMasks = Literal["tied", "untied"]
UpdateMask = Literal["step", "sequence"]
WeightMask = Literal["element", "row"]
ZoneoutOutput = Literal["state", "candidate"]
RunningKind = Literal["per_step", "shared"]
InputStatistics = Literal["step", "sequence"]

Rate = float | Sequence[float]

RATE_NAMES = (
    "dropout",
    "input_dropout",
    "hidden_dropout",
    "output_dropout",
    "update_dropout",
    "cell_dropout",
    "weight_dropout",
    "zoneout_hidden",
    "zoneout_cell",
)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}; pass a float")
    return float(value)


def _rate(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0.0 <= number < 1.0:  # false for NaN too
        raise ValueError(
            f"{name}: expected a probability of dropping in [0, 1), got {value!r}; pass 0 to switch it off (this is "
            f"the probability of dropping, not of keeping)"
        )
    return number


def _rates(name: str, value: object) -> float | tuple[float, ...]:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        # Zero between-layer rates is what a single layer has, and so the one legitimate empty sequence.
        if len(value) == 0 and name != "dropout":
            raise ValueError(f"{name}: expected a number or one number a layer, got an empty sequence; pass 0.0")
        return tuple(_rate(f"{name}[{position}]", entry) for position, entry in enumerate(value))
    return _rate(name, value)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected {expected}, got {value!r}; pass one of these strings")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r} of type {type(value).__name__}; pass a bool")


def _positive(name: str, value: object) -> float:
    number = _number(name, value)
    if not (number > 0.0 and math.isfinite(number)):
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}; the default is 1e-5")
    return number


class _Immutable:
    """Copies of a frozen value are the value itself: a deep copy of a module must not copy a process group."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: object) -> Any:
        return self


@dataclass(frozen=True)
class BatchNorm(_Immutable):
    """Recurrent batch normalisation (Cooijmans et al. 2017, arXiv:1603.09025; Laurent et al. 2016).

    The input and recurrent pre-activations are normalised separately, and the cell on its way to the output::

        z = BN(h W_hhᵀ; gain) + BN(x W_ihᵀ; gain) + b_ih + b_hh        h = o ⊙ tanh(BN(c; gain, shift))

    with statistics over the rows of the batch at each processed step. The carried cell is never normalised.

    Under activation checkpointing the recomputation may update the running statistics a second time (with
    ``use_reentrant=True`` it does), as it does those of :class:`torch.nn.BatchNorm1d`. A step that a single row of a
    ragged batch reaches, which is normalised with them, is recomputed with the updated ones: there, gradients are of a
    slightly different function.

    Args:
        max_steps: how many steps keep running statistics of their own. Needed by ``statistics="per_step"``, and
            only read there. A later step trains on its own batch and is evaluated with the last step that has
            statistics.
        input, recurrent, cell: which of the three terms is normalised. ``recurrent=False, cell=False`` is
            Laurent et al.
        statistics: ``"per_step"`` keeps one running mean and variance a step; ``"shared"`` one for all steps,
            updated once a call with the mean over its steps.
        input_statistics: ``"step"``, or ``"sequence"`` to pool the input term's over every valid step and row.
        momentum: weight of the newest batch in the running statistics, in [0, 1]; ``None`` averages all batches
            alike. As in :class:`torch.nn.BatchNorm1d`.
        eps: added to the variance.
        weight_init: initial value of the gains: 0.1, as Cooijmans et al. advise, so that tanh does not saturate.
        process_group: a ``torch.distributed`` group whose ranks share their statistics, at a collective a step.
            Every rank must then run the same number of steps. ``None``: each rank has its own.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> from fusedreg.regularization import BatchNorm
        >>> BatchNorm(max_steps=100, cell=False).weight_init
        0.1
    """

    max_steps: int | None = None
    input: bool = True
    recurrent: bool = True
    cell: bool = True
    statistics: RunningKind = "per_step"
    input_statistics: InputStatistics = "step"
    momentum: float | None = 0.1
    eps: float = 1e-5
    weight_init: float = 0.1
    process_group: Any = None

    def __post_init__(self) -> None:
        _check_terms("BatchNorm", self.input, self.recurrent, self.cell)
        _choice("statistics", self.statistics, get_args(RunningKind))
        _choice("input_statistics", self.input_statistics, get_args(InputStatistics))
        self._check_max_steps()
        if self.momentum is not None:
            momentum = _number("momentum", self.momentum)
            if not 0.0 <= momentum <= 1.0:
                raise ValueError(
                    f"momentum: expected a number in [0, 1] or None, got {self.momentum!r}; it is the weight of the "
                    f"newest batch, 0.1 by default"
                )
            object.__setattr__(self, "momentum", momentum)
        object.__setattr__(self, "eps", _positive("eps", self.eps))
        weight_init = _number("weight_init", self.weight_init)
        if not math.isfinite(weight_init):
            raise ValueError(f"weight_init: expected a finite number, got {self.weight_init!r}; the default is 0.1")
        object.__setattr__(self, "weight_init", weight_init)

    def _check_max_steps(self) -> None:
        if self.statistics == "shared":
            if self.max_steps is not None:
                raise ValueError(
                    f"max_steps: expected None with statistics='shared', got {self.max_steps!r}; one set of "
                    f"statistics has no steps: leave max_steps out, or pass statistics='per_step'"
                )
            return
        if self.max_steps is None:
            raise ValueError(
                "max_steps: expected a positive int with statistics='per_step', got None; pass the longest sequence "
                "you train on, or statistics='shared'"
            )
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int):
            raise TypeError(
                f"max_steps: expected a positive int, got {self.max_steps!r} of type {type(self.max_steps).__name__}; "
                f"pass the longest sequence you train on"
            )
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps: expected a positive int, got {self.max_steps}; pass the longest sequence you train on"
            )


@dataclass(frozen=True)
class LayerNorm(_Immutable):
    """Layer normalisation inside the recurrence (Ba et al. 2016, arXiv:1607.06450, supplement).

    ::

        z = LN(h W_hhᵀ; gain, shift) + LN(x W_ihᵀ; gain, shift) + b_ih + b_hh        h = o ⊙ tanh(LN(c; gain, shift))

    Over the whole 4H vector of the four gates at once, and over H for the cell. The carried cell is not
    normalised (a well-known other implementation normalises gate by gate and carries the normalised cell).

    Args:
        input, recurrent, cell: which of the three terms is normalised.
        eps: added to the variance.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> from fusedreg.regularization import LayerNorm
        >>> LayerNorm(cell=False)
        LayerNorm(input=True, recurrent=True, cell=False, eps=1e-05)
    """

    input: bool = True
    recurrent: bool = True
    cell: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_terms("LayerNorm", self.input, self.recurrent, self.cell)
        object.__setattr__(self, "eps", _positive("eps", self.eps))


def _check_terms(kind: str, input: object, recurrent: object, cell: object) -> None:
    _flag("input", input)
    _flag("recurrent", recurrent)
    _flag("cell", cell)
    if not (input or recurrent or cell):
        raise ValueError(
            f"{kind}: expected at least one of input, recurrent and cell to be True, got False for all three; pass "
            f"norm=None for no normalisation"
        )


@dataclass(frozen=True)
class Regularization(Presets, _Immutable):
    """Every regulariser of an LSTM, as one value. All off by default, which is exactly :class:`torch.nn.LSTM`.

    A rate is the probability of *dropping* (of zoning out), in [0, 1): one number, or a sequence with one number
    a layer. "Inverted" means that what is kept is scaled by 1/(1-p) in training, and that nothing happens in
    evaluation. Each layer and direction draws masks of its own, anew at each call. Published settings are class
    methods: :meth:`awd_lstm`, :meth:`gal` and the others of :mod:`fusedreg.presets`.

    Args:
        dropout: between layers, a new mask each step, inverted (Zaremba et al. 2014; ``nn.LSTM``'s). A sequence
            may leave out the last layer's, which acts on nothing.
        input_dropout: of the layer's input, one mask a sequence, inverted (Gal & Ghahramani 2016).
        hidden_dropout: of ``h`` inside the recurrent product, one mask a sequence, inverted (the same).
        output_dropout: of the layer's output, one mask a sequence, inverted (Merity et al. 2018, locked dropout).
        update_dropout: of the cell's update ``i ⊙ g``, inverted (Semeniuta et al. 2016).
        cell_dropout: of the cell itself, one mask a sequence, not inverted: evaluation multiplies by 1-p each step
            (Moon et al. 2015, RNNDrop).
        weight_dropout: of ``weight_hh``, one mask a call, inverted (Wan et al. 2013; Merity et al. 2018).
        zoneout_hidden, zoneout_cell: keep the previous ``h`` (``c``), drawn each step; evaluation takes the
            expectation (Krueger et al. 2017).
        gate_masks: ``"tied"``, one mask for the four gates, or ``"untied"``, one each (Gal & Ghahramani 2016); for
            input_dropout and hidden_dropout alike.
        update_mask: ``"step"`` draws update_dropout's mask each step, ``"sequence"`` once.
        weight_mask: ``"element"`` drops single weights, ``"row"`` whole rows of ``weight_hh``.
        zoneout_output: ``"state"`` outputs the zoned-out ``h`` (the paper's), ``"candidate"`` the new ``h`` before
            zoneout.
        norm: a :class:`BatchNorm`, a :class:`LayerNorm` or ``None``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> from fusedreg.regularization import Regularization
        >>> Regularization(zoneout_cell=0.5, zoneout_hidden=0.05).changed()
        {'zoneout_hidden': 0.05, 'zoneout_cell': 0.5}
    """

    dropout: Rate = 0.0
    input_dropout: Rate = 0.0
    hidden_dropout: Rate = 0.0
    output_dropout: Rate = 0.0
    update_dropout: Rate = 0.0
    cell_dropout: Rate = 0.0
    weight_dropout: Rate = 0.0
    zoneout_hidden: Rate = 0.0
    zoneout_cell: Rate = 0.0
    gate_masks: GateMasks = "tied"
    update_mask: UpdateMask = "step"
    weight_mask: WeightMask = "element"
    zoneout_output: ZoneoutOutput = "state"
    norm: BatchNorm | LayerNorm | None = None

    def __post_init__(self) -> None:
        for name in RATE_NAMES:
            # Tuples, so that the value hashes, and so that the caller's list can change without it.
            object.__setattr__(self, name, _rates(name, getattr(self, name)))
        _choice("gate_masks", self.gate_masks, get_args(GateMasks))
        _choice("update_mask", self.update_mask, get_args(UpdateMask))
        _choice("weight_mask", self.weight_mask, get_args(WeightMask))
        _choice("zoneout_output", self.zoneout_output, get_args(ZoneoutOutput))
        if self.norm is not None and not isinstance(self.norm, (BatchNorm, LayerNorm)):
            raise TypeError(
                f"norm: expected a fusedreg.BatchNorm, a fusedreg.LayerNorm or None, got {self.norm!r} of type "
                f"{type(self.norm).__name__}; make one, for instance LayerNorm()"
            )

    def changed(self) -> dict[str, object]:
        """The options that differ from their defaults, in the order they are declared."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def check_layers(self, num_layers: int) -> None:
        """Check that every sequence of rates has one number a layer.

        Raises:
            ValueError: naming the option. ``dropout`` may also leave out the last layer's rate.
        """
        for name in RATE_NAMES:
            rate = getattr(self, name)
            if not isinstance(rate, tuple):
                continue
            accepted = (num_layers, num_layers - 1) if name == "dropout" else (num_layers,)
            if len(rate) not in accepted:
                also = f" (or {num_layers - 1}, without the last layer's)" if name == "dropout" else ""
                raise ValueError(
                    f"{name}: expected one number, or {num_layers}{also} for num_layers={num_layers}, got "
                    f"{len(rate)}: {rate}; pass one number a layer"
                )

    def layer_rate(self, name: str, layer: int, num_layers: int) -> float:
        """The rate called ``name`` of one layer. Between-layer ``dropout`` is 0 for the last layer."""
        if name == "dropout" and layer == num_layers - 1:
            return 0.0
        rate = getattr(self, name)
        return float(rate[layer] if isinstance(rate, tuple) else rate)

    def layer_options(
        self,
        layer: int,
        num_layers: int,
        direction: int,
        training: bool,
        recompute: bool = False,
        return_cells: bool = False,
    ) -> LayerOptions:
        """What one layer and direction needs to know, with this layer's own rates.

        Args:
            layer: from 0, nearest the input.
            num_layers: how many there are; call :meth:`check_layers` first.
            direction: 0 forward, 1 reverse.
            training, recompute, return_cells: passed on.
        """
        from fusedreg.layer import LayerOptions  # here, because fusedreg.layer imports this module

        return LayerOptions(
            layer=layer,
            direction=direction,
            training=training,
            **{name: self.layer_rate(name, layer, num_layers) for name in RATE_NAMES},
            gate_masks=self.gate_masks,
            update_mask=self.update_mask,
            weight_mask=self.weight_mask,
            zoneout_output=self.zoneout_output,
            norm=self.norm,
            recompute=recompute,
            return_cells=return_cells,
        )
