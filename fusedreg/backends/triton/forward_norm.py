"""The norms inside the forward loop: their statistics over rows (batch norm) or units (layer norm), and their use."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.jit_tile import mask_if, row_order


@triton.jit
def valid_rows(s, tensors, numbers, LAYER: tl.constexpr, ROWS: tl.constexpr):
    """``n_s``: how many rows take part in step ``s``."""
    if tensors.inputs.lengths is None:
        count = numbers.sizes.rows.to(tl.int32)
    else:
        counted = tl.zeros([ROWS], tl.int32)
        first = tl.full((), 0, tl.int32)
        while first < numbers.sizes.rows:
            rows = first + tl.arange(0, ROWS)
            valid, position = row_order(s, rows, tensors.inputs.lengths, numbers.sizes, LAYER.reverse)
            counted += valid.to(tl.int32)
            first += ROWS
        count = tl.sum(counted, 0)
    return count


@triton.jit
def population(s, mean, var, columns, known, WIDTH: tl.constexpr, tensors, numbers):
    """The running mean and variance of columns at step ``s``; 0 and 1 where nothing was counted."""
    none = tl.zeros([columns.shape[0]], tl.float32)
    if mean is None or tensors.inputs.running_index is None:
        return none, none + 1.0
    # Not checked before: an index past the rows must not read past them.
    row = tl.minimum(tl.load(tensors.inputs.running_index + s), numbers.sizes.running_rows - 1)
    counted = mask_if(row >= 0, known)
    at = row.to(tl.int64) * WIDTH + columns
    return tl.load(mean + at, mask=counted, other=0.0), tl.load(var + at, mask=counted, other=1.0)


@triton.jit
def chosen_moments(count, mean, var, population_mean, population_var):
    """The batch's own from two rows on, else the population's."""
    own = count >= 2
    return tl.where(own, mean, population_mean), tl.where(own, var, population_var)


@triton.jit
def store_moments(s, statistics, count, mean, var, columns, known, WIDTH: tl.constexpr):
    """What step ``s`` was normalised with, ``(T, 2, WIDTH)``; 0 at a step that no row reaches."""
    if statistics is not None:
        to = statistics + tl.cast(s, tl.int64) * (2 * WIDTH) + columns
        reached = count >= 1
        tl.store(to, tl.where(reached, mean, 0.0), mask=known)
        tl.store(to + WIDTH, tl.where(reached, var, 0.0), mask=known)


@triton.jit
def gain_over_deviation(var, gain, columns, known, eps):
    """``gain / sqrt(var + eps)``, by column."""
    return parameter(gain, columns, known) / tl.sqrt_rn(var + eps)


@triton.jit
def parameter(values, columns, known):
    """A norm's gain or shift by column, in float32."""
    return tl.load(values + columns, mask=known, other=0.0).to(tl.float32)
