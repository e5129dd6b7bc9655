"""Pascanu's Ω: a penalty that asks the gradient to keep its length on its way back through time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedreg import reference
from fusedreg.layer import REVERSE, LayerOptions, LayerParameters, LayerResult, compute_dtype
from fusedreg.modules import LSTM
from fusedreg.packed import pad
from fusedreg.regularization import BatchNorm, Regularization
from fusedreg.training.components import Place, places
from fusedreg.training.padding import check_not_packed_twice

# What the penalty is differentiable in; all else of the model is a constant to it.
_RECURRENT = ("weight_hh", "weight_hr")


class Transitions(NamedTuple):
    """The steps of one layer and direction, by position, all constants; 0 where a step does not count.

    ``input (T, B, I)``; the states ``hidden (T, B, P)`` and ``cell (T, B, H)`` before each step; ``gradient (T, B,
    P)``, of unit length, of the loss with respect to the ``h`` after it; ``counts (T, B)``, true where the step's ratio
    is defined.
    """

    input: Tensor
    hidden: Tensor
    cell: Tensor
    gradient: Tensor
    counts: Tensor


def vanishing_gradient_penalty(
    lstm: nn.Module,
    loss: Tensor,
    input: Tensor | PackedSequence,
    result: Any,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """Ω of Pascanu, Mikolov and Bengio 2013 (arXiv:1211.5063, equation 9), for an LSTM over ``h``.

    With ``δ_s = ∂L/∂h_s``, the whole gradient that reaches ``h`` after step ``s``, and the step's Jacobian over ``h``
    alone, ``J_s = ∂h_s/∂h_{s-1}`` at constant ``c_{s-1}``::

        Ω = 1/B · Σ_b Σ_s ( ‖δ_sᵀ J_s‖ / ‖δ_s‖ - 1 )²
        J_s = Σ_k diag(d_s^k) W_hh^k        d^o = o (1-o) tanh c             d^f = o (1-tanh²c) c_{s-1} f (1-f)
                                            d^i = o (1-tanh²c) g i (1-i)     d^g = o (1-tanh²c) i (1-g²)

    summed over layers and directions. As in the paper, ``δ`` and the states along the sequence are held constant:
    the gradient is that of the steps themselves, with respect to ``weight_hh`` (and ``weight_hr``), and no other
    parameter gets one. The memory that the cell keeps by itself is no part of it: Ω asks of the path through ``W_hh``
    that it carry the gradient too. Where ``δ_s`` is 0 (no loss after that step), at a sequence's first step, at a
    reset and in padding there is no ratio, and nothing is counted.

    The LSTM is run a second time for it, in plain torch, and as in evaluation: without masks, with zoneout and cell
    dropout as their expectations.

    Args:
        lstm: a :class:`fusedreg.LSTM` or :class:`torch.nn.LSTM`, with any layers, directions, projection or layer
            norm.
        loss: what was computed from ``result``; its graph is kept.
        input: what the LSTM was given.
        result: what it returned: ``output, (h_n, c_n)``, the very tensors that the loss was computed from.
        hx, lengths, reset: what it was given besides.

    Returns:
        Ω, a 0-dimensional tensor: ``(loss + strength * Ω).backward()``. It holds ``δ`` constant, so that a second
        derivative through it is not the whole one.

    Raises:
        TypeError: not an LSTM. ValueError: the loss does not depend on the result; a batch norm, whose rows share
            statistics, so that no row has a Jacobian of its own.

    Example:
        >>> import torch, fusedreg
        >>> lstm, input = fusedreg.LSTM(3, 4), torch.randn(20, 2, 3)
        >>> output, state = lstm(input)
        >>> loss = output[-1].square().mean()
        >>> omega = fusedreg.training.vanishing_gradient_penalty(lstm, loss, input, (output, state))
        >>> (loss + 0.1 * omega).backward()
    """
    if not isinstance(lstm, (LSTM, nn.LSTM)):
        raise TypeError(f"lstm: expected a fusedreg.LSTM or a torch.nn.LSTM, got {type(lstm).__name__}")
    regularization = lstm.regularization if isinstance(lstm, LSTM) else Regularization()
    if isinstance(regularization.norm, BatchNorm):
        raise ValueError(
            "lstm: expected no BatchNorm, got one, by which each row's step depends on the others; use LayerNorm"
        )
    gradients = _result_gradients(loss, result)
    call = _as_batch(lstm, input, gradients, hx, lengths, reset)
    layers = _layers(lstm, regularization)
    with torch.enable_grad():
        held = hold_transitions(layers, call, 2 if lstm.bidirectional else 1)
        terms = [
            transition_penalty(transitions, parameters, options)
            for transitions, (parameters, options) in zip(held, layers, strict=True)
        ]
    return torch.stack(terms).sum()


class Call(NamedTuple):
    """A call in the layout of the reference, time first and batched, detached, in the compute dtype."""

    input: Tensor
    hidden: Tensor | None
    cell: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    output_gradient: Tensor | None
    hidden_gradient: Tensor | None
    cell_gradient: Tensor | None


def _result_gradients(loss: Tensor, result: Any) -> tuple[Any, ...]:
    """What reaches output, ``h_n`` and ``c_n`` directly."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss: expected a tensor with one element, got {got}; pass what backward() is called on")
    if not isinstance(result, Sequence) or len(result) < 2 or not isinstance(result[1], Sequence):
        raise TypeError(
            f"result: expected output, (h_n, c_n), got {type(result).__name__}; pass what the LSTM returned, whole"
        )
    output, (hidden, cell) = result[0], result[1]
    tensors = (output.data if isinstance(output, PackedSequence) else output, hidden, cell)
    asked = [tensor for tensor in tensors if tensor.requires_grad and loss.requires_grad]
    found: Any = iter(torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True) if asked else ())
    gradients = tuple(next(found) if asked and tensor.requires_grad else None for tensor in tensors)
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "loss: expected one that was computed from result, got one that does not depend on it; pass the very "
            "tensors that the LSTM returned, in training or evaluation mode but not under no_grad"
        )
    if isinstance(output, PackedSequence) and gradients[0] is not None:
        return output._replace(data=gradients[0]), *gradients[1:]
    return gradients


