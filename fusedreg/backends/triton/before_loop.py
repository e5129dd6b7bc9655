"""What stands before the recurrent loop: masked copies of ``W_hh`` and ``x``, the input's product, the biases.

::

    W̃ = M_w ⊙ W_hh                 once per call
    r^k = (m_x^k ⊙ x_t) W_ih^kᵀ    one library product over all steps, or one a gate where masks are untied

Masks are zeros and ones here, and padding is selected away; the scale of inverted dropout goes to the product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedreg.backends.triton.jit_masks import (
    INPUT,
    UNTIED_INPUT,
    family_words,
    is_below,
    load_key,
    row_key,
    threshold,
)
from fusedreg.backends.triton.jit_tile import TIED, UNTIED, weight_is_dropped
from fusedreg.backends.triton.layout import FUSED, Layer
from fusedreg.encoding import NORM_LAYER

_ROWS, _COLUMNS = 8, 128


@triton.jit(do_not_specialize=["stream", "limit"])
def mask_weight_kernel(  # type: ignore[no-untyped-def]
    weight, masked, seed, stream, limit, ROWS_IN_ALL: tl.constexpr, WIDTH: tl.constexpr, BY_ROW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``masked = M_w ⊙ weight``, zeros and ones, of a weight ``(ROWS_IN_ALL, WIDTH)``."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < ROWS_IN_ALL) & (column < WIDTH)
    key0, key1 = load_key(seed)
    dropped = weight_is_dropped(row, column, stream, limit, key0, key1, BY_ROW)
    at = row.to(tl.int64) * WIDTH + column
    # What is dropped is not read at all: 0 whatever it holds.
    tl.store(masked + at, tl.load(weight + at, mask=inside & ~dropped, other=0.0), mask=inside)


@triton.jit(
    do_not_specialize=["step_stride", "row_stride", "steps", "rows", "group_rows", "stream", "limit"],
    do_not_specialize_on_alignment=["input"],  # which may be a piece of anything
)
def mask_input_kernel(  # type: ignore[no-untyped-def]
    input, step_stride, row_stride, masked, lengths, seed, steps, rows, group_rows, stream, limit,
    WIDTH: tl.constexpr, MASK: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``masked (1 or 4, T * B, I) = m_x ⊙ x``, zeros and ones, with 0 in padding whatever that holds."""
    pair = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    pairs = steps.to(tl.int64) * rows
    inside = (pair < pairs) & (column < WIDTH)
    position, row = pair // rows, pair % rows
    wanted = inside
    if lengths is not None:
        length = tl.load(lengths + row, mask=pair < pairs, other=0)
        wanted = inside & (position < length)
    value = tl.load(input + position * step_stride + row * row_stride + column, mask=wanted, other=0.0)
    at = pair * WIDTH + column
    if MASK == 0:
        tl.store(masked + at, value, mask=inside)
    else:
        key0, key1, counted, _ = row_key(row, seed, rows, group_rows, GROUPED)
        zero = tl.zeros_like(value)
        if MASK == TIED:
            w0, w1, w2, w3 = family_words(column, counted, INPUT, stream, key0, key1)
            tl.store(masked + at, tl.where(is_below(w0, limit), zero, value), mask=inside)
        if MASK == UNTIED:
            w0, w1, w2, w3 = family_words(column, counted, UNTIED_INPUT, stream, key0, key1)
            copy = pairs * WIDTH
            tl.store(masked + at, tl.where(is_below(w0, limit), zero, value), mask=inside)
            tl.store(masked + copy + at, tl.where(is_below(w1, limit), zero, value), mask=inside)
            tl.store(masked + 2 * copy + at, tl.where(is_below(w2, limit), zero, value), mask=inside)
            tl.store(masked + 3 * copy + at, tl.where(is_below(w3, limit), zero, value), mask=inside)


def masked_weight(layer: Layer) -> Tensor:
    """``M_w ⊙ W_hh``, not scaled, contiguous: a copy, or the weight itself where nothing is dropped."""
    weight = layer.tensors.weight_hh
    if not layer.drawn_weight:
        return weight
    masked = torch.empty_like(weight)
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    mask_weight_kernel[grid](
        weight,
        masked,
        layer.tensors.seed,
        layer.rates.stream,
        threshold(layer.raw_rates[6]),
        rows,
        columns,
        layer.options[5],
        _ROWS,
        _COLUMNS,
        **FUSED,
    )
    return masked


def masked_input(layer: Layer) -> Tensor:
    """``m_x ⊙ x``, not scaled, with 0 in padding: ``(1 or 4, T * B, I)``, four copies where masks are untied."""
    tensors = layer.tensors
    input, lengths = tensors.input, tensors.lengths
    steps, rows, width = input.shape
    if lengths is None and not layer.drawn_input:
        return input.reshape(1, steps * rows, width)
    if input.stride(2) != 1:
        input = input.contiguous()
    mask = 0 if not layer.drawn_input else UNTIED.value if layer.untied_input else TIED.value
    masked = torch.empty(4 if layer.untied_input else 1, steps * rows, width, dtype=input.dtype, device=input.device)
    grid = (triton.cdiv(steps * rows, _ROWS), triton.cdiv(width, _COLUMNS))
    mask_input_kernel[grid](
        input,
        input.stride(0),
        input.stride(1),
        masked,
        lengths,
        tensors.seed if mask else None,
        steps,
        rows,
        layer.sizes.group_rows,
        layer.rates.stream,
        threshold(layer.raw_rates[1]),
        width,
        mask,
        layer.flags.grouped_seed,
        _ROWS,
        _COLUMNS,
        **FUSED,
    )
    return masked


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32, by the library, of matrices or of stacks of them.

    16-bit inputs are summed and given back unrounded: by a product of that kind where the library has one. The CPU's,
    where only the interpreter runs, and ROCm's have none and get float32 copies, in which products are exact.
    """
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cpu" or torch.version.hip is not None:
        return left.float() @ right.float()
    product = torch.mm if left.dim() == 2 else torch.bmm
    return product(left, right, out_dtype=torch.float32)


def input_product(layer: Layer, input: Tensor) -> Tensor:
    """``r (T, B, 4H)`` float32 of what :func:`masked_input` made, scales included."""
    weight = layer.tensors.weight_ih
    width = weight.shape[0]
    if input.shape[0] == 1:
        product = wide_product(input[0], weight.t())
    else:
        product = torch.empty(input.shape[1], width, dtype=torch.float32, device=input.device)
        for target, values, gate in zip(product.chunk(4, 1), input, weight.chunk(4), strict=True):
            target.copy_(wide_product(values, gate.t()))
    if layer.input_scale != 1.0:
        product.mul_(layer.input_scale)
    return product.view(layer.sizes.steps, layer.sizes.rows, width)


def summed_bias(layer: Layer) -> Tensor:
    """``(4H,)`` float32: both biases, and a layer norm's shifts of the input's and the recurrent term."""
    tensors, flags = layer.tensors, layer.flags
    shifts: list[Any] = [tensors.bias_ih, tensors.bias_hh]
    if flags.norm == NORM_LAYER:
        shifts += [tensors.norm_input_bias] if flags.norm_input else []
        shifts += [tensors.norm_recurrent_bias] if flags.norm_recurrent else []
    total = torch.zeros(4 * flags.hidden_size, dtype=torch.float32, device=tensors.input.device)
    for shift in shifts:
        if shift is not None:
            total += shift
    return total
