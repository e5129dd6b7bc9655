"""One step of the backward loop: the bodies that the kernels of a step and the persistent kernel share.

For the step processed at ``s``, last step first::

    dh     = direct_{s+1} + m_h ⊙ (da_{s+1} W̃_hh)     nothing of the product through a reset or past a row's length
    dh̃, dc̃ through zoneout; then h̃ = o tanh(N_c(c̃)); then the cell: dz, dc_{s-1}
    da     = dz through N_a
    direct = ζ_h dh; a row past its length passes dh and dc on unchanged

A program owns some units, all four gates of them, for some rows. Without a norm a tile goes through all of it at once
(:func:`plain_tile`). Batch norm averages over rows: a program owns its units for every row, and passes over its tiles
once for each average (:func:`batch_units`). Layer norm averages over units: the product is one stage
(:func:`~fusedreg.backends.triton.backward_product.keep_gradient`), everything after it another, in which a
program owns whole rows (:func:`layer_rows`). The step of index -1 is the product alone: the initial state's gradient.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.backward_cell import (
    leave_tile,
    pass_on,
    read_tile,
    step_tile,
    store_activated,
    store_gates,
    store_probes,
    through_zones,
)
from fusedreg.backends.triton.backward_norm import averaged_rows, cell_term, recurrent_term
from fusedreg.backends.triton.backward_product import arriving_gradient, before_product, keep_gradient
from fusedreg.backends.triton.jit_cell import leave_output
from fusedreg.backends.triton.jit_grid import wait_for
from fusedreg.backends.triton.jit_storage import narrow
from fusedreg.backends.triton.jit_tile import NORM_BATCH, NORM_LAYER


@triton.jit
def wait_for_others(arrivals, target):
    """In the persistent kernel, until the step after is written; a kernel of a step was launched after it."""
    if arrivals is not None:
        wait_for(arrivals, target)


@triton.jit
def plain_tile(s, rows, units, arrivals, target, tiles, loop, saved, grads, sizes, rates, LAYER: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """A step of a tile without a norm: the product, the cell and ``da`` in one go.

    Reads what was saved, and draws its masks, while it waits for the others.
    """
    place, cell, arrived = read_tile(s, rows, units, s * 0, loop, saved, grads, sizes, rates, LAYER, BLOCK)
    before = before_product(s, rows, units, loop, grads, sizes, rates, LAYER)
    wait_for_others(arrivals, target)
    grad_hidden = arriving_gradient(s, before, rows, units, tiles, loop, grads, sizes, rates, LAYER, BLOCK)
    gradients = through_zones(grad_hidden, arrived, LAYER)
    valid, position, resets, here = place
    direct, grad_output, grad_previous, grad_candidate, carried = gradients
    grad_argument, grad_o = leave_output(cell[7], cell[3], grad_output)
    store_probes(grad_hidden, grad_argument, rows, units, position, here, arrived, grads, sizes, LAYER)
    store_activated(cell[7], cell[3], rows, units, position, here, grads, sizes, LAYER)
    dz, through_forget = leave_tile(cell, grad_candidate + grad_argument, grad_o)
    store_gates(grads.grad_recurrent, rows, units, position, dz, here, sizes, LAYER)
    if grads.grad_gates is not None:
        store_gates(grads.grad_gates, rows, units, position, dz, here, sizes, LAYER)
    pass_on(s, rows, units, valid, resets, grad_hidden, direct, carried, grad_previous + through_forget, grads, sizes,
            LAYER)  # fmt: skip


@triton.jit
def kept_gradient(rows, units, grads, sizes, LAYER: tl.constexpr):
    """What :func:`keep_gradient` left."""
    present = (rows[:, None] < sizes.rows) & (units[None, :] < LAYER.hidden_size)
    return tl.load(grads.hidden + rows[:, None] * LAYER.hidden_size + units[None, :], mask=present, other=0.0)


@triton.jit
def argument_tile(s, rows, units, of_batch, loop, saved, grads, sizes, rates, LAYER: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """A tile up to the gradient of ``N_c``'s result, before its averages are known."""
    grad_hidden = kept_gradient(rows, units, grads, sizes, LAYER)
    place, cell, arrived = read_tile(s, rows, units, of_batch, loop, saved, grads, sizes, rates, LAYER, BLOCK)
    gradients = through_zones(grad_hidden, arrived, LAYER)
    normalised, argument, gain, scale = cell_term(
        cell[7], s, rows, units, place[0], place[1], of_batch, place[3], loop, saved, sizes, rates, LAYER
    )
    grad_argument, grad_o = leave_output(argument, cell[3], gradients[1])
    grad_argument = tl.where(place[3], grad_argument, 0.0)
    store_activated(argument, cell[3], rows, units, place[1], place[3], grads, sizes, LAYER)
    return grad_hidden, place, cell, gradients, arrived, (normalised, gain, scale), grad_argument, grad_o


