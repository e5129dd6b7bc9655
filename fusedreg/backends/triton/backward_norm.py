"""The norms of the backward loop: what they normalised with, and the way back through them."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.jit_tile import NORM_BATCH


@triton.jit
def norm_scales(variance, eps, of_batch):
    """``1 / sqrt(variance + eps)``, and what a difference from the mean is multiplied with.

    The second is 0 where the values that gave the variance have no spread: their normalised value is exactly 0, also
    where a value that was computed anew differs in its last bit.
    """
    scale = 1.0 / tl.sqrt_rn(variance + eps)
    return scale, tl.where((variance > 0.0) | (of_batch == 0), scale, 0.0)


@triton.jit
def averaged_rows(s, grads, LAYER: tl.constexpr):
    """The rows that step ``s`` averages over on the way back; 0 where its statistics are constants."""
    if LAYER.batch_statistics:
        count = tl.load(grads.counts + s)
        of_batch = tl.where(count >= 2, count, 0)
    else:
        of_batch = s * 0
    return of_batch


@triton.jit
def column_moments(statistics, s, columns, inside, WIDTH: tl.constexpr):
    """A batch norm's mean and variance of some columns at step ``s``."""
    at = s.to(tl.int64) * 2 * WIDTH + columns
    return tl.load(statistics + at, mask=inside, other=0.0), tl.load(statistics + at + WIDTH, mask=inside, other=1.0)


@triton.jit
def row_moments(statistics, rows, valid, position, sizes):
    """A layer norm's mean and variance of some rows, each at its position."""
    at = position.to(tl.int64) * 2 * sizes.rows + rows
    return tl.load(statistics + at, mask=valid, other=0.0), tl.load(statistics + at + sizes.rows, mask=valid, other=1.0)


@triton.jit
def moments(statistics, s, rows, valid, position, columns, inside, of_batch, sizes, rates, KIND: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    """Either norm's mean, and :func:`norm_scales`, in a shape that broadcasts against a tile."""
    if KIND == NORM_BATCH:
        mean, variance = column_moments(statistics, s, columns, inside, WIDTH)
        scale, spread = norm_scales(variance, rates.eps, of_batch)
        mean, scale, spread = mean[None, :], scale[None, :], spread[None, :]
    else:
        mean, variance = row_moments(statistics, rows, valid, position, sizes)
        scale, spread = norm_scales(variance, rates.eps, 1)
        mean, scale, spread = mean[:, None], scale[:, None], spread[:, None]
    return mean, scale, spread


@triton.jit
def recurrent_term(gate: tl.constexpr, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates,
                   LAYER: tl.constexpr):  # fmt: skip
    """One gate's raw ``a`` normalised but for its gain, the gain, and the norm's scale; ``a``, 1 and 1 without it."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    columns = gate * HIDDEN + units
    inside = units < HIDDEN
    at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * (4 * HIDDEN) + columns[None, :]
    term = tl.load(saved.gates + at, mask=here, other=0.0)
    gain = tl.full([1, units.shape[0]], 1.0, tl.float32)
    scale = gain
    if LAYER.norm_recurrent:
        mean, scale, spread = moments(saved.recurrent_statistics, s, rows, valid, position, columns, inside, of_batch,
                                      sizes, rates, LAYER.norm, 4 * HIDDEN)  # fmt: skip
        term = tl.where(here, (term - mean) * spread, 0.0)
        gain = tl.load(loop.recurrent_gain + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return term, gain, scale


@triton.jit
def pre_activation(gate: tl.constexpr, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates,
                   LAYER: tl.constexpr):  # fmt: skip
    """``z`` of one gate, from the raw ``a`` and the input's term."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    columns = gate * HIDDEN + units
    at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * (4 * HIDDEN) + columns[None, :]
    term, gain, _ = recurrent_term(gate, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates,
                                   LAYER)  # fmt: skip
    bias = tl.load(loop.bias + columns, mask=units < HIDDEN, other=0.0)
    return term * gain + (tl.load(loop.input_terms + at, mask=here, other=0.0) + bias[None, :])


@triton.jit
def cell_term(candidate, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates,
              LAYER: tl.constexpr):  # fmt: skip
    """``N_c``: its argument normalised but for gain and shift, its result, its gain and its scale."""
    normalised = candidate
    argument = candidate
    gain = tl.full([1, units.shape[0]], 1.0, tl.float32)
    scale = gain
    if LAYER.norm_cell:
        inside = units < LAYER.hidden_size
        mean, scale, spread = moments(saved.cell_statistics, s, rows, valid, position, units, inside, of_batch, sizes,
                                      rates, LAYER.norm, LAYER.hidden_size)  # fmt: skip
        normalised = tl.where(here, (candidate - mean) * spread, 0.0)
        gain = tl.load(loop.cell_gain + units, mask=inside, other=0.0).to(tl.float32)[None, :]
        argument = normalised * gain + tl.load(loop.cell_shift + units, mask=inside, other=0.0).to(tl.float32)[None, :]
    return normalised, argument, gain, scale
