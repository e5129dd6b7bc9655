"""The second stage of a step with layer norm in the loop: a program owns a whole row, of which the product is known.

It passes over the row's units in pieces: the sum of the ``4H`` values of ``a``, that of their squares around the mean,
then the cell; with a norm of the cell two more for the candidates' moments, and a last one to the new state.
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
    tile_order,
)
from fusedreg.backends.triton.forward_norm import parameter


@triton.jit
def store_row_moments(statistics, rows, position, mean, var, numbers):
    """What a row was normalised with, ``(T, 2, B)`` by position; 0 in padding."""
    if statistics is not None:
        present = rows < numbers.sizes.rows
        to = statistics + position.to(tl.int64) * (2 * numbers.sizes.rows) + rows
        tl.store(to, mean, mask=present)
        tl.store(to + numbers.sizes.rows, var, mask=present)


@triton.jit
def row_moments(rows, valid, position, tensors, numbers, LAYER: tl.constexpr, WIDE: tl.constexpr):
    """Mean and biased variance of a row's raw ``a (4H,)``; 0 in padding."""
    size: tl.constexpr = LAYER.hidden_size
    total = tl.zeros([rows.shape[0], WIDE], tl.float32)
    for first in range(0, size, WIDE):
        units = first + tl.arange(0, WIDE)
        a_i, a_f, a_g, a_o = load_raw(rows, units, valid, position, tensors, numbers, LAYER)
        total += (a_i + a_f) + (a_g + a_o)
    mean = tl.sum(total, 1) / (4 * size)
    squared = tl.zeros([rows.shape[0], WIDE], tl.float32)
    for first in range(0, size, WIDE):
        units = first + tl.arange(0, WIDE)
        a_i, a_f, a_g, a_o = load_raw(rows, units, valid, position, tensors, numbers, LAYER)
        apart_i = a_i - mean[:, None]
        apart_f = a_f - mean[:, None]
        apart_g = a_g - mean[:, None]
        apart_o = a_o - mean[:, None]
        sums = (apart_i * apart_i + apart_f * apart_f) + (apart_g * apart_g + apart_o * apart_o)
        squared += tl.where(valid[:, None] & (units < size)[None, :], sums, 0.0)
    return mean, tl.sum(squared, 1) / (4 * size)


@triton.jit
def candidate_squares(rows, mean, valid, tensors, LAYER: tl.constexpr, WIDE: tl.constexpr):
    """The sum of squares of a row's candidate cells around their mean."""
    squared = tl.zeros([rows.shape[0], WIDE], tl.float32)
    for first in range(0, LAYER.hidden_size, WIDE):
        units = first + tl.arange(0, WIDE)
        candidate, o = load_cell(rows, units, valid, tensors, LAYER)
        apart = candidate - mean[:, None]
        squared += tl.where(valid[:, None] & (units < LAYER.hidden_size)[None, :], apart * apart, 0.0)
    return tl.sum(squared, 1)


@triton.jit
def scaled(a, gate, mean, scale, units, tensors, LAYER: tl.constexpr):
    """``gain ⊙ (a - mean) / sqrt(var + eps)`` of one gate."""
    columns = gate * LAYER.hidden_size + units
    gain = parameter(tensors.inputs.recurrent_gain, columns, units < LAYER.hidden_size)
    return (a - mean[:, None]) * scale[:, None] * gain[None, :]


@triton.jit
def step_of_rows(s, rows, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A whole step of some rows, from their stored raw ``a``."""
    size: tl.constexpr = LAYER.hidden_size
    wide: tl.constexpr = BLOCK.wide
    eps = numbers.rates.eps
    valid, position, resets = tile_order(s, rows, tensors, numbers, LAYER)
    if LAYER.norm_recurrent:
        mean, var = row_moments(rows, valid, position, tensors, numbers, LAYER, wide)
        store_row_moments(tensors.results.recurrent_statistics, rows, position, mean, var, numbers)
        scale = 1.0 / tl.sqrt_rn(var + eps)
    total = tl.zeros([rows.shape[0], wide], tl.float32)
    for first in range(0, size, wide):
        units = first + tl.arange(0, wide)
        z_i, z_f, z_g, z_o = load_terms(rows, units, valid, position, tensors, numbers, LAYER)
        previous_hidden, previous_cell = load_states(rows, units, valid, resets, tensors, LAYER)
        zone_hidden, zone_cell, update, cell, output = draw_masks(rows, units, position, tensors, numbers, LAYER)
        a_i, a_f, a_g, a_o = load_raw(rows, units, valid, position, tensors, numbers, LAYER)
        if LAYER.norm_recurrent:
            a_i = scaled(a_i, 0, mean, scale, units, tensors, LAYER)
            a_f = scaled(a_f, 1, mean, scale, units, tensors, LAYER)
            a_g = scaled(a_g, 2, mean, scale, units, tensors, LAYER)
            a_o = scaled(a_o, 3, mean, scale, units, tensors, LAYER)
        o, candidate = begin_tile(
            a_i + z_i, a_f + z_f, a_g + z_g, a_o + z_o, rows, units, valid, position, previous_cell, update, cell,
            tensors, numbers, LAYER,
        )  # fmt: skip
        if LAYER.norm_cell:
            store_cell(candidate, o, rows, units, valid, tensors, LAYER)
            total += tl.where(valid[:, None] & (units < size)[None, :], candidate, 0.0)
        else:
            finish_tile(
                s, candidate, o, candidate, rows, units, valid, position, previous_hidden, previous_cell,
                zone_hidden, zone_cell, output, tensors, numbers, LAYER,
            )  # fmt: skip
    if LAYER.norm_cell:
        tl.debug_barrier()  # what one thread has stored another may load
        cell_mean = tl.sum(total, 1) / size
        cell_var = candidate_squares(rows, cell_mean, valid, tensors, LAYER, wide) / size
        store_row_moments(tensors.results.cell_statistics, rows, position, cell_mean, cell_var, numbers)
        cell_scale = 1.0 / tl.sqrt_rn(cell_var + eps)
        for first in range(0, size, wide):
            units = first + tl.arange(0, wide)
            known = units < size
            previous_hidden, previous_cell = load_states(rows, units, valid, resets, tensors, LAYER)
            zone_hidden, zone_cell, update, cell, output = draw_masks(rows, units, position, tensors, numbers, LAYER)
            candidate, o = load_cell(rows, units, valid, tensors, LAYER)
            gain = parameter(tensors.inputs.cell_gain, units, known)[None, :]
            shift = parameter(tensors.inputs.cell_shift, units, known)[None, :]
            argument = (candidate - cell_mean[:, None]) * cell_scale[:, None] * gain + shift
            finish_tile(
                s, argument, o, candidate, rows, units, valid, position, previous_hidden, previous_cell,
                zone_hidden, zone_cell, output, tensors, numbers, LAYER,
            )  # fmt: skip
