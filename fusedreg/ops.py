"""The two operators of a layer, as torch sees them: fakes, differentiation, vmap.

``fusedreg::lstm_layer_forward`` and ``fusedreg::lstm_layer_backward`` run the whole loop of one layer in one
direction. Their schemas stand in ``csrc/registration.cpp``, so that a compiled package runs without Python; this
file imports torch only, and :func:`register_operators` attaches to them what Python adds:

- fakes with the real shapes, strides and types, for ``torch.compile`` and ``torch.export``;
- an ``autograd.Function`` over the forward, whose backward calls a *second* one over the backward. The second's own
  backward is the vector-Jacobian product of :mod:`fusedreg.reference`: a double backward is slow and right;
- the same formula through ``register_autograd``, for programs that call the operators themselves.

:func:`lstm_layer` is what :mod:`fusedreg.functional` calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedreg.layer import (
    BatchStatistics,
    LayerOptions,
    LayerParameters,
    LayerResult,
    RunningStatistics,
    compute_dtype,
)
from fusedreg.regularization import BatchNorm, LayerNorm

# What the forward keeps for the backward: `Save` in csrc/common/params.h.
SAVE_NOTHING, SAVE_GATES, SAVE_RECOMPUTE = 0, 1, 2
NORM_NONE, NORM_BATCH, NORM_LAYER = 0, 1, 2

# The tensor arguments of the forward, in the schema's order.
TENSOR_ARGUMENTS = (
    "input",
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "initial_hidden",
    "initial_cell",
    "lengths",
    "reset",
    "seed",
    "norm_input_weight",
    "norm_input_bias",
    "norm_recurrent_weight",
    "norm_recurrent_bias",
    "norm_cell_weight",
    "norm_cell_bias",
    "running_index",
    "running_input_index",
    "running_input_mean",
    "running_input_var",
    "running_recurrent_mean",
    "running_recurrent_var",
    "running_cell_mean",
    "running_cell_var",
)
# Those that have a gradient, in the order of the backward's results.
DIFFERENTIABLE = (0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15)
_FIRST_RUNNING = 16

Encoded = tuple[list[float], list[int], float]


def encode_options(options: LayerOptions, save: int) -> Encoded:
    """``(rates, options, norm_eps)`` as the operators take them: the order of the structs in ``params.h``.

    Args:
        options: of one layer and direction.
        save: one of ``SAVE_NOTHING``, ``SAVE_GATES`` and ``SAVE_RECOMPUTE``.
    """
    norm = options.norm
    kind = NORM_BATCH if isinstance(norm, BatchNorm) else NORM_LAYER if isinstance(norm, LayerNorm) else NORM_NONE
    flags = [
        options.layer,
        options.direction,
        int(options.training),
        int(options.gate_masks == "untied"),
        int(options.update_mask == "sequence"),
        int(options.weight_mask == "row"),
        int(options.zoneout_output == "candidate"),
        kind,
        int(norm is not None and norm.input),
        int(norm is not None and norm.recurrent),
        int(norm is not None and norm.cell),
        int(isinstance(norm, BatchNorm) and norm.input_statistics == "sequence"),
        int(options.return_cells),
        save,
    ]
    return list(options.rates), flags, 0.0 if norm is None else norm.eps


_encode_once = functools.lru_cache(maxsize=1024)(encode_options)


def decode_options(rates: Sequence[float], options: Sequence[int], norm_eps: float) -> tuple[LayerOptions, int]:
    """The inverse of :func:`encode_options`, but for what the operators do not need (a batch norm's momentum)."""
    layer, direction, training, untied, update_sequence, weight_row, candidate = options[:7]
    kind, norm_input, norm_recurrent, norm_cell, input_sequence, return_cells, save = options[7:]
    norm: BatchNorm | LayerNorm | None = None
    if kind == NORM_BATCH:
        norm = BatchNorm(
            input=bool(norm_input),
            recurrent=bool(norm_recurrent),
            cell=bool(norm_cell),
            statistics="shared",
            input_statistics="sequence" if input_sequence else "step",
            eps=norm_eps,
        )
    elif kind == NORM_LAYER:
        norm = LayerNorm(input=bool(norm_input), recurrent=bool(norm_recurrent), cell=bool(norm_cell), eps=norm_eps)
    decoded = LayerOptions(
        layer,
        direction,
        bool(training),
        *rates,
        gate_masks="untied" if untied else "tied",
        update_mask="sequence" if update_sequence else "step",
        weight_mask="row" if weight_row else "element",
        zoneout_output="candidate" if candidate else "state",
        norm=norm,
        recompute=save == SAVE_RECOMPUTE,
        return_cells=bool(return_cells),
    )
    return decoded, save


def _hidden_differs(rates: Sequence[float], options: Sequence[int]) -> bool:
    """Whether the carried ``h`` is something else than the output, and so has to be saved beside it."""
    dropout, _, _, output_dropout, _, _, _, zoneout_hidden, _ = rates
    training, candidate = options[2], options[6]
    return bool((training and (dropout > 0 or output_dropout > 0)) or (candidate and zoneout_hidden > 0))


# Fakes -----------------------------------------------------------------------------------------------------------


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (rates, options, _) = arguments[:24], arguments[24:]
    input, weight_hh = tensors[0], tensors[2]
    steps, rows = input.shape[0], input.shape[1]
    hidden_size = weight_hh.shape[0] // 4
    kind, norm_input, norm_recurrent, norm_cell, input_sequence, return_cells, save = options[7:]
    compute = compute_dtype(input.dtype)

    def new(wanted: Any, *shape: Any, dtype: torch.dtype = input.dtype) -> Tensor:
        return input.new_empty(shape if wanted else (0,), dtype=dtype)

    if kind == NORM_LAYER:
        statistics_wanted = save != SAVE_NOTHING
        statistics_shapes = [(steps, 2, rows)] * 3
    else:
        statistics_wanted = kind == NORM_BATCH and (bool(options[2]) or save != SAVE_NOTHING)
        gates_shape = (steps, 2, 4 * hidden_size)
        input_shape = (1, 2, 4 * hidden_size) if input_sequence else gates_shape
        statistics_shapes = [input_shape, gates_shape, (steps, 2, hidden_size)]
    return (
        new(True, steps, rows, hidden_size),
        new(True, rows, hidden_size),
        new(True, rows, hidden_size, dtype=compute),
        new(save != SAVE_NOTHING or return_cells, steps, rows, hidden_size, dtype=compute),
        new(save != SAVE_NOTHING and _hidden_differs(rates, options), steps, rows, hidden_size),
        new(save == SAVE_GATES, steps, rows, 4 * hidden_size),
        new(save == SAVE_GATES and kind != NORM_NONE, steps, rows, 4 * hidden_size),
        *(
            new(statistics_wanted and site, *shape, dtype=compute)
            for site, shape in zip((norm_input, norm_recurrent, norm_cell), statistics_shapes, strict=True)
        ),
    )


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, needed = arguments[4:28], arguments[-1]
    input, weight_hh = tensors[0], tensors[2]
    steps, rows, input_size = input.shape
    gates, hidden_size = weight_hh.shape[0], weight_hh.shape[0] // 4
    compute = compute_dtype(input.dtype)
    shapes: list[tuple[Any, ...]] = [
        (steps, rows, input_size),
        (gates, input_size),
        (gates, hidden_size),
        (gates,),
        (gates,),
        (rows, hidden_size),
        (rows, hidden_size),
        (gates,),
        (gates,),
        (gates,),
        (gates,),
        (hidden_size,),
        (hidden_size,),
    ]
    return tuple(
        input.new_empty(shape if wanted else (0,), dtype=compute if position == 6 else input.dtype)
        for position, (shape, wanted) in enumerate(zip(shapes, needed, strict=True))
    )


# Differentiation -------------------------------------------------------------------------------------------------


def _forward_operator(*arguments: Any) -> Any:
    return torch.ops.fusedreg.lstm_layer_forward.default(*arguments)


def _backward_operator(*arguments: Any) -> Any:
    return torch.ops.fusedreg.lstm_layer_backward.default(*arguments)


def _save_for_backward(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    tensors, (rates, options, norm_eps) = inputs[:24], inputs[24:]
    y, _, _, cells, hidden, gates, input_gates, *statistics = output
    ctx.rates, ctx.options, ctx.norm_eps = list(rates), list(options), norm_eps
    constants = [hidden, gates, input_gates, *statistics]
    if not options[12]:
        constants.append(cells)
    ctx.mark_non_differentiable(*constants)
    if not torch.compiler.is_compiling():  # dynamo has no rule for it, and removes the dead zeros itself
        ctx.set_materialize_grads(False)
    carried = hidden if _hidden_differs(rates, options) else y
    # The running statistics are not kept: what was read of them stands in `statistics`, and a module updates them in
    # place before the backward comes.
    ctx.save_for_backward(*tensors[:_FIRST_RUNNING], cells, carried, gates, input_gates, *statistics)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    options = ctx.options
    if options[13] == SAVE_NOTHING:
        raise RuntimeError(
            "fusedreg::lstm_layer_forward: expected options that save for the backward, got save = 0 (nothing) with "
            "an input that requires grad; call fusedreg.ops.lstm_layer, or encode the options with SAVE_GATES"
        )
    output, final_hidden, final_cell, cells = grads[:4]
    if not options[12]:
        cells = None
    needed = [ctx.needs_input_grad[position] for position in DIFFERENTIABLE]
    if all(grad is None for grad in (output, final_hidden, final_cell, cells)) or not any(needed):
        return (None,) * 27
    saved = ctx.saved_tensors
    tensors = (*saved[:_FIRST_RUNNING], *(None,) * 8)
    arguments = (
        (output, final_hidden, final_cell, cells),
        tensors,
        saved[_FIRST_RUNNING:],
        (ctx.rates, options, ctx.norm_eps, needed),
    )
    flat = [argument for group in arguments for argument in group]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        results = _LayerBackward.apply(*flat)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            results = _backward_operator(*flat)
    gradients: list[Tensor | None] = [None] * 27
    for position, wanted, result in zip(DIFFERENTIABLE, needed, results, strict=True):
        if wanted:
            gradients[position] = result
    return tuple(gradients)


def _loop_over_samples(function: Any, info: Any, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> Any:
    """The vmap rule of both operators: one call a sample, with the masks that a loop would have drawn."""
    results = []
    for sample in range(info.batch_size):
        chosen = [
            argument.select(dim, sample) if isinstance(argument, Tensor) and isinstance(dim, int) else argument
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(function.apply(*chosen))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


class _Layer(torch.autograd.Function):
    """The forward operator; its arguments and results are the operator's."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _forward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _gradients(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _loop_over_samples(_Layer, info, in_dims, arguments)


class _LayerBackward(torch.autograd.Function):
    """The backward operator, differentiable once more through the reference."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_for_double_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _second_gradients(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _loop_over_samples(_LayerBackward, info, in_dims, arguments)


def _save_for_double_backward(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.rates, ctx.options, ctx.norm_eps, ctx.needed = inputs[35:]
    ctx.mark_non_differentiable(*(result for result, wanted in zip(output, ctx.needed, strict=True) if not wanted))
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)
    statistics = inputs[32:35]
    ctx.save_for_backward(*inputs[: 4 + _FIRST_RUNNING], *statistics)


def _second_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients of ``⟨grads, backward(...)⟩``, by differentiating the reference twice."""
    from fusedreg import reference  # here, so that the operators themselves need torch only

    saved = ctx.saved_tensors
    output_grads, tensors, statistics = saved[:4], list(saved[4:20]), saved[20:]
    options, _ = decode_options(ctx.rates, ctx.options, ctx.norm_eps)
    running = _statistics_as_running(options, statistics, tensors[0])
    wanted = [place for place, grad in enumerate(grads) if grad is not None and ctx.needed[place]]
    if not wanted:
        return (None,) * 39
    # Primals: every differentiable tensor there is, then the gradients that came in.
    places = [position for position in DIFFERENTIABLE if tensors[position] is not None]
    given = [place for place, grad in enumerate(output_grads) if grad is not None]
    inner = [places.index(DIFFERENTIABLE[place]) for place in wanted]

    def outputs(*primals: Tensor) -> tuple[Tensor, ...]:
        full: list[Tensor | None] = list(tensors)
        for position, primal in zip(places, primals, strict=True):
            full[position] = primal
        result = _call(reference.lstm_layer, full, options, running)
        four = (result.output, result.final_hidden, result.final_cell, result.cells)
        return tuple(value for place in given if (value := four[place]) is not None)

    def first_gradients(*primals: Tensor) -> tuple[Tensor, ...]:
        values, cotangents = primals[: len(places)], primals[len(places) :]

        def of_inner(*chosen: Tensor) -> tuple[Tensor, ...]:
            replaced = list(values)
            for place, value in zip(inner, chosen, strict=True):
                replaced[place] = value
            return outputs(*replaced)

        _, pullback = torch.func.vjp(of_inner, *(values[place] for place in inner))
        return tuple(pullback(cotangents))

    primals = [tensors[position] for position in places] + [output_grads[place] for place in given]
    _, pullback = torch.func.vjp(first_gradients, *primals)
    seconds = pullback(tuple(grads[place] for place in wanted))
    results: list[Tensor | None] = [None] * 39
    for position, second in zip(places, seconds[: len(places)], strict=True):
        results[4 + position] = second
    for place, second in zip(given, seconds[len(places) :], strict=True):
        results[place] = second
    return tuple(results)


def _call(
    layer: Callable[..., LayerResult],
    tensors: Sequence[Any],
    options: LayerOptions,
    running: RunningStatistics | None,
) -> LayerResult:
    """Call an implementation of the layer with the operator's tensors."""
    input, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell, lengths, reset, seed = tensors[:10]
    parameters = LayerParameters(weight_ih, weight_hh, bias_ih, bias_hh, None, *tensors[10:_FIRST_RUNNING])
    return layer(input, hidden, cell, parameters, options, lengths=lengths, reset=reset, seed=seed, running=running)


def _statistics_as_running(
    options: LayerOptions, statistics: Sequence[Tensor], input: Tensor
) -> RunningStatistics | None:
    """The statistics that the forward normalised with, in the form in which the reference reads running ones.

    It reads them in evaluation, and in training at steps with one valid row: exactly where the forward did.
    """
    if not isinstance(options.norm, BatchNorm):
        return None
    index = torch.arange(input.shape[0], device=input.device)
    pairs: list[Tensor | None] = []
    for site, values in zip((options.norm.input, options.norm.recurrent, options.norm.cell), statistics, strict=True):
        pairs += [values[:, 0], values[:, 1]] if site else [None, None]
    pooled = options.norm.input_statistics == "sequence"
    return RunningStatistics(index, torch.zeros_like(index) if pooled else index, *pairs)


# The layer ----------------------------------------------------------------------------------------------------------


def lstm_layer(
    input: Tensor,
    initial_hidden: Tensor | None,
    initial_cell: Tensor | None,
    parameters: LayerParameters,
    options: LayerOptions,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    seed: Tensor | None = None,
    running: RunningStatistics | None = None,
) -> LayerResult:
    """One layer in one direction, by the operators: the signature and the meaning of ``reference.lstm_layer``.

    Arguments are taken as they come: :mod:`fusedreg.validation` has checked them. Differentiable twice and more
    (from the second time on through the reference), under ``torch.func`` and ``torch.compile``.

    Args:
        input: ``(T, B, I)``, any strides.
        initial_hidden: ``(B, H)``, or ``None`` for zeros.
        initial_cell: ``(B, H)`` in the input's type or in the compute type, or ``None`` for zeros.
        parameters: of this layer and direction, in the input's type.
        options: everything that is not a tensor.
        lengths: ``(B,)`` int64 on the input's device; clamped to [0, T].
        reset: ``(T, B)`` bool.
        seed: 0-dimensional int64, needed where ``options.draws``.
        running: what batch norm reads.

    Returns:
        A :class:`~fusedreg.layer.LayerResult`; ``final_cell`` and ``cells`` in the compute type.
    """
    norm = options.norm
    compute = compute_dtype(input.dtype)
    if initial_cell is not None and initial_cell.dtype != compute:
        initial_cell = initial_cell.to(compute)
    if norm is None:
        extras: tuple[Tensor | None, ...] = _NO_NORM
    else:
        extras = parameters[5:11] + (tuple(running) if running is not None else (None,) * 8)
    tensors = (input, *parameters[:4], initial_hidden, initial_cell, lengths, reset, seed, *extras)
    compiling = torch.compiler.is_compiling()
    encode = encode_options if compiling else _encode_once
    transformed = torch._C._are_functorch_transforms_active()
    # Under a transform a tensor may not show that it requires grad at a level further out, so the Function it is.
    if transformed or (torch.is_grad_enabled() and _requires_grad(tensors)):
        results = _Layer.apply(*tensors, *encode(options, SAVE_RECOMPUTE if options.recompute else SAVE_GATES))
    elif compiling:
        results = _forward_operator(*tensors, *encode(options, SAVE_NOTHING))
    else:
        # Nothing to differentiate: past the operator's autograd kernel, which is Python and costs as much again.
        with torch._C._AutoDispatchBelowAutograd():
            results = _forward_operator(*tensors, *encode(options, SAVE_NOTHING))
    output, final_hidden, final_cell, cells = results[:4]
    statistics = None
    if isinstance(norm, BatchNorm) and options.training:
        sites = (norm.input, norm.recurrent, norm.cell)
        statistics = BatchStatistics(*(value if site else None for site, value in zip(sites, results[7:], strict=True)))
    return LayerResult(output, final_hidden, final_cell, cells if options.return_cells else None, statistics)


_NO_NORM: tuple[None, ...] = (None,) * 14


def _requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


# Registration ---------------------------------------------------------------------------------------------------

_registered = False


def register_operators() -> None:
    """Attach fakes and autograd formulas to the operators. Once; called when the extension has been loaded."""
    global _registered
    if _registered:
        return
    torch.library.register_fake("fusedreg::lstm_layer_forward", _forward_fake)
    torch.library.register_fake("fusedreg::lstm_layer_backward", _backward_fake)
    torch.library.register_autograd(
        "fusedreg::lstm_layer_forward",
        _gradients,
        setup_context=lambda ctx, inputs, output: _save_for_backward(ctx, inputs, output),
    )
    torch.library.register_autograd(
        "fusedreg::lstm_layer_backward",
        _second_gradients,
        setup_context=lambda ctx, inputs, output: _save_for_double_backward(ctx, inputs, output),
    )
    _registered = True
