"""The products of the backward loop, by tiles of rows and units.

``dh`` of a step comes from ``da`` of the step after; with a projection ``du`` from the same step's ``dh̃``.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.jit_masks import SEQUENCE, UNTIED_HIDDEN, family_words, is_below
from fusedreg.backends.triton.jit_storage import dot
from fusedreg.backends.triton.jit_tile import TIED, UNTIED, row_counters, row_order, row_resets


@triton.jit
def product_of_gate(total, sources, passing, units, gate_offset, weight, grads, DEPTH: tl.constexpr,
                    WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``total + grads weight`` over ``DEPTH`` columns of ``grads`` from ``gate_offset`` on, ``weight (·, WIDTH)``.

    ``sources`` are the rows of ``grads``.
    """
    inside = units[None, :] < WIDTH
    precision: tl.constexpr = BLOCK.precision
    for first in range(0, DEPTH, BLOCK.columns):
        columns = first + tl.arange(0, BLOCK.columns)
        a = tl.load(
            grads + sources[:, None] + gate_offset + columns[None, :],
            mask=passing[:, None] & (columns[None, :] < DEPTH),
            other=0.0,
        )
        b = tl.load(
            weight + (gate_offset + columns[:, None]) * WIDTH + units[None, :],
            mask=(columns[:, None] < DEPTH) & inside,
            other=0.0,
        )
        total = dot(a, b, total, precision)
    return total


@triton.jit
def hidden_gradient(s, rows, units, loop, grads, sizes, rates, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """``dh`` of a tile at the end of step ``s``, from ``da`` and ``direct`` of step ``s + 1``; ``s`` may be -1."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    WIDTH: tl.constexpr = LAYER.projected_size
    here = (rows[:, None] < sizes.rows) & (units[None, :] < WIDTH)
    at = ((s + 1) % 2).to(tl.int64) * sizes.rows * WIDTH + rows[:, None] * WIDTH + units[None, :]
    direct = tl.load(grads.direct + at, mask=here, other=0.0)
    if s + 1 < sizes.steps:
        valid, position = row_order(s + 1, rows, loop.lengths, sizes, LAYER.reverse)
        passing = valid & (row_resets(rows, valid, position, loop.reset, sizes) == 0)
        sources = (position.to(tl.int64) * sizes.rows + rows) * (4 * HIDDEN)
        total = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
        if LAYER.hidden_dropout == UNTIED:
            key0, key1, row, _ = row_counters(rows, loop.seed, sizes, LAYER)
            words = family_words(units[None, :], row, UNTIED_HIDDEN, rates.stream, key0, key1)
            dropped = tl.zeros([rows.shape[0], units.shape[0]], tl.int32)  # one bit a gate: words take four registers
            for gate in tl.static_range(4):
                dropped += is_below(words[gate], rates.hidden_threshold).to(tl.int32) << gate
            blank = total
            for gate in range(4):  # not unrolled: four products' addresses would fill the registers
                part = product_of_gate(blank, sources, passing, units, gate * HIDDEN, loop.weight_hh,
                                       grads.grad_recurrent, HIDDEN, WIDTH, BLOCK)  # fmt: skip
                total += tl.where((dropped >> gate) & 1 != 0, 0.0, part)
        else:
            total = product_of_gate(total, sources, passing, units, 0, loop.weight_hh, grads.grad_recurrent,
                                    4 * HIDDEN, WIDTH, BLOCK)  # fmt: skip
            if LAYER.hidden_dropout == TIED:
                key0, key1, row, _ = row_counters(rows, loop.seed, sizes, LAYER)
                words = family_words(units[None, :], row, SEQUENCE, rates.stream, key0, key1)
                total = tl.where(is_below(words[0], rates.hidden_threshold), 0.0, total)
        direct += total * rates.recurrent_scale
    return direct


@triton.jit
def activated_gradient(s, rows, units, loop, grads, sizes, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """``du = dh̃ W_hr`` of a tile of ``H`` units at step ``s``, 0 in padding; the step's ``dh̃`` is there already."""
    WIDTH: tl.constexpr = LAYER.projected_size
    valid, position = row_order(s, rows, loop.lengths, sizes, LAYER.reverse)
    sources = (position.to(tl.int64) * sizes.rows + rows) * WIDTH
    total = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
    return product_of_gate(total, sources, valid, units, 0, loop.weight_hr, grads.projected, WIDTH,
                           LAYER.hidden_size, BLOCK)  # fmt: skip


@triton.jit
def arriving_gradient(s, rows, units, loop, grads, sizes, rates, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """What a step's product brings to a tile of ``H`` units: ``dh``, or with a projection ``du``."""
    if LAYER.projected:
        grad = activated_gradient(s, rows, units, loop, grads, sizes, LAYER, BLOCK)
    else:
        grad = hidden_gradient(s, rows, units, loop, grads, sizes, rates, LAYER, BLOCK)
    return grad


@triton.jit
def keep_gradient(s, rows, units, loop, grads, sizes, rates, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """:func:`arriving_gradient`, left in ``grads.hidden`` for a later pass or as the initial state's gradient."""
    grad = arriving_gradient(s, rows, units, loop, grads, sizes, rates, LAYER, BLOCK)
    present = (rows[:, None] < sizes.rows) & (units[None, :] < LAYER.hidden_size)
    tl.store(grads.hidden + rows[:, None] * LAYER.hidden_size + units[None, :], grad, mask=present)
