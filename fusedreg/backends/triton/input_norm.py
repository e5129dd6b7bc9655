"""``N_r``: the norm of the input's term, which is known for all steps before the loop starts.

Batch norm in training takes the statistics of a step's valid rows, ``n_s`` of them: 2 or more give their own, one
takes the population's, none gives 0. Pooled over the sequence, the steps' means and variances are combined by Chan's
formula (Chan, Golub and LeVeque 1983). Layer norm takes a row's ``4H`` values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedreg.backends.triton.configurations import whole_rows, wide_columns
from fusedreg.backends.triton.jit_numbers import packed_sizes, restored_sizes
from fusedreg.backends.triton.jit_tile import row_order
from fusedreg.backends.triton.layout import FUSED, Layer, Sizes
from fusedreg.encoding import NORM_BATCH, NORM_LAYER

_COLUMNS, _ROWS = 64, 32


@triton.jit(do_not_specialize=["sizes"])
def batch_moments_kernel(  # type: ignore[no-untyped-def]
    values, moments, lengths, sizes, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of ``values (T, B, WIDTH)`` over the valid rows of each step, ``(T, 2, WIDTH)``."""
    sizes = restored_sizes(sizes)
    s = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    first = tl.full((), 0, tl.int32)
    while first < sizes.rows:
        rows = first + tl.arange(0, ROWS)
        valid, position = row_order(s, rows, lengths, sizes, REVERSE)
        at = (position.to(tl.int64) * sizes.rows + rows) * WIDTH
        value = tl.load(values + at[:, None] + columns[None, :], mask=valid[:, None] & (columns < WIDTH), other=0.0)
        total += tl.sum(value, 0)
        count += tl.where(valid, 1.0, 0.0)
        first += ROWS
    divisor = tl.maximum(tl.sum(count, 0), 1.0)
    mean = total / divisor
    squares = tl.zeros([COLUMNS], tl.float32)
    first = tl.full((), 0, tl.int32)
    while first < sizes.rows:
        rows = first + tl.arange(0, ROWS)
        valid, position = row_order(s, rows, lengths, sizes, REVERSE)
        at = (position.to(tl.int64) * sizes.rows + rows) * WIDTH
        value = tl.load(values + at[:, None] + columns[None, :], mask=valid[:, None] & (columns < WIDTH), other=0.0)
        centred = tl.where(valid[:, None], value - mean[None, :], 0.0)
        squares += tl.sum(centred * centred, 0)
        first += ROWS
    at = moments + s.to(tl.int64) * 2 * WIDTH + columns
    tl.store(at, mean, mask=columns < WIDTH)
    tl.store(at + WIDTH, squares / divisor, mask=columns < WIDTH)


