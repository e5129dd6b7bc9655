"""The last stage of a step with a projection: ``h̃ = u W_hrᵀ``, and from there to ``h`` and ``y``.

It follows the kernel, or kernels, of the cell, which leave ``u = o tanh(N_c(c̃))`` of the step; a program owns a tile
of rows and of the ``P`` projected units.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.forward_cell import (
    draw_drops,
    draw_masks,
    finish_hidden,
    load_hidden,
    publish,
    store_hidden,
    tile_order,
)
from fusedreg.backends.triton.jit_cell import zoned
from fusedreg.backends.triton.jit_numbers import restored_numbers
from fusedreg.backends.triton.jit_storage import dot, narrow


@triton.jit
def projected(rows, units, valid, tensors, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """``u W_hrᵀ`` of a tile, in float32; 0 in padding.

    In a 16-bit storage type ``u`` goes into the product as the sum of two: ``h`` is rounded already, and rounding both
    would be an error that a product in float32 does not have.
    """
    storage: tl.constexpr = tensors.inputs.weight_hr.dtype.element_ty
    depth: tl.constexpr = LAYER.hidden_size
    precision: tl.constexpr = BLOCK.precision
    start = tensors.state.activated + rows.to(tl.int64) * depth
    weight = tensors.inputs.weight_hr + units.to(tl.int64) * depth
    total = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
    for first in range(0, depth, BLOCK.columns):
        columns = first + tl.arange(0, BLOCK.columns)
        known = (columns < depth)[None, :]
        u = tl.load(start[:, None] + columns[None, :], mask=valid[:, None] & known, other=0.0)
        inside = (units < LAYER.projected_size)[:, None] & known
        w = tl.trans(tl.load(weight[:, None] + columns[None, :], mask=inside, other=0.0))
        high = narrow(u, storage)
        if storage != tl.float32:
            total = dot(narrow(u - high.to(tl.float32), storage), w, total, precision)
        total = dot(high, w, total, precision)
    return total


@triton.jit(do_not_specialize=["s", "numbers"])
def projection_kernel(s, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """One step of a tile of rows and projected units."""
    numbers = restored_numbers(numbers)
    unit_tiles: tl.constexpr = (LAYER.projected_size + BLOCK.units - 1) // BLOCK.units
    units = tl.program_id(0) % unit_tiles * BLOCK.units + tl.arange(0, BLOCK.units)
    rows = tl.program_id(0) // unit_tiles * BLOCK.rows + tl.arange(0, BLOCK.rows)
    valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
    previous = load_hidden(rows, units, valid, resets, tensors, LAYER)
    zone_hidden, _, _, _, output_mask = draw_masks(rows, units, position, tensors, numbers, LAYER)
    candidate = projected(rows, units, valid, tensors, LAYER, BLOCK)
    hidden = zoned(zone_hidden, previous, candidate)
    hidden, output = finish_hidden(hidden, candidate, output_mask, tensors, LAYER)
    storage: tl.constexpr = tensors.results.output.dtype.element_ty
    dropped = draw_drops(rows, units, tensors, numbers, LAYER)
    publish((s + 1) % 2, narrow(hidden, storage), dropped, rows, units, valid, tensors, numbers, LAYER)
    store_hidden(hidden, output, rows, units, valid, position, tensors, numbers, LAYER)
