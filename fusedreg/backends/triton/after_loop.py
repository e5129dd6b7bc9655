"""What follows the backward loop: products over all steps for the weights and the input, and column sums.

::

    dW_hh = M_w ⊙ Σ_s da_sᵀ (m_h ⊙ h_{s-1})      dW_ih = Σ_t dr_tᵀ (m_x ⊙ x_t)      dx = m_x ⊙ (dr W_ih)

Each is one library product, or one a gate where masks are untied. Masks are zeros and ones; the scales of inverted
dropout go to the products. Sums run in an order that depends on nothing but the shapes.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedreg.backends.triton.before_loop import masked_weight, wide_product
from fusedreg.backends.triton.jit_masks import (
    INPUT,
    SEQUENCE,
    UNTIED_HIDDEN,
    UNTIED_INPUT,
    family_words,
    is_below,
    row_key,
    threshold,
)
from fusedreg.backends.triton.jit_storage import narrow
from fusedreg.backends.triton.jit_tile import TIED, UNTIED
from fusedreg.backends.triton.layout import FUSED, Layer, LoopInputs

_ROWS, _COLUMNS = 8, 128


@triton.jit(do_not_specialize=["steps", "rows", "group_rows", "stream", "limit"])
def previous_hidden_kernel(  # type: ignore[no-untyped-def]
    hidden, initial, reset, lengths, seed, masked, steps, rows, group_rows, stream, limit, WIDTH: tl.constexpr,
    REVERSE: tl.constexpr, MASK: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``masked (1 or 4, T * B, P) = m_h ⊙ h_{s-1}`` by position, zeros and ones; 0 through a reset and in padding."""
    pair = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    pairs = steps.to(tl.int64) * rows
    position, row = pair // rows, pair % rows
    length = position * 0 + steps
    if lengths is not None:
        length = tl.load(lengths + row, mask=pair < pairs, other=0)
    wanted = (pair < pairs) & (position < length)
    if reset is not None:
        wanted = wanted & (tl.load(reset + pair, mask=wanted, other=0) == 0)
    if REVERSE:
        first = position == length - 1
        before = pair + rows
    else:
        first = position == 0
        before = pair - rows
    inside = column < WIDTH
    value = tl.load(hidden + before * WIDTH + column, mask=wanted & ~first & inside, other=0.0)
    if initial is not None:
        value += tl.load(initial + row * WIDTH + column, mask=wanted & first & inside, other=0.0)
    at = pair * WIDTH + column
    inside = (pair < pairs) & inside
    if MASK == 0:
        tl.store(masked + at, value, mask=inside)
    else:
        key0, key1, counted, _ = row_key(row, seed, rows, group_rows, GROUPED)
        zero = tl.zeros_like(value)
        if MASK == TIED:
            words = family_words(column, counted, SEQUENCE, stream, key0, key1)
            tl.store(masked + at, tl.where(is_below(words[0], limit), zero, value), mask=inside)
        else:
            words = family_words(column, counted, UNTIED_HIDDEN, stream, key0, key1)
            for gate in tl.static_range(4):
                kept = tl.where(is_below(words[gate], limit), zero, value)
                tl.store(masked + gate * pairs * WIDTH + at, kept, mask=inside)