@triton.jit(do_not_specialize=["rows", "steps"])
def row_moments_kernel(  # type: ignore[no-untyped-def]
    values, moments, lengths, steps, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Mean and biased variance of each row of ``values (T, B, WIDTH)``: ``(T, 2, B)``, 0 in padding."""
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    position, row = pair // rows, pair % rows
    present = position < steps
    valid = present
    if lengths is not None:
        valid = present & (position < tl.load(lengths + row, mask=present, other=0))
    at = values + (pair * WIDTH)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        columns = (first + tl.arange(0, COLUMNS))[None, :]
        total += tl.load(at + columns, mask=valid[:, None] & (columns < WIDTH), other=0.0)
    mean = tl.sum(total, 1) / WIDTH
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        columns = (first + tl.arange(0, COLUMNS))[None, :]
        inside = valid[:, None] & (columns < WIDTH)
        centred = tl.where(inside, tl.load(at + columns, mask=inside, other=0.0) - mean[:, None], 0.0)
        squares += centred * centred
    to = moments + position * 2 * rows + row
    tl.store(to, tl.where(valid, mean, 0.0), mask=present)
    tl.store(to + rows, tl.where(valid, tl.sum(squares, 1) / WIDTH, 0.0), mask=present)


@triton.jit(do_not_specialize=["steps", "rows", "eps"])
def apply_kernel(  # type: ignore[no-untyped-def]
    values, terms, moments, gain, lengths, steps, rows, eps, WIDTH: tl.constexpr, BY_ROW: tl.constexpr,
    POOLED: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``terms = gain ⊙ (values - mean) / sqrt(var + eps)``, 0 in padding; may write where it reads."""
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pairs = steps.to(tl.int64) * rows
    inside = (pair < pairs)[:, None] & (columns < WIDTH)[None, :]
    position, row = pair // rows, pair % rows
    length = position * 0 + steps
    if lengths is not None:
        length = tl.load(lengths + row, mask=pair < pairs, other=0)
    valid = (pair < pairs) & (position < length)
    wanted = valid[:, None] & inside
    if BY_ROW:
        place = moments + position * 2 * rows + row
        mean = tl.load(place, mask=valid, other=0.0)[:, None]
        var = tl.load(place + rows, mask=valid, other=1.0)[:, None]
    else:
        step = position
        if REVERSE:
            step = length - 1 - position
        if POOLED:
            step = position * 0
        place = moments + step[:, None] * 2 * WIDTH + columns[None, :]
        mean = tl.load(place, mask=wanted, other=0.0)
        var = tl.load(place + WIDTH, mask=wanted, other=1.0)
    at = pair[:, None] * WIDTH + columns[None, :]
    value = tl.load(values + at, mask=wanted, other=0.0)
    scale = tl.load(gain + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    normalised = (value - mean) * (1.0 / tl.sqrt_rn(var + eps)) * scale
    tl.store(terms + at, tl.where(wanted, normalised, 0.0), mask=inside)


def input_statistics(layer: Layer, values: Tensor) -> Tensor:
    """The mean and biased variance that ``N_r`` normalises with, in the layout in which the operator returns them.

    Batch norm: ``(T, 2, 4H)`` by processed step, or ``(1, 2, 4H)`` pooled. Layer norm: ``(T, 2, B)`` by position.

    Args:
        values: ``r (T, B, 4H)`` float32, contiguous, 0 in padding.
    """
    steps, rows, width = values.shape
    lengths, device = layer.tensors.lengths, values.device
    if layer.flags.norm == NORM_LAYER:
        moments = torch.empty(steps, 2, rows, dtype=torch.float32, device=device)
        whole = whole_rows(steps * rows)
        grid = (triton.cdiv(steps * rows, whole),)
        row_moments_kernel[grid](values, moments, lengths, steps, rows, width, whole, wide_columns(width), **FUSED)
        return moments
    pooled = bool(layer.options[11])
    if lengths is None:
        counts = torch.full((steps,), rows, device=device)
    else:
        counts = (torch.arange(steps, device=device).unsqueeze(1) < lengths).sum(1)
    if pooled:
        population, total = _population(layer, 1), counts.sum().view(1)
    else:
        population, total = _population(layer, steps), counts
    reached = (total >= 1).view(-1, 1, 1)
    if not layer.flags.batch_statistics:
        return torch.where(reached, population, 0.0)
    moments = torch.empty(steps, 2, width, dtype=torch.float32, device=device)
    sizes = packed_sizes(Sizes(steps, rows, 0, rows))
    batch_moments_kernel[(steps, triton.cdiv(width, _COLUMNS))](
        values, moments, lengths, sizes, width, layer.flags.reverse, _ROWS, _COLUMNS, **FUSED
    )
    if pooled:
        moments = _combined(moments, counts.to(torch.float32).view(-1, 1))
    own = (total >= 2).view(-1, 1, 1)
    return torch.where(own, moments, torch.where(reached, population, 0.0))


def _combined(moments: Tensor, counts: Tensor) -> Tensor:
    """Chan's formula: ``(1, 2, N)`` over all steps from ``(T, 2, N)`` and the steps' counts ``(T, 1)``."""
    means, variances = moments.unbind(1)
    total = counts.sum().clamp(min=1.0)
    mean = (counts * means).sum(0) / total
    apart = means - mean
    variance = (counts * (variances + apart * apart)).sum(0) / total
    return torch.stack((mean, variance)).unsqueeze(0)


def _population(layer: Layer, steps: int) -> Tensor:
    """The running mean and variance of each step, ``(steps, 2, 4H)``; 0 and 1 where nothing was counted."""
    tensors = layer.tensors
    index, mean, var = tensors.running_input_index, tensors.running_input_mean, tensors.running_input_var
    width = 4 * layer.flags.hidden_size
    if index is None or mean is None or var is None:
        blank = torch.zeros(1, 2, width, dtype=torch.float32, device=tensors.input.device)
        blank[:, 1] = 1.0
        return blank.expand(steps, 2, width)
    index = index[:steps]
    # Checked nowhere else: an index past the rows must not read past them.
    row = index.clamp(0, mean.shape[0] - 1)
    known = (index >= 0).unsqueeze(1)
    return torch.stack((torch.where(known, mean[row], 0.0), torch.where(known, var[row], 1.0)), 1)


def normalised(layer: Layer, values: Tensor, statistics: Tensor, terms: Tensor) -> Tensor:
    """``N_r(values)`` without the shift, into ``terms``, which may be ``values`` itself.

    Args:
        values: ``r (T, B, 4H)`` float32, contiguous.
        statistics: of :func:`input_statistics`.
        terms: like ``values``.
    """
    steps, rows, width = values.shape
    grid = (triton.cdiv(steps * rows, 8), triton.cdiv(width, 128))
    apply_kernel[grid](
        values,
        terms,
        statistics,
        layer.tensors.norm_input_weight,
        layer.tensors.lengths,
        steps,
        rows,
        layer.eps,
        width,
        int(layer.flags.norm == NORM_LAYER),
        int(layer.flags.norm == NORM_BATCH and bool(layer.options[11])),
        layer.flags.reverse,
        8,
        128,
        **FUSED,
    )
    return terms
