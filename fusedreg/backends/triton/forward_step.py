"""One step of the forward loop: the body that the kernel of a step and the persistent kernel share.

A program owns some units, all four gates of them, for some rows. Without a norm a tile of rows goes straight from the
product to the results. A batch norm's statistics are a program's own, since it then owns its units for every row; it
passes over its tiles once for each quantity that the next pass needs. A layer norm's are a row's: the product is one
stage (:func:`product_of_units`), and what follows another (forward_rows.py), in which a program owns whole rows.

The body keeps the carried ``h`` and ``c`` where the final ones are returned, and hands ``h``, masked by hidden
dropout, to the next step through ``exchange``: step ``s`` reads half ``s % 2`` and writes the other.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.forward_cell import (
    draw_drops,
    draw_masks,
    finish_states,
    hand_on,
    keep_gates,
    load_states,
    load_terms,
    store_raw,
    store_states,
    tile_order,
)
from fusedreg.backends.triton.forward_norm import (
    gain_over_deviation,
    parameter,
    population,
    store_moments,
    valid_rows,
)
from fusedreg.backends.triton.jit_cell import begin_cell
from fusedreg.backends.triton.jit_grid import arrive, wait_for
from fusedreg.backends.triton.jit_storage import dot, sum_of_pieces, tile_columns
from fusedreg.backends.triton.jit_tile import UNTIED


@triton.jit
def load_weight(gate, units, first_column, tensors, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of one gate's rows of ``W_hh``, turned: ``(columns, units)``, or ``(split, columns, units)``."""
    size: tl.constexpr = LAYER.hidden_size
    depth: tl.constexpr = LAYER.projected_size
    columns = tile_columns(first_column, BLOCK)
    row = (gate * size + units).to(tl.int64) * depth
    if BLOCK.split > 1:
        inside = (units < size)[None, :, None] & (columns < depth)[:, None, :]
        weight = tensors.inputs.weight_hh + row[None, :, None] + columns[:, None, :]
        tile = tl.permute(tl.load(weight, mask=inside, other=0.0), (0, 2, 1))
    else:
        inside = (units < size)[:, None] & (columns < depth)[None, :]
        weight = tensors.inputs.weight_hh + row[:, None] + columns[None, :]
        tile = tl.trans(tl.load(weight, mask=inside, other=0.0))
    return tile


