"""What the kernels are given: plain tuples of pointers and numbers, made from an operator's arguments.

Three kinds, by when they are known. :class:`LayerFlags` is compiled in: the hidden size and which options are on, one
kernel for each. :class:`Sizes` and :class:`Rates` are numbers that compile nothing anew: a batch or a rate of another
size runs the same kernel. :class:`LoopInputs` and the results are tensors, or ``None``, which is compiled in.

Masks of inverted dropout are applied as zeros and ones, which no type rounds, and their scales to the products:
``a = scale ((m ⊙ h) (M ⊙ W)ᵀ)``, so that 16-bit inputs lose nothing to a scaled copy. What this changes is that a
kernel finds ``weight_hh`` and the exchanged ``h`` masked but not scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedreg.backends.triton.jit_masks import threshold
from fusedreg.encoding import (
    NORM_BATCH,
    NORM_NONE,
    TENSOR_ARGUMENTS,
)

# How a site acts: not at all, by a mask drawn from the seed, or in evaluation by the mask's expectation. The jitted
# functions have these numbers as constants of their own (jit_tile.py): they read no plain globals.
OFF, DRAWN, EXPECTED = 0, 1, 2
TIED, UNTIED = 1, 2
BY_STEP, BY_SEQUENCE = 1, 2

# Of every launch: a product and the sum that it goes into are one instruction. Triton has done so by default, and is to
# stop.
FUSED: dict[str, Any] = {"enable_fp_fusion": True}


class LayerFlags(NamedTuple):
    """What is compiled into a kernel: the layer's widths and the options. Numbers, so that they print as such.

    ``projected_size`` is ``P``, the width of ``h``: ``hidden_size`` where nothing is ``projected``.
    """

    hidden_size: int
    projected_size: int
    projected: int
    reverse: int
    norm: int  # NORM_NONE, NORM_BATCH or NORM_LAYER
    norm_input: int
    norm_recurrent: int
    norm_cell: int
    batch_statistics: int  # a batch norm in training: statistics of the batch, not of the population
    hidden_dropout: int  # OFF, TIED or UNTIED
    update_dropout: int  # OFF, BY_STEP or BY_SEQUENCE
    cell_dropout: int  # OFF, DRAWN or EXPECTED
    zoneout_hidden: int  # OFF, DRAWN or EXPECTED
    zoneout_cell: int
    output_dropout: int  # OFF or DRAWN
    dropout: int
    candidate_output: int
    fixed_gates: int  # gates are kept in 16-bit fixed point
    grouped_seed: int  # groups of rows have seeds and first steps of their own


class Sizes(NamedTuple):
    """Steps, rows, the rows of the running statistics that ``running_index`` points into, and those of a group."""

    steps: int
    rows: int
    running_rows: int
    group_rows: int


class Rates(NamedTuple):
    """Rates as kernels use them: thresholds of random words (:func:`jit_masks.threshold`), scales, expectations."""

    stream: int  # layer * 2 + direction, the counters' last word
    hidden_threshold: int
    update_threshold: int
    update_scale: float
    cell_threshold: int
    cell_expectation: float
    zoneout_hidden_threshold: int
    zoneout_hidden: float
    zoneout_cell_threshold: int
    zoneout_cell: float
    output_threshold: int
    output_scale: float
    dropout_threshold: int
    dropout_scale: float
    recurrent_scale: float  # of the product of masked h and masked W_hh: both inverted dropouts' scales
    eps: float


class LoopInputs(NamedTuple):
    """What the recurrent loop reads, forward and backward; ``None`` where absent.

    ``weight_hh (4H, P)`` is masked, not scaled. ``input_terms (T, B, 4H)`` float32, by position, is ``N_r(r)``, with
    anything in padding. ``bias (4H,)`` float32 is the sum of both biases and of a layer norm's two shifts, so that
    ``z = gain ⊙ (a - mean) / std + input_terms + bias``. The running statistics are a batch norm's. The backward's loop
    has both weights turned around, ``(P, 4H)`` and ``(H, P)``: what its products add up over stands side by side.
    """

    seed: Any
    lengths: Any
    reset: Any
    initial_hidden: Any
    initial_cell: Any
    weight_hh: Any
    weight_hr: Any
    input_terms: Any
    bias: Any
    recurrent_gain: Any
    cell_gain: Any
    cell_shift: Any
    running_index: Any
    recurrent_mean: Any
    recurrent_var: Any
    cell_mean: Any
    cell_var: Any


class ForwardResults(NamedTuple):
    """The forward operator's ten results, in its order; ``None`` where not wanted (:mod:`fusedreg.fakes`)."""

    output: Any
    final_hidden: Any
    final_cell: Any
    cells: Any
    hidden: Any
    gates: Any
    input_gates: Any
    input_statistics: Any
    recurrent_statistics: Any
    cell_statistics: Any


