"""The products of the backward loop, by tiles of rows and units.

``dh`` of a step comes from ``da`` of the step after; with a projection ``du`` from the same step's ``dh̃``. Weights are
turned around here, ``W_hh (P, 4H)`` and ``W_hr (H, P)``, so that what a product adds up over stands side by side.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.jit_storage import dot, sum_of_pieces, tile_columns
from fusedreg.backends.triton.jit_tile import TIED, UNTIED, hidden_drops, mask_if, row_order, row_resets


@triton.jit
def weight_tile(weight, units, first, offset, DEPTH: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """A tile of ``weight (WIDTH, ROW)``, turned: ``(columns, units)``, or ``(split, columns, units)``.

    Its columns count from ``offset`` and end after ``DEPTH``.
    """
    columns = tile_columns(first, BLOCK)
    row = weight + units.to(tl.int64) * ROW + offset
    if BLOCK.split > 1:
        inside = (units < WIDTH)[None, :, None] & (columns < DEPTH)[:, None, :]
        tile = tl.permute(tl.load(row[None, :, None] + columns[:, None, :], mask=inside, other=0.0), (0, 2, 1))
    else:
        inside = (units < WIDTH)[:, None] & (columns < DEPTH)[None, :]
        tile = tl.trans(tl.load(row[:, None] + columns[None, :], mask=inside, other=0.0))
    return tile


@triton.jit
def gradient_tile(rows, passing, first, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of what other programs wrote: ``rows`` points to its rows; 0 in those that are not ``passing``."""
    columns = tile_columns(first, BLOCK)
    if BLOCK.split > 1:
        inside = passing[None, :, None] & (columns < DEPTH)[:, None, :]
        tile = tl.load(rows[None, :, None] + columns[:, None, :], mask=inside, other=0.0, cache_modifier=".cg")
    else:
        inside = passing[:, None] & (columns < DEPTH)[None, :]
        tile = tl.load(rows[:, None] + columns[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    return tile


@triton.jit
def no_sum(rows, units, BLOCK: tl.constexpr):
    """What a product starts from."""
    split: tl.constexpr = BLOCK.split
    if split > 1:
        total = tl.zeros([split, rows.shape[0], units.shape[0]], tl.float32)
    else:
        total = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
    return total


@triton.jit
def held_weights(units, weight, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """Every tile of ``W_hh`` that a program with these units ever needs, to be held over all steps; or nothing."""
    tiles = ()
    gates: tl.constexpr = 4 if LAYER.hidden_dropout == UNTIED else 1
    depth: tl.constexpr = 4 * LAYER.hidden_size // gates
    width: tl.constexpr = BLOCK.columns
    if BLOCK.resident:
        for gate in tl.static_range(gates):
            for first in tl.static_range(0, depth, width):
                tile = weight_tile(
                    weight, units, first, gate * depth, depth, 4 * LAYER.hidden_size, LAYER.projected_size, BLOCK
                )
                tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def held_product(total, rows, passing, tiles, FIRST_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """``total`` and the product with the tiles of :func:`held_weights` from ``FIRST_TILE`` on.

    Each tile of gradients is asked for before the product of the one before it.
    """
    precision: tl.constexpr = BLOCK.precision
    chunks: tl.constexpr = (DEPTH + BLOCK.columns - 1) // BLOCK.columns
    coming = gradient_tile(rows, passing, 0, DEPTH, BLOCK)
    for index in tl.static_range(chunks):
        a = coming
        if index + 1 < chunks:
            coming = gradient_tile(rows, passing, (index + 1) * BLOCK.columns, DEPTH, BLOCK)
        total = dot(a, tiles[FIRST_TILE + index], total, precision)
    return total


@triton.jit
def product_of_gate(total, rows, passing, units, offset, weight, DEPTH: tl.constexpr, ROW: tl.constexpr,
                    WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``total`` and the product of ``DEPTH`` columns of gradients with ``weight (WIDTH, ROW)``, turned."""
    precision: tl.constexpr = BLOCK.precision
    for first in range(0, DEPTH, BLOCK.columns):
        a = gradient_tile(rows, passing, first, DEPTH, BLOCK)
        b = weight_tile(weight, units, first, offset, DEPTH, ROW, WIDTH, BLOCK)
        total = dot(a, b, total, precision)
    return total


@triton.jit
def before_product(s, rows, units, loop, grads, sizes, rates, LAYER: tl.constexpr):
    """What :func:`hidden_gradient` takes of a tile that does not wait for others' ``da``.

    ``direct``, which rows pass the product on and where their ``da`` stands, and what hidden dropout drops.
    """
    HIDDEN: tl.constexpr = LAYER.hidden_size
    WIDTH: tl.constexpr = LAYER.projected_size
    here = (rows[:, None] < sizes.rows) & (units[None, :] < WIDTH)
    at = ((s + 1) % 2).to(tl.int64) * sizes.rows * WIDTH + rows[:, None] * WIDTH + units[None, :]
    direct = tl.load(grads.direct + at, mask=here, other=0.0)
    valid, position = row_order(s + 1, rows, loop.lengths, sizes, LAYER.reverse)
    valid = mask_if(s + 1 < sizes.steps, valid)
    passing = valid & (row_resets(rows, valid, position, loop.reset, sizes) == 0)
    sources = grads.grad_recurrent + (position.to(tl.int64) * sizes.rows + rows) * (4 * HIDDEN)
    return direct, passing, sources, hidden_drops(rows, units, loop.seed, sizes, rates, LAYER)


@triton.jit
def hidden_gradient(s, before, rows, units, tiles, loop, sizes, rates, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """``dh`` of a tile at the end of step ``s``, from ``da`` and ``direct`` of step ``s + 1``; ``s`` may be -1."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    WIDTH: tl.constexpr = LAYER.projected_size
    direct, passing, sources, dropped = before
    if s + 1 < sizes.steps:
        blank = no_sum(rows, units, BLOCK)
        weight = loop.weight_hh
        if LAYER.hidden_dropout == UNTIED:
            total = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
            if BLOCK.resident:
                chunks: tl.constexpr = (HIDDEN + BLOCK.columns - 1) // BLOCK.columns
                for gate in tl.static_range(4):
                    part = held_product(blank, sources + gate * HIDDEN, passing, tiles, gate * chunks, HIDDEN, BLOCK)
                    total += tl.where((dropped >> gate) & 1 != 0, 0.0, sum_of_pieces(part, BLOCK.split))
            else:
                for gate in range(4):  # not unrolled: four products' addresses would fill the registers
                    part = product_of_gate(blank, sources + gate * HIDDEN, passing, units, gate * HIDDEN, weight,
                                           HIDDEN, 4 * HIDDEN, WIDTH, BLOCK)  # fmt: skip
                    total += tl.where((dropped >> gate) & 1 != 0, 0.0, sum_of_pieces(part, BLOCK.split))
        else:
            if BLOCK.resident:
                part = held_product(blank, sources, passing, tiles, 0, 4 * HIDDEN, BLOCK)
            else:
                part = product_of_gate(blank, sources, passing, units, 0, weight, 4 * HIDDEN, 4 * HIDDEN, WIDTH, BLOCK)
            total = sum_of_pieces(part, BLOCK.split)
            if LAYER.hidden_dropout == TIED:
                total = tl.where(dropped != 0, 0.0, total)
        direct += total * rates.recurrent_scale
    return direct


@triton.jit
def activated_gradient(s, rows, units, loop, grads, sizes, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """``du = dh̃ W_hr`` of a tile of ``H`` units at step ``s``, 0 in padding; the step's ``dh̃`` is there already."""
    WIDTH: tl.constexpr = LAYER.projected_size
    valid, position = row_order(s, rows, loop.lengths, sizes, LAYER.reverse)
    sources = grads.projected + (position.to(tl.int64) * sizes.rows + rows) * WIDTH
    part = product_of_gate(no_sum(rows, units, BLOCK), sources, valid, units, 0, loop.weight_hr, WIDTH, WIDTH,
                           LAYER.hidden_size, BLOCK)  # fmt: skip
    return sum_of_pieces(part, BLOCK.split)


@triton.jit
def arriving_gradient(s, before, rows, units, tiles, loop, grads, sizes, rates, LAYER: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    """What a step's product brings to a tile of ``H`` units: ``dh``, or with a projection ``du``."""
    if LAYER.projected:
        grad = activated_gradient(s, rows, units, loop, grads, sizes, LAYER, BLOCK)
    else:
        grad = hidden_gradient(s, before, rows, units, tiles, loop, sizes, rates, LAYER, BLOCK)
    return grad


@triton.jit
def keep_gradient(s, rows, units, tiles, loop, grads, sizes, rates, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """:func:`arriving_gradient`, left in ``grads.hidden`` for a later pass or as the initial state's gradient."""
    before = before_product(s, rows, units, loop, grads, sizes, rates, LAYER)
    grad = arriving_gradient(s, before, rows, units, tiles, loop, grads, sizes, rates, LAYER, BLOCK)
    present = (rows[:, None] < sizes.rows) & (units[None, :] < LAYER.hidden_size)
    tl.store(grads.hidden + rows[:, None] * LAYER.hidden_size + units[None, :], grad, mask=present)