@triton.jit(do_not_specialize=["steps", "rows", "group_rows", "stream", "limit", "scale"])
def input_gradient_kernel(  # type: ignore[no-untyped-def]
    products, grad, lengths, seed, steps, rows, group_rows, stream, limit, scale, WIDTH: tl.constexpr,
    MASK: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dx (T, B, I)`` from ``dr W_ih (1 or 4, T * B, I)``, a product a gate where masks are untied."""
    pair = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    pairs = steps.to(tl.int64) * rows
    position, row = pair // rows, pair % rows
    inside = (pair < pairs) & (column < WIDTH)
    wanted = inside
    if lengths is not None:
        wanted = inside & (position < tl.load(lengths + row, mask=pair < pairs, other=0))
    at = pair * WIDTH + column
    if MASK == 0:
        value = tl.load(products + at, mask=wanted, other=0.0)
    else:
        key0, key1, counted, _ = row_key(row, seed, rows, group_rows, GROUPED)
        if MASK == TIED:
            words = family_words(column, counted, INPUT, stream, key0, key1)
            value = tl.load(products + at, mask=wanted & ~is_below(words[0], limit), other=0.0)
        else:
            words = family_words(column, counted, UNTIED_INPUT, stream, key0, key1)
            value = tl.zeros([ROWS, COLUMNS], tl.float32)
            for gate in tl.static_range(4):
                kept = wanted & ~is_below(words[gate], limit)
                value += tl.load(products + gate * pairs * WIDTH + at, mask=kept, other=0.0)
    tl.store(grad + at, narrow(value * scale, grad.dtype.element_ty), mask=inside)


def previous_hidden(layer: Layer, inputs: LoopInputs, hidden: Tensor) -> Tensor:
    """``m_h ⊙ h_{s-1}``, not scaled, at each position: ``(1 or 4, T * B, P)``, four copies where masks are untied.

    Args:
        hidden: ``(T, B, P)``, the carried ``h`` as it was saved.
    """
    (steps, rows, *_), width, mask = layer.sizes, layer.flags.projected_size, layer.flags.hidden_dropout
    copies = 4 if mask == UNTIED.value else 1
    masked = torch.empty(copies, steps * rows, width, dtype=hidden.dtype, device=hidden.device)
    previous_hidden_kernel[(triton.cdiv(steps * rows, _ROWS), triton.cdiv(width, _COLUMNS))](
        hidden,
        inputs.initial_hidden,
        inputs.reset,
        inputs.lengths,
        inputs.seed if mask else None,
        masked,
        steps,
        rows,
        layer.sizes.group_rows,
        layer.rates.stream,
        layer.rates.hidden_threshold,
        width,
        layer.flags.reverse,
        mask,
        layer.flags.grouped_seed,
        _ROWS,
        _COLUMNS,
        **FUSED,
    )
    return masked


def recurrent_product(layer: Layer, inputs: LoopInputs, previous: Tensor) -> Tensor:
    """``a (T, B, 4H)`` of all steps in float32, as the forward had it, from what :func:`previous_hidden` made."""
    product = _by_gate(previous, inputs.weight_hh)
    return product.mul_(layer.rates.recurrent_scale).view(layer.sizes.steps, layer.sizes.rows, -1)


def _by_gate(values: Tensor, weight: Tensor) -> Tensor:
    if values.shape[0] == 1:
        return wide_product(values[0], weight.t())
    products = [wide_product(value, gate.t()) for value, gate in zip(values, weight.chunk(4), strict=True)]
    return torch.cat(products, 1)


def weight_gradient(layer: Layer, grad: Tensor, values: Tensor, scale: float) -> Tensor:
    """``scale Σ gradᵀ values``, ``(N, M)``, of ``grad (T, B, N)`` and ``values (1 or 4, T * B, M)``.

    ``(S, N, M)`` where the call tells ``S`` groups of rows apart: a product a group.
    """
    steps, rows, width = grad.shape
    groups = layer.gradient_groups

    def of_groups(value: Tensor) -> Tensor:
        if not groups:
            return value.reshape(steps * rows, -1)
        by_group = value.reshape(steps, groups, rows // groups, -1).transpose(0, 1)
        return by_group.reshape(groups, steps * (rows // groups), -1)

    gates = grad.chunk(values.shape[0], 2)
    parts = [
        wide_product(of_groups(gate).transpose(-2, -1), of_groups(value))
        for gate, value in zip(gates, values, strict=True)
    ]
    product = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
    return product.mul_(scale).to(grad.dtype)


def recurrent_weight_gradient(layer: Layer, grad_recurrent: Tensor, previous: Tensor) -> Tensor:
    """``dW_hh`` from ``da`` and what :func:`previous_hidden` made."""
    gradient = weight_gradient(layer, grad_recurrent, previous, layer.rates.recurrent_scale)
    if not layer.drawn_weight:
        return gradient
    if not layer.gradient_groups:
        return masked_weight(layer._replace(tensors=layer.tensors._replace(weight_hh=gradient)))
    ones = torch.ones_like(layer.tensors.weight_hh)
    mask = masked_weight(layer._replace(tensors=layer.tensors._replace(weight_hh=ones)))
    return torch.where(mask != 0.0, gradient, 0.0)


def input_gradient(layer: Layer, grad_input_gates: Tensor) -> Tensor:
    """``dx (T, B, I)`` from ``dr (T, B, 4H)`` in the storage type."""
    tensors, (steps, rows, *_) = layer.tensors, layer.sizes
    weight, grad = tensors.weight_ih, grad_input_gates.flatten(0, 1)
    width = weight.shape[1]
    if layer.untied_input:
        gates = zip(grad.chunk(4, 1), weight.chunk(4), strict=True)
        products = torch.stack([wide_product(gate.contiguous(), rows_of_gate) for gate, rows_of_gate in gates])
        mask = UNTIED.value
    else:
        products = wide_product(grad, weight)
        mask = TIED.value if layer.drawn_input else 0
    result = torch.empty(steps, rows, width, dtype=weight.dtype, device=weight.device)
    input_gradient_kernel[(triton.cdiv(steps * rows, _ROWS), triton.cdiv(width, _COLUMNS))](
        products,
        result,
        tensors.lengths,
        tensors.seed if mask else None,
        steps,
        rows,
        layer.sizes.group_rows,
        layer.rates.stream,
        threshold(layer.raw_rates[1]),
        layer.input_scale,
        width,
        mask,
        layer.flags.grouped_seed,
        _ROWS,
        _COLUMNS,
        **FUSED,
    )
    return result