class ForwardState(NamedTuple):
    """What the forward loop keeps beside its results; ``None`` where the layer has no need of it.

    ``exchange (2, copies, B, P)`` in the storage type: the carried ``h``, masked by hidden dropout (four copies where
    masks are untied), read and written in turn. ``activated (B, H)``: a step's ``u`` on its way to the projection.
    ``raw (B, 4H)``: a step's ``a`` where no gates are kept.
    ``candidates`` and ``output_gates (B, H)``: of a step whose cell is normalised. ``arrivals``: int32 counters of the
    persistent kernel's barriers, one a group of programs.
    """

    exchange: Any
    activated: Any
    raw: Any
    candidates: Any
    output_gates: Any
    arrivals: Any


class ForwardTensors(NamedTuple):
    """Everything in memory that a step of the forward reads or writes."""

    inputs: LoopInputs
    results: ForwardResults
    state: ForwardState


class Numbers(NamedTuple):
    """Every number that a step takes and that compiles nothing anew."""

    sizes: Sizes
    rates: Rates


class Arguments(NamedTuple):
    """The 27 tensor arguments of the operators, by name and in their order."""

    input: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    initial_hidden: Tensor | None
    initial_cell: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    seed: Tensor | None
    norm_input_weight: Tensor | None
    norm_input_bias: Tensor | None
    norm_recurrent_weight: Tensor | None
    norm_recurrent_bias: Tensor | None
    norm_cell_weight: Tensor | None
    norm_cell_bias: Tensor | None
    hidden_probe: Tensor | None
    cell_probe: Tensor | None
    running_index: Tensor | None
    running_input_index: Tensor | None
    running_input_mean: Tensor | None
    running_input_var: Tensor | None
    running_recurrent_mean: Tensor | None
    running_recurrent_var: Tensor | None
    running_cell_mean: Tensor | None
    running_cell_var: Tensor | None


class Layer(NamedTuple):
    """One call of a layer: its tensors, contiguous, and its options in every form that somebody needs."""

    tensors: Arguments
    flags: LayerFlags
    sizes: Sizes
    rates: Rates
    options: Sequence[int]  # as the operator was given them
    raw_rates: Sequence[float]
    eps: float

    @property
    def untied_input(self) -> bool:
        """Whether ``x`` has a mask for each gate."""
        return bool(self.drawn_input and self.options[3])

    @property
    def drawn_input(self) -> bool:
        """Whether ``x`` is masked."""
        return bool(self.options[2] and self.raw_rates[1] > 0.0)

    @property
    def drawn_weight(self) -> bool:
        """Whether ``W_hh`` is masked."""
        return bool(self.options[2] and self.raw_rates[6] > 0.0)

    @property
    def input_scale(self) -> float:
        """What the product of masked ``x`` and ``W_ih`` is multiplied with."""
        return 1.0 / (1.0 - self.raw_rates[1]) if self.drawn_input else 1.0

    @property
    def gradient_groups(self) -> int:
        """Into how many groups of rows the parameters' gradients are told apart; 0 where they are summed."""
        return self.options[14] if self.options[14] > 1 else 0


