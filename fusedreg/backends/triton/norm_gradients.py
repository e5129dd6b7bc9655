"""The norms of both pre-activations on the way back, where that need not be inside the loop.

For ``y = gain (x - mean) / deviation`` over the values of a row (layer norm) or over the valid rows of a step, or of
all steps where the statistics are pooled (batch norm), with ``x̂ = (x - mean) / deviation``::

    dgain = Σ dy x̂        dx = (dy gain - mean(dy gain) - x̂ mean(dy gain x̂)) / deviation

and without the two means where the statistics were constants.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedreg.backends.triton.backward_norm import column_moments, norm_scales, row_moments
from fusedreg.backends.triton.jit_numbers import packed_numbers, restored_numbers
from fusedreg.backends.triton.jit_storage import narrow
from fusedreg.backends.triton.jit_tile import row_order
from fusedreg.backends.triton.layout import FUSED, Layer
from fusedreg.encoding import NORM_LAYER

_ROWS, _COLUMNS = 32, 64
_FEW_ROWS = 4


@triton.jit
def normalised_tile(  # type: ignore[no-untyped-def]
    values, statistics, s, rows, columns, here, valid, position, of_batch, lengths, numbers, WIDTH: tl.constexpr,
    BY_ROW: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """A tile's ``x̂``, its offsets, and ``1 / deviation``."""
    at = (position.to(tl.int64) * numbers.sizes.rows + rows)[:, None] * WIDTH + columns[None, :]
    if BY_ROW:
        mean, variance = row_moments(statistics, rows, valid, position, numbers.sizes)
        scale, spread = norm_scales(variance, numbers.rates.eps, 1)
        mean, scale, spread = mean[:, None], scale[:, None], spread[:, None]
    else:
        step = s * 0 if POOLED else s
        mean, variance = column_moments(statistics, step, columns, columns < WIDTH, WIDTH)
        scale, spread = norm_scales(variance, numbers.rates.eps, of_batch)
        mean, scale, spread = mean[None, :], scale[None, :], spread[None, :]
    value = tl.load(values + at, mask=here, other=0.0)
    return tl.where(here, (value - mean) * spread, 0.0), at, scale