def _as_batch(lstm: LSTM | nn.LSTM, input: Any, gradients: Any, hx: Any, lengths: Any, reset: Tensor | None) -> Call:
    output_gradient, hidden_gradient, cell_gradient = gradients
    hidden, cell = (None, None) if hx is None else hx
    if isinstance(input, PackedSequence):
        check_not_packed_twice(lengths)
        input, lengths, _ = pad(input)
        if output_gradient is not None:
            output_gradient = pad(output_gradient).input
    elif input.dim() == 2:
        input, output_gradient, hidden, cell, reset, hidden_gradient, cell_gradient = (
            None if tensor is None else tensor.unsqueeze(1)
            for tensor in (input, output_gradient, hidden, cell, reset, hidden_gradient, cell_gradient)
        )
        lengths = None if lengths is None else torch.as_tensor(lengths).reshape(1)
    elif lstm.batch_first:
        input, output_gradient, reset = (
            None if tensor is None else tensor.transpose(0, 1) for tensor in (input, output_gradient, reset)
        )
    dtype = compute_dtype(input.dtype)
    wide = [
        None if tensor is None else tensor.detach().to(dtype)
        for tensor in (input, hidden, cell, output_gradient, hidden_gradient, cell_gradient)
    ]
    on_device = None if lengths is None else torch.as_tensor(lengths, device=input.device)
    assert wide[0] is not None
    return Call(wide[0], wide[1], wide[2], on_device, reset, *wide[3:])


def _layers(lstm: LSTM | nn.LSTM, regularization: Regularization) -> list[tuple[LayerParameters, LayerOptions]]:
    """Parameters and options by layer and direction; only the recurrent weights are differentiable."""
    by_place: dict[tuple[int, int], dict[str, Tensor]] = {}
    for place in places(lstm):
        by_place.setdefault((place.layer, place.direction), {})[place.field] = _weight(lstm, place)
    return [
        (
            LayerParameters(**fields),
            regularization.layer_options(layer, lstm.num_layers, direction, training=False),
        )
        for (layer, direction), fields in sorted(by_place.items())
    ]


def _weight(lstm: nn.Module, place: Place) -> Tensor:
    weight: Tensor = getattr(lstm, place.name)
    wide = weight.to(compute_dtype(weight.dtype))
    return wide if place.field in _RECURRENT else wide.detach()