@triton.jit
def resident_weights(units, tensors, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """Every tile of ``W_hh`` that a program with these units ever needs, to be held over all steps; or nothing."""
    tiles = ()
    depth: tl.constexpr = LAYER.projected_size
    width: tl.constexpr = BLOCK.columns
    if BLOCK.resident:
        for chunk in tl.static_range(0, depth, width):
            for gate in tl.static_range(4):
                tiles = tiles + (load_weight(gate, units, chunk, tensors, LAYER, BLOCK),)  # type: ignore[assignment]
    return tiles


@triton.jit
def exchanged(start, first_column, live, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of the masked ``h_{s-1}``: written by other programs, so never from this one's own cache."""
    columns = tile_columns(first_column, BLOCK)
    if BLOCK.split > 1:
        inside = live[None, :, None] & (columns < LAYER.projected_size)[:, None, :]
        hidden = start[None, :, None] + columns[:, None, :]
    else:
        inside = live[:, None] & (columns < LAYER.projected_size)[None, :]
        hidden = start[:, None] + columns[None, :]
    return tl.load(hidden, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def exchanged_copies(start, copy, first_column, live, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of the masked ``h_{s-1}`` for each gate: the same, or with untied masks one each."""
    h_i = exchanged(start, first_column, live, LAYER, BLOCK)
    if LAYER.hidden_dropout == UNTIED:
        h_f = exchanged(start + copy, first_column, live, LAYER, BLOCK)
        h_g = exchanged(start + 2 * copy, first_column, live, LAYER, BLOCK)
        h_o = exchanged(start + 3 * copy, first_column, live, LAYER, BLOCK)
    else:
        h_f = h_i
        h_g = h_i
        h_o = h_i
    return h_i, h_f, h_g, h_o


@triton.jit
def add_products(a_i, a_f, a_g, a_o, h, w_i, w_f, w_g, w_o, PRECISION: tl.constexpr):
    """Add the products of one tile of columns to the four gates' sums."""
    return (
        dot(h[0], w_i, a_i, PRECISION),
        dot(h[1], w_f, a_f, PRECISION),
        dot(h[2], w_g, a_g, PRECISION),
        dot(h[3], w_o, a_o, PRECISION),
    )


@triton.jit
def recurrent_product(s, rows, units, live, tiles, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """``a^k = (m_h^k ⊙ h_{s-1}) W̃^kᵀ`` of a tile, in float32, for the four gates; 0 in rows that are not ``live``."""
    depth: tl.constexpr = LAYER.projected_size
    copies: tl.constexpr = 4 if LAYER.hidden_dropout == UNTIED else 1
    copy = numbers.sizes.rows.to(tl.int64) * depth
    start = tensors.state.exchange + (s % 2) * (copies * copy) + rows.to(tl.int64) * depth
    split: tl.constexpr = BLOCK.split
    if split > 1:
        a_i = tl.zeros([split, rows.shape[0], units.shape[0]], tl.float32)
    else:
        a_i = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
    a_f = a_i
    a_g = a_i
    a_o = a_i
    precision: tl.constexpr = BLOCK.precision
    if BLOCK.resident:
        chunks: tl.constexpr = (depth + BLOCK.columns - 1) // BLOCK.columns
        coming = exchanged_copies(start, copy, 0, live, LAYER, BLOCK)
        for index in tl.static_range(chunks):
            h = coming
            if index + 1 < chunks:  # asked for before the product of the tile before it
                coming = exchanged_copies(start, copy, (index + 1) * BLOCK.columns, live, LAYER, BLOCK)
            w_i, w_f, w_g, w_o = tiles[4 * index], tiles[4 * index + 1], tiles[4 * index + 2], tiles[4 * index + 3]
            a_i, a_f, a_g, a_o = add_products(a_i, a_f, a_g, a_o, h, w_i, w_f, w_g, w_o, precision)
    else:
        for chunk in range(0, depth, BLOCK.columns):
            w_i = load_weight(0, units, chunk, tensors, LAYER, BLOCK)
            w_f = load_weight(1, units, chunk, tensors, LAYER, BLOCK)
            w_g = load_weight(2, units, chunk, tensors, LAYER, BLOCK)
            w_o = load_weight(3, units, chunk, tensors, LAYER, BLOCK)
            h = exchanged_copies(start, copy, chunk, live, LAYER, BLOCK)
            a_i, a_f, a_g, a_o = add_products(a_i, a_f, a_g, a_o, h, w_i, w_f, w_g, w_o, precision)
    a_i = sum_of_pieces(a_i, split)
    a_f = sum_of_pieces(a_f, split)
    a_g = sum_of_pieces(a_g, split)
    a_o = sum_of_pieces(a_o, split)
    scale = numbers.rates.recurrent_scale
    return a_i * scale, a_f * scale, a_g * scale, a_o * scale


@triton.jit
def product_of_units(s, units, first_row, last_row, tiles, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """The first stage of a step with a layer norm: a program's columns of the raw ``a``."""
    first = first_row
    while first < last_row:
        rows = first + tl.arange(0, BLOCK.rows)
        valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
        a_i, a_f, a_g, a_o = recurrent_product(s, rows, units, valid & ~resets, tiles, tensors, numbers, LAYER, BLOCK)
        store_raw(a_i, a_f, a_g, a_o, rows, units, valid, position, tensors, numbers, LAYER)
        first += BLOCK.rows


@triton.jit
def step_of_units(
    s, units, first_row, last_row, arrivals, target, tiles, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    """A whole step of some units and rows, where no norm needs more of the batch than the tile at hand.

    Without a norm, or with one of the input's term alone; a batch norm in evaluation too, whose statistics are known.
    """
    eps = numbers.rates.eps
    known = units < LAYER.hidden_size
    if LAYER.norm_recurrent or LAYER.norm_cell:
        count = valid_rows(s, tensors, numbers, LAYER, BLOCK.rows)
    if LAYER.norm_recurrent:
        mean_i, scale_i = known_norm(s, 0, units, known, count, eps, tensors, numbers, LAYER)
        mean_f, scale_f = known_norm(s, 1, units, known, count, eps, tensors, numbers, LAYER)
        mean_g, scale_g = known_norm(s, 2, units, known, count, eps, tensors, numbers, LAYER)
        mean_o, scale_o = known_norm(s, 3, units, known, count, eps, tensors, numbers, LAYER)
    if LAYER.norm_cell:
        cell_mean, cell_var = population(
            s, tensors.inputs.cell_mean, tensors.inputs.cell_var, units, known, LAYER.hidden_size, tensors, numbers
        )
        store_moments(s, tensors.results.cell_statistics, count, cell_mean, cell_var, units, known, LAYER.hidden_size)
        cell_scale = gain_over_deviation(cell_var, tensors.inputs.cell_gain, units, known, eps)
        cell_shift = parameter(tensors.inputs.cell_shift, units, known)
    if BLOCK.persistent:
        tl.debug_barrier()  # what one thread has stored of the last step's state another may load
    first = first_row
    while first < last_row:
        # Everything but the product is read and drawn before waiting for the other programs' h.
        rows = first + tl.arange(0, BLOCK.rows)
        valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
        z_i, z_f, z_g, z_o = load_terms(rows, units, valid, position, tensors, numbers, LAYER)
        previous_hidden, previous_cell = load_states(rows, units, valid, resets, tensors, LAYER)
        zone_hidden, zone_cell, update, cell, output = draw_masks(rows, units, position, tensors, numbers, LAYER)
        dropped = draw_drops(rows, units, tensors, numbers, LAYER)
        if BLOCK.persistent:
            if first == first_row:
                wait_for(arrivals, target)
        a_i, a_f, a_g, a_o = recurrent_product(s, rows, units, valid & ~resets, tiles, tensors, numbers, LAYER, BLOCK)
        if LAYER.norm_recurrent:
            z_i += (a_i - mean_i[None, :]) * scale_i[None, :]
            z_f += (a_f - mean_f[None, :]) * scale_f[None, :]
            z_g += (a_g - mean_g[None, :]) * scale_g[None, :]
            z_o += (a_o - mean_o[None, :]) * scale_o[None, :]
        else:
            z_i += a_i
            z_f += a_f
            z_g += a_g
            z_o += a_o
        i, f, g, o, candidate = begin_cell(z_i, z_f, z_g, z_o, previous_cell, update, cell)
        argument = candidate
        if LAYER.norm_cell:
            argument = (candidate - cell_mean[None, :]) * cell_scale[None, :] + cell_shift[None, :]
        hidden, new_cell, output = finish_states(
            argument, o, candidate, previous_hidden, previous_cell, zone_hidden, zone_cell, output, tensors, LAYER
        )
        hand_on((s + 1) % 2, hidden, dropped, rows, units, valid, tensors, numbers, LAYER)
        first += BLOCK.rows
        if BLOCK.persistent:
            # The others wait for h alone: count this program in before everything else is written.
            if first >= last_row:
                arrive(arrivals)
        store_states(hidden, new_cell, output, rows, units, valid, position, tensors, numbers, LAYER)
        if LAYER.norm == 0:
            keep_gates(i, f, g, o, rows, units, valid, position, tensors, numbers, LAYER)
        elif tensors.results.gates is not None:
            store_raw(a_i, a_f, a_g, a_o, rows, units, valid, position, tensors, numbers, LAYER)


@triton.jit
def known_norm(s, gate, units, known, count, eps, tensors, numbers, LAYER: tl.constexpr):
    """A gate's mean, and gain over deviation, of a recurrent batch norm in evaluation."""
    width: tl.constexpr = 4 * LAYER.hidden_size
    columns = gate * LAYER.hidden_size + units
    mean, var = population(
        s, tensors.inputs.recurrent_mean, tensors.inputs.recurrent_var, columns, known, width, tensors, numbers
    )
    store_moments(s, tensors.results.recurrent_statistics, count, mean, var, columns, known, width)
    return mean, gain_over_deviation(var, tensors.inputs.recurrent_gain, columns, known, eps)
