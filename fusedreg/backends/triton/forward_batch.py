"""A step of the forward with batch norm in training: a program owns its units for every row of the batch.

It passes over its tiles once for each quantity that the next pass needs, two passes a variance::

    a, Σ a   ->   Σ (a - mean)²   ->   c̃, o, Σ c̃   ->   Σ (c̃ - mean)²   ->   h, c

where a pass falls away with its norm. In between ``a``, ``c̃`` and ``o`` stand in memory, the program's own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.forward_cell import (
    begin_tile,
    draw_masks,
    finish_tile,
    load_cell,
    load_raw,
    load_states,
    load_terms,
    store_cell,
    store_raw,
    tile_order,
)
from fusedreg.backends.triton.forward_norm import (
    chosen_moments,
    gain_over_deviation,
    parameter,
    population,
    store_moments,
    valid_rows,
)
from fusedreg.backends.triton.forward_step import recurrent_product


@triton.jit
def column_sum(total, value, valid):
    """``total`` and the column sums of ``value`` over the valid rows."""
    return total + tl.sum(tl.where(valid[:, None], value, 0.0), 0)


@triton.jit
def column_squares(total, value, mean, valid):
    """``total`` and the column sums of the squared distance from ``mean`` over the valid rows."""
    apart = tl.where(valid[:, None], value - mean[None, :], 0.0)
    return total + tl.sum(apart * apart, 0)


@triton.jit
def products(s, units, tiles, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """Store the raw ``a`` of every row, and return its column sums, gate by gate."""
    sum_i = tl.zeros([units.shape[0]], tl.float32)
    sum_f = sum_i
    sum_g = sum_i
    sum_o = sum_i
    first = tl.full((), 0, tl.int32)
    while first < numbers.sizes.rows:
        rows = first + tl.arange(0, BLOCK.rows)
        valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
        a_i, a_f, a_g, a_o = recurrent_product(s, rows, units, valid & ~resets, tiles, tensors, numbers, LAYER, BLOCK)
        store_raw(a_i, a_f, a_g, a_o, rows, units, valid, position, tensors, numbers, LAYER)
        sum_i = column_sum(sum_i, a_i, valid)
        sum_f = column_sum(sum_f, a_f, valid)
        sum_g = column_sum(sum_g, a_g, valid)
        sum_o = column_sum(sum_o, a_o, valid)
        first += BLOCK.rows
    tl.debug_barrier()  # what one thread has stored another may load
    return sum_i, sum_f, sum_g, sum_o


@triton.jit
def squares(s, mean_i, mean_f, mean_g, mean_o, units, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of squares of the raw ``a`` around its means, gate by gate."""
    sum_i = tl.zeros([units.shape[0]], tl.float32)
    sum_f = sum_i
    sum_g = sum_i
    sum_o = sum_i
    first = tl.full((), 0, tl.int32)
    while first < numbers.sizes.rows:
        rows = first + tl.arange(0, BLOCK.rows)
        valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
        a_i, a_f, a_g, a_o = load_raw(rows, units, valid, position, tensors, numbers, LAYER)
        sum_i = column_squares(sum_i, a_i, mean_i, valid)
        sum_f = column_squares(sum_f, a_f, mean_f, valid)
        sum_g = column_squares(sum_g, a_g, mean_g, valid)
        sum_o = column_squares(sum_o, a_o, mean_o, valid)
        first += BLOCK.rows
    return sum_i, sum_f, sum_g, sum_o


@triton.jit
def gate_norm(s, gate, mean, var, count, units, tensors, numbers, LAYER: tl.constexpr):
    """A gate's mean, and gain over deviation, from the batch's moments; records what was used."""
    width: tl.constexpr = 4 * LAYER.hidden_size
    known = units < LAYER.hidden_size
    columns = gate * LAYER.hidden_size + units
    other_mean, other_var = population(
        s, tensors.inputs.recurrent_mean, tensors.inputs.recurrent_var, columns, known, width, tensors, numbers
    )
    mean, var = chosen_moments(count, mean, var, other_mean, other_var)
    store_moments(s, tensors.results.recurrent_statistics, count, mean, var, columns, known, width)
    return mean, gain_over_deviation(var, tensors.inputs.recurrent_gain, columns, known, numbers.rates.eps)


