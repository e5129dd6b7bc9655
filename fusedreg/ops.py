"""One layer by the two operators, and what Python adds to them.

``fusedreg::lstm_layer_forward`` and ``fusedreg::lstm_layer_backward`` run the whole loop of one layer in one
direction. Their schemas stand in ``csrc/registration.cpp``, so that a compiled package runs without Python.
:func:`register_operators` attaches to them the fakes of :mod:`fusedreg.fakes`, and through ``register_autograd`` the
gradients of :mod:`fusedreg.differentiation` for programs that call them directly. :func:`lstm_layer` is what
:mod:`fusedreg.functional` calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedreg.differentiation import (
    Layer,
    allow_in_graph,
    forward_operator,
    gradients,
    save_for_backward,
    save_for_double_backward,
    second_gradients,
)
from fusedreg.encoding import SAVE_GATES, SAVE_NOTHING, SAVE_RECOMPUTE, encode_once, encode_options
from fusedreg.fakes import backward_fake, forward_fake
from fusedreg.layer import (
    BatchStatistics,
    LayerOptions,
    LayerParameters,
    LayerResult,
    RunningStatistics,
    compute_dtype,
)
from fusedreg.regularization import BatchNorm

__all__ = ["SAVE_GATES", "SAVE_NOTHING", "SAVE_RECOMPUTE", "encode_options", "lstm_layer", "register_operators"]


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
    if compiling:
        allow_in_graph()
    encode = encode_options if compiling else encode_once
    transformed = torch._C._are_functorch_transforms_active()
    # Under a transform a tensor may not show that it requires grad at a level further out, so the Function it is; and
    # the Function is what refuses forward mode, whose tangents the operator would silently lose.
    dual = forward_ad._current_level >= 0
    if transformed or dual or (torch.is_grad_enabled() and _requires_grad(tensors)):
        save = SAVE_RECOMPUTE if options.recompute else SAVE_GATES
        results = Layer.apply(*tensors, *encode(options, save))
    elif compiling:
        results = forward_operator(*tensors, *encode(options, SAVE_NOTHING))
    else:
        # Nothing to differentiate: past the operator's autograd kernel, which is Python and costs as much again.
        with torch._C._AutoDispatchBelowAutograd():
            results = forward_operator(*tensors, *encode(options, SAVE_NOTHING))
    output, final_hidden, final_cell, cells = results[:4]
    statistics = None
    if isinstance(norm, BatchNorm) and options.training:
        sites = (norm.input, norm.recurrent, norm.cell)
        statistics = BatchStatistics(*(value if site else None for site, value in zip(sites, results[7:], strict=True)))
    return LayerResult(output, final_hidden, final_cell, cells if options.return_cells else None, statistics)


_NO_NORM: tuple[None, ...] = (None,) * 14


def _requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


_registered = False


def register_operators() -> None:
    """Attach fakes and autograd formulas to the operators. Once; called when the extension has been loaded."""
    global _registered
    if _registered:
        return
    torch.library.register_fake("fusedreg::lstm_layer_forward", forward_fake)
    torch.library.register_fake("fusedreg::lstm_layer_backward", backward_fake)
    torch.library.register_autograd(
        "fusedreg::lstm_layer_forward",
        gradients,
        setup_context=lambda ctx, inputs, output: save_for_backward(ctx, inputs, output),
    )
    torch.library.register_autograd(
        "fusedreg::lstm_layer_backward",
        second_gradients,
        setup_context=lambda ctx, inputs, output: save_for_double_backward(ctx, inputs, output),
    )
    _registered = True