def make_layer(arguments: Sequence[Any]) -> Layer:
    """A call's arguments in the forms above.

    Args:
        arguments: the forward operator's 30: 27 tensors, the rates, the options, the norm's eps.
    """
    *given, rates, options, eps = arguments
    tensors = Arguments(*(_prepared(name, value) for name, value in zip(TENSOR_ARGUMENTS, given, strict=True)))
    steps, rows = tensors.input.shape[:2]
    if tensors.lengths is not None:
        tensors = tensors._replace(lengths=tensors.lengths.clamp(0, steps))
    flags = layer_flags(tensors, rates, options)
    running = tensors.running_recurrent_mean if flags.norm_recurrent else tensors.running_cell_mean
    groups = tensors.seed.shape[0] if tensors.seed is not None and flags.grouped_seed else 1
    sizes = Sizes(steps, rows, 0 if running is None else running.shape[0], rows // groups)
    return Layer(tensors, flags, sizes, kernel_rates(rates, options, flags, eps), options, rates, eps)


def _prepared(name: str, value: Any) -> Any:
    if value is None or name in ("hidden_probe", "cell_probe"):
        return None  # probes are zeros that nobody reads
    # x is read by a product of its own, which takes it as it is.
    return value if name == "input" else aligned(value)


def aligned(value: Tensor) -> Tensor:
    """Contiguous, and at an address that 16 divides: a slice at another one is copied.

    Triton compiles a kernel anew for an address that 16 does not divide, and a slice of a stack of states, resets or
    flattened parameters may stand anywhere.
    """
    value = value.contiguous()
    return value if value.data_ptr() % 16 == 0 else value.clone()


def layer_flags(tensors: Arguments, rates: Sequence[float], options: Sequence[int]) -> LayerFlags:
    """What is compiled into the kernels of a call. A rate of zero is an option that is off."""
    dropout, _, hidden, output, update, cell, _, zoneout_hidden, zoneout_cell = (rate > 0.0 for rate in rates)
    _, reverse, training, untied, update_sequence, _, candidate = options[:7]
    kind, norm_input, norm_recurrent, norm_cell = options[7:11]
    acting = DRAWN if training else EXPECTED
    return LayerFlags(
        hidden_size=tensors.weight_hh.shape[0] // 4,
        projected_size=tensors.weight_hh.shape[1],
        projected=int(tensors.weight_hr is not None),
        reverse=reverse,
        norm=kind,
        norm_input=int(kind != NORM_NONE and norm_input),
        norm_recurrent=int(kind != NORM_NONE and norm_recurrent),
        norm_cell=int(kind != NORM_NONE and norm_cell),
        batch_statistics=int(kind == NORM_BATCH and training),
        hidden_dropout=(UNTIED if untied else TIED) if training and hidden else OFF,
        update_dropout=(BY_SEQUENCE if update_sequence else BY_STEP) if training and update else OFF,
        cell_dropout=acting if cell else OFF,
        zoneout_hidden=acting if zoneout_hidden else OFF,
        zoneout_cell=acting if zoneout_cell else OFF,
        output_dropout=int(training and output),
        dropout=int(training and dropout),
        candidate_output=int(candidate and zoneout_hidden),
        fixed_gates=int(tensors.input.dtype != torch.float32 and kind == NORM_NONE),
        grouped_seed=int(tensors.seed is not None and tensors.seed.dim() == 2),
    )


def kernel_rates(rates: Sequence[float], options: Sequence[int], flags: LayerFlags, eps: float) -> Rates:
    """The rates as kernels use them."""
    dropout, _, hidden, output, update, cell, weight, zoneout_hidden, zoneout_cell = rates
    scale = 1.0
    for rate in (hidden, weight):
        if options[2]:
            scale /= 1.0 - rate
    return Rates(
        stream=options[0] * 2 + options[1],
        hidden_threshold=threshold(hidden),
        update_threshold=threshold(update),
        update_scale=1.0 / (1.0 - update),
        cell_threshold=threshold(cell),
        cell_expectation=1.0 - cell,
        zoneout_hidden_threshold=threshold(zoneout_hidden),
        zoneout_hidden=zoneout_hidden,
        zoneout_cell_threshold=threshold(zoneout_cell),
        zoneout_cell=zoneout_cell,
        output_threshold=threshold(output),
        output_scale=1.0 / (1.0 - output),
        dropout_threshold=threshold(dropout),
        dropout_scale=1.0 / (1.0 - dropout),
        recurrent_scale=scale,
        eps=eps,
    )


def loop_inputs(layer: Layer, weight_hh: Tensor, input_terms: Tensor, bias: Tensor) -> LoopInputs:
    """What the loop reads, from the operator's tensors and what was made of them before the loop."""
    tensors, flags = layer.tensors, layer.flags
    draws = layer.options[2] and any(rate > 0.0 for rate in layer.raw_rates)
    batch, recurrent, cell = flags.norm == NORM_BATCH, flags.norm_recurrent, flags.norm_cell
    return LoopInputs(
        seed=tensors.seed if draws else None,
        lengths=tensors.lengths,
        reset=None if tensors.reset is None else tensors.reset.view(torch.uint8),
        initial_hidden=tensors.initial_hidden,
        initial_cell=tensors.initial_cell,
        weight_hh=weight_hh,
        weight_hr=tensors.weight_hr,
        input_terms=input_terms,
        bias=bias,
        recurrent_gain=tensors.norm_recurrent_weight if recurrent else None,
        cell_gain=tensors.norm_cell_weight if cell else None,
        cell_shift=tensors.norm_cell_bias if cell else None,
        running_index=tensors.running_index if batch else None,
        recurrent_mean=tensors.running_recurrent_mean if batch and recurrent else None,
        recurrent_var=tensors.running_recurrent_var if batch and recurrent else None,
        cell_mean=tensors.running_cell_mean if batch and cell else None,
        cell_var=tensors.running_cell_var if batch and cell else None,
    )