@triton.jit
def column_sums(values, products):
    """Sums over a tile's rows: of gradients, and of what they are multiplied with."""
    return tl.sum(values, 0), tl.sum(products, 0)


@triton.jit
def batch_units(s, units, tiles, loop, saved, grads, sizes, rates, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A step with batch norm, for some units of every row."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    first = tl.full((), 0, tl.int32)
    while first < sizes.rows:
        keep_gradient(s, first + tl.arange(0, BLOCK.rows), units, tiles, loop, grads, sizes, rates, LAYER, BLOCK)
        first += BLOCK.rows
    tl.debug_barrier()
    if s >= 0:
        of_batch = averaged_rows(s, grads, LAYER)
        share = tl.where(of_batch > 0, 1.0 / tl.maximum(of_batch, 1).to(tl.float32), 0.0)
        blank = tl.zeros([units.shape[0]], tl.float32)
        cell_sum = blank
        cell_products = blank
        if LAYER.norm_cell:
            first = tl.full((), 0, tl.int32)
            while first < sizes.rows:
                rows = first + tl.arange(0, BLOCK.rows)
                _, _, _, _, _, norm, grad_argument, _ = argument_tile(
                    s, rows, units, of_batch, loop, saved, grads, sizes, rates, LAYER, BLOCK
                )
                total, products = column_sums(grad_argument, grad_argument * norm[0])
                cell_sum += total
                cell_products += products
                if BLOCK.sums_by_row:
                    add_to_sums(grads.cell_sums, rows, units, 0, grad_argument, sizes, HIDDEN)
                    add_to_sums(grads.cell_sums, rows, units, HIDDEN, grad_argument * norm[0], sizes, HIDDEN)
                first += BLOCK.rows
            if not BLOCK.sums_by_row:
                at = grads.cell_sums + s.to(tl.int64) * 2 * HIDDEN + units
                tl.store(at, cell_sum, mask=units < HIDDEN)
                tl.store(at + HIDDEN, cell_products, mask=units < HIDDEN)
        sum_i, sum_f, sum_g, sum_o = blank, blank, blank, blank
        products_i, products_f, products_g, products_o = blank, blank, blank, blank
        first = tl.full((), 0, tl.int32)
        while first < sizes.rows:
            rows = first + tl.arange(0, BLOCK.rows)
            grad_hidden, place, cell, gradients, arrived, norm, grad_argument, grad_o = argument_tile(
                s, rows, units, of_batch, loop, saved, grads, sizes, rates, LAYER, BLOCK
            )
            valid, position, resets, here = place
            direct, _, grad_previous, grad_candidate, carried = gradients
            if LAYER.norm_cell:
                mean, slope = (cell_sum * share)[None, :], (cell_products * share)[None, :]
                grad_argument = norm[1] * norm[2] * (grad_argument - mean - norm[0] * slope)
            store_probes(grad_hidden, grad_argument, rows, units, position, here, arrived, grads, sizes, LAYER)
            dz, through_forget = leave_tile(cell, grad_candidate + grad_argument, grad_o)
            if LAYER.norm_recurrent:
                total_i, part_i = gate_sums(0, dz[0], s, rows, units, place, of_batch, loop, saved, sizes, rates, LAYER)
                total_f, part_f = gate_sums(1, dz[1], s, rows, units, place, of_batch, loop, saved, sizes, rates, LAYER)
                total_g, part_g = gate_sums(2, dz[2], s, rows, units, place, of_batch, loop, saved, sizes, rates, LAYER)
                total_o, part_o = gate_sums(3, dz[3], s, rows, units, place, of_batch, loop, saved, sizes, rates, LAYER)
                sum_i, sum_f, sum_g, sum_o = sum_i + total_i, sum_f + total_f, sum_g + total_g, sum_o + total_o
                products_i, products_f = products_i + part_i, products_f + part_f
                products_g, products_o = products_g + part_g, products_o + part_o
            else:
                store_gates(grads.grad_recurrent, rows, units, position, dz, here, sizes, LAYER)
            if grads.grad_gates is not None:
                store_gates(grads.grad_gates, rows, units, position, dz, here, sizes, LAYER)
            pass_on(s, rows, units, valid, resets, grad_hidden, direct, carried, grad_previous + through_forget, grads,
                    sizes, LAYER)  # fmt: skip
            first += BLOCK.rows
        if LAYER.norm_recurrent:
            tl.debug_barrier()
            recurrent_gate(
                0, sum_i, products_i, share, s, units, of_batch, loop, saved, grads, sizes, rates, LAYER, BLOCK
            )
            recurrent_gate(
                1, sum_f, products_f, share, s, units, of_batch, loop, saved, grads, sizes, rates, LAYER, BLOCK
            )
            recurrent_gate(
                2, sum_g, products_g, share, s, units, of_batch, loop, saved, grads, sizes, rates, LAYER, BLOCK
            )
            recurrent_gate(
                3, sum_o, products_o, share, s, units, of_batch, loop, saved, grads, sizes, rates, LAYER, BLOCK
            )


@triton.jit
def gate_sums(gate: tl.constexpr, dz, s, rows, units, place, of_batch, loop, saved, sizes, rates, LAYER: tl.constexpr):
    """A tile's sums for ``N_a`` of one gate: of ``dz``, and of ``dz`` times the normalised ``a``."""
    term, _, _ = recurrent_term(gate, s, rows, units, place[0], place[1], of_batch, place[3], loop, saved, sizes, rates,
                                LAYER)  # fmt: skip
    dz = tl.where(place[3], dz, 0.0)
    return column_sums(dz, dz * term)


@triton.jit
def recurrent_gate(gate: tl.constexpr, total, products, share, s, units, of_batch, loop, saved, grads, sizes, rates,
                   LAYER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``da`` of one gate from ``dz``, whose sums are known now."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    columns = gate * HIDDEN + units
    mean, slope = (total * share)[None, :], (products * share)[None, :]
    first = tl.full((), 0, tl.int32)
    while first < sizes.rows:
        rows = first + tl.arange(0, BLOCK.rows)
        valid, position, _, here = step_tile(s, rows, units, loop, sizes, LAYER)
        term, gain, scale = recurrent_term(gate, s, rows, units, valid, position, of_batch, here, loop, saved, sizes,
                                           rates, LAYER)  # fmt: skip
        present = (rows[:, None] < sizes.rows) & (units[None, :] < HIDDEN)
        at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * (4 * HIDDEN) + columns[None, :]
        dz = tl.load(grads.grad_gates + at, mask=here, other=0.0)
        da = tl.where(here, gain * scale * (dz - mean - term * slope), 0.0)
        tl.store(grads.grad_recurrent + at, narrow(da, grads.grad_recurrent.dtype.element_ty), mask=present)
        first += BLOCK.rows


@triton.jit
def layer_rows(s, rows, loop, saved, grads, sizes, rates, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A step with layer norm, for whole rows; their ``dh`` is there already."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    units = tl.arange(0, BLOCK.wide)
    grad_hidden, place, cell, gradients, arrived, norm, grad_argument, grad_o = argument_tile(
        s, rows, units, s * 0, loop, saved, grads, sizes, rates, LAYER, BLOCK
    )
    valid, position, resets, here = place
    direct, _, grad_previous, grad_candidate, carried = gradients
    if LAYER.norm_cell:
        normalised, gain, scale = norm
        add_to_sums(grads.cell_sums, rows, units, 0, grad_argument, sizes, HIDDEN)
        add_to_sums(grads.cell_sums, rows, units, HIDDEN, grad_argument * normalised, sizes, HIDDEN)
        grad = grad_argument * gain
        mean, slope = tl.sum(grad, 1) / HIDDEN, tl.sum(grad * normalised, 1) / HIDDEN
        grad_argument = scale * (grad - mean[:, None] - normalised * slope[:, None])
    store_probes(grad_hidden, grad_argument, rows, units, position, here, arrived, grads, sizes, LAYER)
    dz, through_forget = leave_tile(cell, grad_candidate + grad_argument, grad_o)
    if grads.grad_gates is not None:
        store_gates(grads.grad_gates, rows, units, position, dz, here, sizes, LAYER)
    if LAYER.norm_recurrent:
        total = tl.zeros([rows.shape[0]], tl.float32)
        products = total
        for gate in tl.static_range(4):
            term, gain, _ = recurrent_term(gate, s, rows, units, valid, position, s * 0, here, loop, saved, sizes,
                                           rates, LAYER)  # fmt: skip
            grad = tl.where(here, dz[gate], 0.0)
            total += tl.sum(grad * gain, 1)
            products += tl.sum(grad * gain * term, 1)
        mean, slope = (total / (4 * HIDDEN))[:, None], (products / (4 * HIDDEN))[:, None]
        present = (rows[:, None] < sizes.rows) & (units[None, :] < HIDDEN)
        for gate in tl.static_range(4):
            term, gain, scale = recurrent_term(gate, s, rows, units, valid, position, s * 0, here, loop, saved, sizes,
                                               rates, LAYER)  # fmt: skip
            da = tl.where(here, scale * (dz[gate] * gain - mean - term * slope), 0.0)
            at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * (4 * HIDDEN) + gate * HIDDEN + units[None, :]
            tl.store(grads.grad_recurrent + at, narrow(da, grads.grad_recurrent.dtype.element_ty), mask=present)
    else:
        store_gates(grads.grad_recurrent, rows, units, position, dz, here, sizes, LAYER)
    pass_on(s, rows, units, valid, resets, grad_hidden, direct, carried, grad_previous + through_forget, grads, sizes,
            LAYER)  # fmt: skip


@triton.jit
def add_to_sums(target, rows, units, offset, values, sizes, HIDDEN: tl.constexpr):
    """A row's share of a gain's gradient, added over the steps: the row is this program's at every step."""
    at = target + rows[:, None].to(tl.int64) * (2 * HIDDEN) + offset + units[None, :]
    inside = (rows < sizes.rows)[:, None] & (units < HIDDEN)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + values, mask=inside)


@triton.jit
def units_stage(s, unit_tile, row_tile, arrivals, target, tiles, tensors, numbers, LAYER: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """A step of one tile, or with a norm in the loop its first stage (layer norm) or all of it (batch norm).

    Waits until ``arrivals`` counts ``target`` before it reads what others wrote; ``None``: it stands already.
    """
    loop, saved, grads, sizes, rates = tensors.inputs, tensors.saved, tensors.grads, numbers.sizes, numbers.rates
    units = unit_tile * BLOCK.units + tl.arange(0, BLOCK.units)
    rows = row_tile * BLOCK.rows + tl.arange(0, BLOCK.rows)
    if BLOCK.norm == NORM_BATCH:
        wait_for_others(arrivals, target)
        batch_units(s, units, tiles, loop, saved, grads, sizes, rates, LAYER, BLOCK)
    elif BLOCK.norm == NORM_LAYER:
        wait_for_others(arrivals, target)
        keep_gradient(s, rows, units, tiles, loop, grads, sizes, rates, LAYER, BLOCK)
    else:
        if s >= 0:
            plain_tile(s, rows, units, arrivals, target, tiles, loop, saved, grads, sizes, rates, LAYER, BLOCK)
        else:
            wait_for_others(arrivals, target)
            keep_gradient(s, rows, units, tiles, loop, grads, sizes, rates, LAYER, BLOCK)


@triton.jit
def rows_stage(s, row_group, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """The second stage of a step with layer norm in the loop, for a group of rows."""
    rows = row_group * BLOCK.whole_rows + tl.arange(0, BLOCK.whole_rows)
    layer_rows(s, rows, tensors.inputs, tensors.saved, tensors.grads, numbers.sizes, numbers.rates, LAYER, BLOCK)
