"""The backward operator: one layer in one direction, on the way back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedreg.backends.triton.after_loop import (
    input_gradient,
    previous_hidden,
    recurrent_product,
    recurrent_weight_gradient,
    weight_gradient,
)
from fusedreg.backends.triton.backward_loop import Gradients, Incoming, Saved, Wanted, backward_loop
from fusedreg.backends.triton.before_loop import input_product, masked_input, masked_weight, summed_bias
from fusedreg.backends.triton.input_norm import normalised
from fusedreg.backends.triton.layout import Layer, LoopInputs, aligned, loop_inputs, make_layer
from fusedreg.backends.triton.norm_gradients import averaged_counts, term_sums, through_input_norm
from fusedreg.encoding import NORM_LAYER, NORM_NONE, NUMBER_OF_TENSORS, SAVE_RECOMPUTE
from fusedreg.fakes import backward_fake


class Kept(NamedTuple):
    """The backward operator's saved arguments, in its order; absent ones are empty tensors."""

    cells: Tensor
    hidden: Tensor
    gates: Tensor
    input_gates: Tensor
    input_statistics: Tensor
    recurrent_statistics: Tensor
    cell_statistics: Tensor


class Needed(NamedTuple):
    """Which gradients are wanted, in the order of the operator's results."""

    input: bool
    weight_ih: bool
    weight_hh: bool
    bias_ih: bool
    bias_hh: bool
    weight_hr: bool
    initial_hidden: bool
    initial_cell: bool
    norm_input_weight: bool
    norm_input_bias: bool
    norm_recurrent_weight: bool
    norm_recurrent_bias: bool
    norm_cell_weight: bool
    norm_cell_bias: bool
    hidden_probe: bool
    cell_probe: bool


class Terms(NamedTuple):
    """Both pre-activations of every step: raw, and the input's as the loop takes it."""

    recurrent: Tensor  # a, or the gates after their activations
    input: Tensor | None  # r
    input_terms: Tensor | None  # N_r(r)
    activated: bool


