"""The first stage of a step of the backward with a projection: from ``dh`` to ``dh̃``, for ``P`` units.

It needs ``da`` of the step after, and the cell's stage, which goes on from ``du = dh̃ W_hr``, needs all of its ``dh̃``.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.backward_cell import pass_on_hidden, store_hidden_probe, through_hidden_zone
from fusedreg.backends.triton.backward_product import before_product, hidden_gradient
from fusedreg.backends.triton.jit_numbers import restored_numbers
from fusedreg.backends.triton.jit_storage import narrow
from fusedreg.backends.triton.jit_tile import row_order, row_resets, tile_masks


@triton.jit
def hidden_tile(s, rows, units, grad_hidden, loop, grads, sizes, rates, LAYER: tl.constexpr):
    """From ``dh`` of a tile to ``dh̃``, and what the step before is left."""
    WIDTH: tl.constexpr = LAYER.projected_size
    valid, position = row_order(s, rows, loop.lengths, sizes, LAYER.reverse)
    resets = row_resets(rows, valid, position, loop.reset, sizes)
    here = valid[:, None] & (units[None, :] < WIDTH)
    present = (rows[:, None] < sizes.rows) & (units[None, :] < WIDTH)
    at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * WIDTH + units[None, :]
    zone_hidden, _, _, _, output_mask = tile_masks(rows, units, position, loop.seed, sizes, rates, LAYER)
    of_output = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
    if grads.output is not None:
        of_output = tl.load(grads.output + at, mask=here, other=0.0).to(tl.float32) * output_mask
    store_hidden_probe(grad_hidden, of_output, rows, units, position, here, grads, sizes, LAYER)
    direct, grad_candidate = through_hidden_zone(zone_hidden, grad_hidden, of_output, LAYER)
    candidate = narrow(tl.where(here, grad_candidate, 0.0), grads.projected.dtype.element_ty)
    tl.store(grads.projected + at, candidate, mask=present)
    pass_on_hidden(s, rows, units, valid, resets, grad_hidden, direct, grads, sizes, LAYER)


@triton.jit(do_not_specialize=["s", "numbers"])
def projection_kernel(s, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """One step of a tile; at -1 what is left of step 0 is the initial state's gradient, in ``grads.direct[1]``."""
    numbers = restored_numbers(numbers)
    loop, grads, sizes, rates = tensors.inputs, tensors.grads, numbers.sizes, numbers.rates
    unit_tiles: tl.constexpr = (LAYER.projected_size + BLOCK.units - 1) // BLOCK.units
    units = tl.program_id(0) % unit_tiles * BLOCK.units + tl.arange(0, BLOCK.units)
    rows = tl.program_id(0) // unit_tiles * BLOCK.rows + tl.arange(0, BLOCK.rows)
    before = before_product(s, rows, units, loop, grads, sizes, rates, LAYER)
    grad_hidden = hidden_gradient(s, before, rows, units, (), loop, sizes, rates, LAYER, BLOCK)
    if s >= 0:
        hidden_tile(s, rows, units, grad_hidden, loop, grads, sizes, rates, LAYER)
    else:
        WIDTH: tl.constexpr = LAYER.projected_size
        present = (rows[:, None] < sizes.rows) & (units[None, :] < WIDTH)
        at = sizes.rows.to(tl.int64) * WIDTH + rows[:, None] * WIDTH + units[None, :]
        tl.store(grads.direct + at, grad_hidden, mask=present)