def hold_transitions(
    layers: Sequence[tuple[LayerParameters, LayerOptions]], call: Call, directions: int
) -> list[Transitions]:
    """Run the stack once, and bring the loss's gradient back to every ``h`` of it, by probes."""
    input, runs = call.input, []
    for place, (parameters, options) in enumerate(layers):
        runs.append(_run_layer(input, parameters, options, call, place))
        if options.direction == directions - 1:
            input = torch.cat([run.result.output for run in runs[-directions:]], -1)
    finals = [torch.stack([final(run.result) for run in runs]) for final in (_final_hidden, _final_cell)]
    total = input.new_zeros(())
    reached = zip((input, *finals), (call.output_gradient, call.hidden_gradient, call.cell_gradient), strict=True)
    for value, gradient in reached:
        if gradient is not None:
            total = total + (value * gradient).sum()
    found = torch.autograd.grad(total, [run.probe for run in runs], allow_unused=True)
    return [
        _hold(run, torch.zeros_like(run.probe) if gradient is None else gradient, options, call)
        for run, gradient, (_, options) in zip(runs, found, layers, strict=True)
    ]


class _Run(NamedTuple):
    """One layer and direction; ``hidden`` and ``cell`` are the carried states after each position."""

    input: Tensor
    probe: Tensor
    hidden: Tensor
    cell: Tensor
    result: LayerResult


def _final_hidden(result: LayerResult) -> Tensor:
    return result.final_hidden


def _final_cell(result: LayerResult) -> Tensor:
    return result.final_cell


def _run_layer(input: Tensor, parameters: LayerParameters, options: LayerOptions, call: Call, place: int) -> _Run:
    constant = LayerParameters._make(None if tensor is None else tensor.detach() for tensor in parameters)
    probe = input.new_zeros(*input.shape[:2], parameters.weight_hh.shape[1]).requires_grad_()
    seen: dict[str, Tensor] = {}
    result = reference.lstm_layer(
        input,
        None if call.hidden is None else call.hidden[place],
        None if call.cell is None else call.cell[place],
        constant,
        options,
        lengths=call.lengths,
        reset=call.reset,
        probes=(probe, None),
        intermediates=seen,
    )
    return _Run(input.detach(), probe, seen["hidden"].detach(), seen["cell"].detach(), result)


def _hold(run: _Run, gradient: Tensor, options: LayerOptions, call: Call) -> Transitions:
    valid = _valid(gradient, call.lengths)
    # The step before is the one of the next position where the sequence is run in reverse.
    shift = -1 if options.direction == REVERSE else 1
    hidden, cell, before = (value.roll(shift, 0) for value in (run.hidden, run.cell, valid))
    before[0 if shift == 1 else -1] = False
    # By its largest part first: the square of a vanished gradient may be zero though it is not.
    largest = gradient.abs().amax(-1, keepdim=True)
    scaled = torch.where(largest > 0, gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny), 0.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    counts = valid & before & (length[..., 0] > 0)
    if call.reset is not None:
        counts = counts & ~call.reset
    # Selected: what is not counted may be padding, which may hold anything.
    input, hidden, cell, unit = (
        torch.where(counts[..., None], value, 0.0)
        for value in (run.input, hidden, cell, scaled / length.clamp(min=1.0))
    )
    return Transitions(input, hidden, cell, unit, counts)


def _valid(like: Tensor, lengths: Tensor | None) -> Tensor:
    steps, rows = like.shape[:2]
    ends = torch.full((rows,), steps, device=like.device) if lengths is None else lengths
    return torch.arange(steps, device=like.device)[:, None] < ends


def transition_penalty(held: Transitions, parameters: LayerParameters, options: LayerOptions) -> Tensor:
    """Ω of one layer and direction, from held transitions: all steps at once, each a row."""
    rows = held.counts.shape[1]
    hidden = held.hidden.flatten(0, 1).requires_grad_()
    result = reference.lstm_layer(held.input.flatten(0, 1)[None], hidden, held.cell.flatten(0, 1), parameters, options)
    (carried,) = torch.autograd.grad(result.final_hidden, hidden, held.gradient.flatten(0, 1), create_graph=True)
    ratio = torch.linalg.vector_norm(carried, dim=-1)
    # Selected: a step that is not counted has a ratio of 0, and no part in the gradient.
    terms = torch.where(held.counts.flatten(), (ratio - 1.0).square(), 0.0)
    return terms.sum() / max(rows, 1)
