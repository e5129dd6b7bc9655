"""One layer by a pair of operators, and what Python adds to them.

``fusedreg::lstm_layer_forward`` and ``fusedreg::lstm_layer_backward`` run the whole loop of one layer in one
direction, on CPU and CUDA tensors. Their schemas stand in ``csrc/registration.cpp``, so that a compiled package runs
without Python. Other kernels come as a pair of operators of their own under the same schemas, since one dispatch key
holds one kernel; a pair is known by its name, ``"namespace::name"`` without the ``_forward`` and ``_backward``.
:func:`register_operators` attaches to a pair the fakes of :mod:`fusedreg.fakes`, and through ``register_autograd`` the
gradients of :mod:`fusedreg.differentiation` for programs that call the operators directly. :func:`lstm_layer` is what
:mod:`fusedreg.functional` calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedreg.differentiation import (
    Operators,
    allow_in_graph,
    gradients,
    save_for_backward,
    save_for_double_backward,
    second_gradients,
)
from fusedreg.encoding import SAVE_GATES, SAVE_NOTHING, SAVE_RECOMPUTE, encode_once, encode_options, tensor_arguments
from fusedreg.fakes import backward_fake, forward_fake
from fusedreg.layer import (
    BatchStatistics,
    LayerOptions,
    LayerParameters,
    LayerResult,
    Probes,
    RunningStatistics,
    compute_dtype,
)
from fusedreg.regularization import BatchNorm

__all__ = [
    "COMPILED",
    "SAVE_GATES",
    "SAVE_NOTHING",
    "SAVE_RECOMPUTE",
    "encode_options",
    "lstm_layer",
    "register_operators",
]

# The pair of the compiled extensions: the CPU's file registers kernels for CPU tensors, CUDA's for CUDA tensors.
COMPILED = "fusedreg::lstm_layer"

_pairs: dict[str, Operators] = {}


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
    probes: Probes | None = None,
    operators: str = COMPILED,
) -> LayerResult:
    """One layer in one direction, by the operators: the signature and the meaning of ``reference.lstm_layer``.

    Arguments are taken as they come: :mod:`fusedreg.validation` has checked them. Differentiable twice and more
    (from the second time on through the reference), under ``torch.func`` and ``torch.compile``.

    Args:
        input: ``(T, B, I)``, any strides.
        initial_hidden: ``(B, P)``, or ``None`` for zeros.
        initial_cell: ``(B, H)`` in the input's type or in the compute type, or ``None`` for zeros.
        parameters: of this layer and direction, in the input's type.
        options: everything that is not a tensor.
        lengths: ``(B,)`` int64 on the input's device; clamped to [0, T].
        reset: ``(T, B)`` bool.
        seed: 0-dimensional int64, or ``(S, 2)``, needed where ``options.draws``: see ``reference.lstm_layer``.
        running: what batch norm reads.
        probes: zeros to be differentiated, see :data:`fusedreg.layer.Probes`. Their values are not looked at.
        operators: the name of the pair that runs it, which :func:`register_operators` has been given.

    Returns:
        A :class:`~fusedreg.layer.LayerResult`; ``final_cell`` and ``cells`` in the compute type.
    """
    pair = _pairs[operators]
    norm = options.norm
    if initial_cell is not None:
        compute = compute_dtype(input.dtype)
        if initial_cell.dtype != compute:
            initial_cell = initial_cell.to(compute)
    if norm is None:
        running = None
    tensors = tensor_arguments(input, initial_hidden, initial_cell, parameters, lengths, reset, seed, probes, running)
    compiling = torch.compiler.is_compiling()
    if compiling:
        allow_in_graph()
    encode = encode_options if compiling else encode_once
    transformed = torch._C._are_functorch_transforms_active()
    # Under a transform a tensor may not show that it requires grad at a level further out, so the Function it is; and
    # the Function is what refuses forward mode, whose tangents the operator would silently lose.
    dual = forward_ad._current_level >= 0
    differentiated = transformed or dual or (torch.is_grad_enabled() and _requires_grad(tensors))
    if differentiated and (compiling or not torch._C._is_tracing()):  # what torch.jit.trace records is for inference
        save = SAVE_RECOMPUTE if options.recompute else SAVE_GATES
        results = pair.layer.apply(*tensors, *encode(options, save))
    elif compiling:
        results = pair.forward(*tensors, *encode(options, SAVE_NOTHING))
    else:
        # Nothing to differentiate: past the operator's autograd kernel, which is Python and costs as much again. A
        # trace has no place for a Python function; whoever differentiates what it recorded is told what was not saved.
        with torch._C._AutoDispatchBelowAutograd():
            results = pair.call_forward(*tensors, *encode(options, SAVE_NOTHING))
    output, final_hidden, final_cell, cells = results[:4]
    statistics = None
    if isinstance(norm, BatchNorm) and options.training:
        sites = (norm.input, norm.recurrent, norm.cell)
        statistics = BatchStatistics(*(value if site else None for site, value in zip(sites, results[7:], strict=True)))
    return LayerResult(output, final_hidden, final_cell, cells if options.return_cells else None, statistics)


def _requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110  (any() takes twice as long, as much as a view)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def register_operators(name: str = COMPILED) -> None:
    """Attach fakes and autograd formulas to a pair of operators, once; called when its kernels have been loaded.

    Args:
        name: ``"namespace::name"``; ``name_forward`` and ``name_backward`` are defined under the layer's schemas.
    """
    if name in _pairs:
        return
    pair = Operators(name)
    torch.library.register_fake(f"{name}_forward", forward_fake)
    torch.library.register_fake(f"{name}_backward", backward_fake)
    torch.library.register_autograd(
        f"{name}_forward",
        functools.partial(gradients, pair),
        setup_context=lambda ctx, inputs, output: save_for_backward(ctx, inputs, output),
    )
    torch.library.register_autograd(
        f"{name}_backward",
        second_gradients,
        setup_context=lambda ctx, inputs, output: save_for_double_backward(ctx, inputs, output),
    )
    _pairs[name] = pair