@triton.jit(do_not_specialize=["numbers", "group_rows"])
def sums_kernel(  # type: ignore[no-untyped-def]
    grads, values, statistics, counts, lengths, sums, numbers, group_rows, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
    BY_ROW: tl.constexpr, POOLED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``sums (groups, T, 2, WIDTH)``: a step's sums over a group's rows of ``dy``, and of ``dy x̂``."""
    numbers = restored_numbers(numbers)
    s = tl.program_id(0) % numbers.sizes.steps
    group = tl.program_id(0) // numbers.sizes.steps
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_batch = s * 0
    if counts is not None:
        of_batch = tl.load(counts + (s * 0 if POOLED else s))
    total = tl.zeros([COLUMNS], tl.float32)
    products = total
    first = group * group_rows
    last = first + group_rows
    while first < last:
        rows = first + tl.arange(0, ROWS)
        valid, position = row_order(s, rows, lengths, numbers.sizes, REVERSE)
        here = (valid & (rows < last))[:, None] & (columns < WIDTH)[None, :]
        normalised, at, _ = normalised_tile(values, statistics, s, rows, columns, here, valid, position, of_batch,
                                            lengths, numbers, WIDTH, BY_ROW, POOLED)  # fmt: skip
        grad = tl.load(grads + at, mask=here, other=0.0)
        total += tl.sum(grad, 0)
        products += tl.sum(grad * normalised, 0)
        first += ROWS
    at = sums + tl.program_id(0).to(tl.int64) * 2 * WIDTH + columns
    tl.store(at, total, mask=columns < WIDTH)
    tl.store(at + WIDTH, products, mask=columns < WIDTH)


@triton.jit(do_not_specialize=["numbers"])
def batch_gradient_kernel(  # type: ignore[no-untyped-def]
    grads, values, statistics, counts, lengths, gain, sums, results, numbers, WIDTH: tl.constexpr,
    REVERSE: tl.constexpr, POOLED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dx`` through a batch norm, by position and 0 in padding, from the sums of :func:`sums_kernel`."""
    numbers = restored_numbers(numbers)
    s = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    entry = s * 0 if POOLED else s
    of_batch = s * 0
    if counts is not None:
        of_batch = tl.load(counts + entry)
    share = tl.where(of_batch > 0, 1.0 / tl.maximum(of_batch, 1).to(tl.float32), 0.0)
    place = sums + entry.to(tl.int64) * 2 * WIDTH + columns
    mean = tl.load(place, mask=inside, other=0.0) * share
    slope = tl.load(place + WIDTH, mask=inside, other=0.0) * share
    factor = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.full((), 0, tl.int32)
    while first < numbers.sizes.rows:
        rows = first + tl.arange(0, ROWS)
        valid, position = row_order(s, rows, lengths, numbers.sizes, REVERSE)
        here = valid[:, None] & inside[None, :]
        normalised, at, scale = normalised_tile(values, statistics, s, rows, columns, here, valid, position, of_batch,
                                                lengths, numbers, WIDTH, False, POOLED)  # fmt: skip
        grad = tl.load(grads + at, mask=here, other=0.0)
        grad = tl.where(here, factor * scale * (grad - mean[None, :] - normalised * slope[None, :]), 0.0)
        present = (rows < numbers.sizes.rows)[:, None] & inside[None, :]
        tl.store(results + at, narrow(grad, results.dtype.element_ty), mask=present)
        first += ROWS


@triton.jit(do_not_specialize=["numbers"])
def layer_gradient_kernel(  # type: ignore[no-untyped-def]
    grads, values, statistics, lengths, gain, results, numbers, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dx`` through a layer norm, of some rows at one step, 0 in padding."""
    numbers = restored_numbers(numbers)
    # One axis: a second one ends at 65,535, of which rows may need more.
    row_tiles = (numbers.sizes.rows + ROWS - 1) // ROWS
    s = tl.program_id(0) // row_tiles
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    valid, position = row_order(s, rows, lengths, numbers.sizes, REVERSE)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = total
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        here = valid[:, None] & (columns < WIDTH)[None, :]
        normalised, at, _ = normalised_tile(values, statistics, s, rows, columns, here, valid, position, s * 0, lengths,
                                            numbers, WIDTH, True, False)  # fmt: skip
        grad = tl.load(grads + at, mask=here, other=0.0)
        grad = grad * tl.load(gain + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
        total += grad
        products += grad * normalised
    mean, slope = (tl.sum(total, 1) / WIDTH)[:, None], (tl.sum(products, 1) / WIDTH)[:, None]
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (columns < WIDTH)[None, :]
        here = valid[:, None] & inside
        present = (rows < numbers.sizes.rows)[:, None] & inside
        normalised, at, scale = normalised_tile(values, statistics, s, rows, columns, here, valid, position, s * 0,
                                                lengths, numbers, WIDTH, True, False)  # fmt: skip
        grad = tl.load(grads + at, mask=here, other=0.0)
        grad = grad * tl.load(gain + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
        grad = tl.where(here, scale * (grad - mean - normalised * slope), 0.0)
        tl.store(results + at, narrow(grad, results.dtype.element_ty), mask=present)


def averaged_counts(layer: Layer, counts: Tensor | None, *, pooled: bool) -> Tensor | None:
    """The rows that a batch norm averages over at each step, or over all; 0 where its statistics are constants."""
    if counts is None:
        return None
    if pooled:
        counts = counts.sum().view(1)
    return torch.where(counts >= 2, counts, 0)


def term_sums(
    layer: Layer, grads: Tensor, values: Tensor, statistics: Tensor, counts: Tensor | None, *, pooled: bool = False
) -> Tensor:
    """``(groups, T, 2, 4H)``: each step's sums of ``dy`` and of ``dy x̂`` over the rows of a group.

    There is one group, or the call's ``gradient_groups``. The second sum, summed over steps, is the gain's gradient.

    Args:
        layer: the call.
        grads: ``dz (T, B, 4H)`` float32.
        values: the raw ``a`` or ``r (T, B, 4H)`` float32.
        statistics: what they were normalised with, as the forward gave it.
        counts: of :func:`averaged_counts`; ``None`` for a layer norm, and where all statistics were constants.
        pooled: whether the statistics are of the whole sequence.
    """
    steps, rows, width = grads.shape
    groups = layer.gradient_groups or 1
    sums = torch.empty(groups, steps, 2, width, dtype=torch.float32, device=grads.device)
    sums_kernel[(groups * steps, triton.cdiv(width, _COLUMNS))](
        grads,
        values,
        statistics,
        counts,
        layer.tensors.lengths,
        sums,
        packed_numbers(layer.sizes, layer.rates),
        rows // groups,
        width,
        layer.flags.reverse,
        int(layer.flags.norm == NORM_LAYER),
        int(pooled),
        _ROWS,
        _COLUMNS,
        **FUSED,
    )
    return sums


def through_input_norm(
    layer: Layer,
    grads: Tensor,
    values: Tensor,
    statistics: Tensor,
    counts: Tensor | None,
    sums: Tensor,
    *,
    pooled: bool,
) -> Tensor:
    """``dr (T, B, 4H)`` in the storage type from ``dz``; arguments as :func:`term_sums`, and its result.

    Its groups are not told apart: there is but one where statistics are of the batch, else the sums count for nothing.
    """
    steps, rows, width = grads.shape
    gain, lengths = layer.tensors.norm_input_weight, layer.tensors.lengths
    results = torch.empty(grads.shape, dtype=layer.tensors.weight_ih.dtype, device=grads.device)
    numbers, reverse = packed_numbers(layer.sizes, layer.rates), layer.flags.reverse
    if layer.flags.norm == NORM_LAYER:
        columns = min(256, triton.next_power_of_2(width))
        layer_gradient_kernel[(steps * triton.cdiv(rows, _FEW_ROWS),)](
            grads, values, statistics, lengths, gain, results, numbers, width, reverse, _FEW_ROWS, columns, **FUSED
        )
        return results
    sums = sums[0]
    if pooled:
        sums = sums.sum(0, keepdim=True)
    grid = (steps, triton.cdiv(width, _COLUMNS))
    batch_gradient_kernel[grid](
        grads,
        values,
        statistics,
        counts,
        lengths,
        gain,
        sums,
        results,
        numbers,
        width,
        reverse,
        int(pooled),
        _ROWS,
        _COLUMNS,
        **FUSED,
    )
    return results