@triton.jit
def cell_squares(s, mean, units, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of squares of the candidate cells around their means."""
    total = tl.zeros([units.shape[0]], tl.float32)
    first = tl.full((), 0, tl.int32)
    while first < numbers.sizes.rows:
        rows = first + tl.arange(0, BLOCK.rows)
        valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
        candidate, o = load_cell(rows, units, valid, tensors, LAYER)
        total = column_squares(total, candidate, mean, valid)
        first += BLOCK.rows
    return total


@triton.jit
def finish_normalised(s, mean, scale, shift, units, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """The last pass: from stored candidates and output gates to the new state of every row."""
    first = tl.full((), 0, tl.int32)
    while first < numbers.sizes.rows:
        rows = first + tl.arange(0, BLOCK.rows)
        valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
        previous_hidden, previous_cell = load_states(rows, units, valid, resets, tensors, LAYER)
        zone_hidden, zone_cell, update, cell, output = draw_masks(rows, units, position, tensors, numbers, LAYER)
        candidate, o = load_cell(rows, units, valid, tensors, LAYER)
        argument = (candidate - mean[None, :]) * scale[None, :] + shift[None, :]
        finish_tile(
            s, argument, o, candidate, rows, units, valid, position, previous_hidden, previous_cell,
            zone_hidden, zone_cell, output, tensors, numbers, LAYER,
        )  # fmt: skip
        first += BLOCK.rows


@triton.jit
def batch_step_of_units(s, units, tiles, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A whole step of some units for all rows, under batch statistics of the recurrent term, the cell, or both."""
    count = valid_rows(s, tensors, numbers, LAYER, BLOCK.rows)
    divisor = tl.maximum(count, 1).to(tl.float32)
    sum_i, sum_f, sum_g, sum_o = products(s, units, tiles, tensors, numbers, LAYER, BLOCK)
    if LAYER.norm_recurrent:
        mean_i = sum_i / divisor
        mean_f = sum_f / divisor
        mean_g = sum_g / divisor
        mean_o = sum_o / divisor
        var_i, var_f, var_g, var_o = squares(s, mean_i, mean_f, mean_g, mean_o, units, tensors, numbers, LAYER, BLOCK)
        mean_i, scale_i = gate_norm(s, 0, mean_i, var_i / divisor, count, units, tensors, numbers, LAYER)
        mean_f, scale_f = gate_norm(s, 1, mean_f, var_f / divisor, count, units, tensors, numbers, LAYER)
        mean_g, scale_g = gate_norm(s, 2, mean_g, var_g / divisor, count, units, tensors, numbers, LAYER)
        mean_o, scale_o = gate_norm(s, 3, mean_o, var_o / divisor, count, units, tensors, numbers, LAYER)
    total = tl.zeros([units.shape[0]], tl.float32)
    first = tl.full((), 0, tl.int32)
    while first < numbers.sizes.rows:
        rows = first + tl.arange(0, BLOCK.rows)
        valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
        z_i, z_f, z_g, z_o = load_terms(rows, units, valid, position, tensors, numbers, LAYER)
        previous_hidden, previous_cell = load_states(rows, units, valid, resets, tensors, LAYER)
        zone_hidden, zone_cell, update, cell, output = draw_masks(rows, units, position, tensors, numbers, LAYER)
        a_i, a_f, a_g, a_o = load_raw(rows, units, valid, position, tensors, numbers, LAYER)
        if LAYER.norm_recurrent:
            a_i = (a_i - mean_i[None, :]) * scale_i[None, :]
            a_f = (a_f - mean_f[None, :]) * scale_f[None, :]
            a_g = (a_g - mean_g[None, :]) * scale_g[None, :]
            a_o = (a_o - mean_o[None, :]) * scale_o[None, :]
        o, candidate = begin_tile(
            a_i + z_i, a_f + z_f, a_g + z_g, a_o + z_o, rows, units, valid, position, previous_cell, update, cell,
            tensors, numbers, LAYER,
        )  # fmt: skip
        if LAYER.norm_cell:
            store_cell(candidate, o, rows, units, valid, tensors, LAYER)
            total = column_sum(total, candidate, valid)
        else:
            finish_tile(
                s, candidate, o, candidate, rows, units, valid, position, previous_hidden, previous_cell,
                zone_hidden, zone_cell, output, tensors, numbers, LAYER,
            )  # fmt: skip
        first += BLOCK.rows
    if LAYER.norm_cell:
        tl.debug_barrier()  # what one thread has stored another may load
        size: tl.constexpr = LAYER.hidden_size
        known = units < size
        inputs = tensors.inputs
        mean = total / divisor
        var = cell_squares(s, mean, units, tensors, numbers, LAYER, BLOCK) / divisor
        other_mean, other_var = population(s, inputs.cell_mean, inputs.cell_var, units, known, size, tensors, numbers)
        mean, var = chosen_moments(count, mean, var, other_mean, other_var)
        store_moments(s, tensors.results.cell_statistics, count, mean, var, units, known, size)
        scale = gain_over_deviation(var, inputs.cell_gain, units, known, numbers.rates.eps)
        shift = parameter(inputs.cell_shift, units, known)
        finish_normalised(s, mean, scale, shift, units, tensors, numbers, LAYER, BLOCK)