def layer_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The backward of one layer: the arguments and results of :mod:`fusedreg.schemas`.

    The caller has chosen the device. Nothing that was saved is written, and no result is anything that was saved.
    """
    incoming, needed = Incoming(*arguments[:4]), Needed(*arguments[-1])
    results = list(backward_fake(*arguments))  # empty tensors, here on a real device
    if results[0].device.type != "meta" and arguments[4].shape[1] == 0:
        return tuple(result.zero_() for result in results)
    layer = make_layer((*arguments[4 : 4 + NUMBER_OF_TENSORS], *arguments[-4:-1]))
    kept = Kept(*(aligned(value) for value in arguments[4 + NUMBER_OF_TENSORS : -4]))
    inputs = _inputs(layer)
    previous = None
    if needed.weight_hh or layer.options[13] == SAVE_RECOMPUTE:
        previous = previous_hidden(layer, inputs, kept.hidden)
    terms = _terms(layer, inputs, kept, previous)
    grads = backward_loop(
        layer,
        inputs._replace(
            input_terms=terms.input_terms,
            weight_hh=inputs.weight_hh.t().contiguous(),
            weight_hr=None if inputs.weight_hr is None else inputs.weight_hr.t().contiguous(),
        ),
        Saved(kept.cells, terms.recurrent, kept.recurrent_statistics, kept.cell_statistics),
        incoming,
        activated=terms.activated,
        wanted=Wanted(
            needed.initial_hidden,
            needed.weight_hr,
            results[Needed._fields.index("hidden_probe")] if needed.hidden_probe else None,
            results[Needed._fields.index("cell_probe")] if needed.cell_probe else None,
        ),
    )
    found = _after_loop(layer, kept, terms, grads, previous, needed)
    for place, (name, wanted) in enumerate(zip(Needed._fields, needed, strict=True)):
        if wanted:
            results[place] = found[name]
    return tuple(results)


def _inputs(layer: Layer) -> LoopInputs:
    """What the loop reads of the operator's arguments; the input's terms are not known yet."""
    return loop_inputs(layer, masked_weight(layer), layer.tensors.input, summed_bias(layer))


def _terms(layer: Layer, inputs: LoopInputs, kept: Kept, previous: Tensor | None) -> Terms:
    """What the forward kept, or by one product over all steps the same again: every ``h`` is known by now."""
    if layer.options[13] == SAVE_RECOMPUTE:
        assert previous is not None
        product = input_product(layer, masked_input(layer))
        recurrent = recurrent_product(layer, inputs, previous)
    elif layer.flags.norm == NORM_NONE:
        return Terms(kept.gates, None, None, True)
    else:
        product, recurrent = kept.input_gates, kept.gates
    terms = product
    if layer.flags.norm_input:
        terms = normalised(layer, product, kept.input_statistics, torch.empty_like(product))
    return Terms(recurrent, product, terms, False)


def _after_loop(
    layer: Layer, kept: Kept, terms: Terms, grads: Gradients, previous: Tensor | None, needed: Needed
) -> dict[str, Tensor]:
    """Every gradient that is needed, by name, from what the loop left."""
    found: dict[str, Tensor] = {"hidden_probe": grads.hidden_probe, "cell_probe": grads.cell_probe}
    storage = layer.tensors.weight_hh.dtype
    found |= _norm_gradients(layer, kept, terms, grads)
    if needed.weight_hh:
        assert previous is not None
        found["weight_hh"] = recurrent_weight_gradient(layer, grads.grad_recurrent, previous)
    grad_input_gates = found.pop("input_gates", grads.grad_recurrent)
    if needed.weight_ih:
        values = masked_input(layer)
        found["weight_ih"] = weight_gradient(layer, grad_input_gates, values, layer.input_scale)
    if needed.weight_hr:
        found["weight_hr"] = weight_gradient(layer, grads.projected, grads.activated.unsqueeze(0), 1.0)
    if needed.input:
        found["input"] = input_gradient(layer, grad_input_gates)
    if needed.initial_hidden:
        hidden = grads.direct[1] if layer.flags.projected else grads.hidden
        found["initial_hidden"] = hidden.to(storage, copy=True)
    if needed.initial_cell:
        found["initial_cell"] = grads.cell[0].clone()
    of_gates = grads.grad_recurrent if grads.grad_gates is None else grads.grad_gates
    shifts = ("bias_ih", "bias_hh", "norm_input_bias", "norm_recurrent_bias")
    if any(getattr(needed, name) for name in shifts):
        groups = layer.gradient_groups
        by_group = of_gates.unflatten(1, (groups, -1)).transpose(1, 2) if groups else of_gates
        bias = by_group.flatten(0, 1).sum(0, dtype=torch.float32)
        found |= {name: bias.to(storage, copy=True) for name in shifts}
    return found


def _sum_over_rows(layer: Layer, value: Tensor) -> Tensor:
    """The sum over the first axis, ``(B, ...)``; with groups of gradients, over the rows of each, ``(S, ...)``."""
    groups = layer.gradient_groups
    return value.unflatten(0, (groups, -1)).sum(1) if groups else value.sum(0)


def _gain_gradient(layer: Layer, sums: Tensor) -> Tensor:
    """Of a norm's gain, from what :func:`term_sums` found."""
    gain = sums[:, :, 1].sum(1).to(layer.tensors.weight_hh.dtype)
    return gain if layer.gradient_groups else gain[0]


def _norm_gradients(layer: Layer, kept: Kept, terms: Terms, grads: Gradients) -> dict[str, Tensor]:
    """Gains' gradients, and ``input_gates``: ``dr`` in the storage type where it is not ``da``."""
    flags, storage = layer.flags, layer.tensors.weight_hh.dtype
    found: dict[str, Tensor] = {}
    if flags.norm_cell:
        sums = _sum_over_rows(layer, grads.cell_sums).to(storage)
        found["norm_cell_bias"], found["norm_cell_weight"] = (each.clone() for each in sums.unbind(-2))
    if flags.norm_recurrent:
        counts = averaged_counts(layer, grads.counts, pooled=False)
        sums = term_sums(layer, grads.grad_gates, terms.recurrent, kept.recurrent_statistics, counts)
        found["norm_recurrent_weight"] = _gain_gradient(layer, sums)
        found["input_gates"] = grads.grad_gates.to(storage)
    if flags.norm_input:
        pooled = bool(flags.norm != NORM_LAYER and layer.options[11])
        counts = averaged_counts(layer, grads.counts, pooled=pooled)
        given = (grads.grad_gates, terms.input, kept.input_statistics, counts)
        sums = term_sums(layer, *given, pooled=pooled)  # type: ignore[arg-type]
        found["norm_input_weight"] = _gain_gradient(layer, sums)
        found["input_gates"] = through_input_norm(layer, *given, sums, pooled=pooled)  # type: ignore[arg-type]
    return found
