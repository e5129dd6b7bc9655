"""What the steps of the backward loop have in common: a tile of cells on its way back, up to the edge of ``N_c``."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.backward_norm import pre_activation
from fusedreg.backends.triton.jit_cell import candidate_cell, leave_cell, sigmoid, tanh, through_zone
from fusedreg.backends.triton.jit_storage import kept_activation, narrow
from fusedreg.backends.triton.jit_tile import mask_if, row_order, row_resets, tile_masks


@triton.jit
def gate_value(gate: tl.constexpr, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates,
               LAYER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One gate after its activation, as the forward kept it or rebuilt."""
    if BLOCK.activated:
        HIDDEN: tl.constexpr = LAYER.hidden_size
        at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * (4 * HIDDEN) + gate * HIDDEN + units[None, :]
        kept = tl.load(saved.gates + at, mask=here, other=0)
        value = kept_activation(kept, gate == 2, LAYER.fixed_gates)
    else:
        z = pre_activation(gate, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates, LAYER)
        value = tanh(z) if gate == 2 else sigmoid(z)
    return value


@triton.jit
def step_tile(s, rows, units, loop, sizes, LAYER: tl.constexpr):
    """What every pass over a tile starts from: which rows are valid, where they stand, which begin from zero."""
    valid, position = row_order(s, rows, loop.lengths, sizes, LAYER.reverse)
    resets = row_resets(rows, valid, position, loop.reset, sizes)
    here = valid[:, None] & (units[None, :] < LAYER.hidden_size)
    return valid, position, resets, here


@triton.jit
def previous_cells(s, rows, units, position, resets, here, loop, saved, sizes, LAYER: tl.constexpr):
    """``c_{s-1}``, 0 through a reset and in padding."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    carried = here & (resets == 0)[:, None]
    before = position + 1 if LAYER.reverse else position - 1
    at = (before.to(tl.int64) * sizes.rows + rows)[:, None] * HIDDEN + units[None, :]
    cell = tl.load(saved.cells + at, mask=mask_if(s > 0, carried), other=0.0)
    if loop.initial_cell is not None:
        at = rows[:, None] * HIDDEN + units[None, :]
        cell += tl.load(loop.initial_cell + at, mask=mask_if(s == 0, carried), other=0.0)
    return cell


@triton.jit
def arriving(s, rows, units, position, here, output_mask, grads, sizes, LAYER: tl.constexpr):
    """What reaches ``h_s`` through ``y``; ``dc`` as the step after left it; the same with what reaches ``c_s``.

    With a projection ``y`` is another stage's (backward_projection.py).
    """
    HIDDEN: tl.constexpr = LAYER.hidden_size
    at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * HIDDEN + units[None, :]
    slot = ((s + 1) % 2).to(tl.int64) * sizes.rows * HIDDEN
    present = (rows[:, None] < sizes.rows) & (units[None, :] < HIDDEN)
    carried_cell = tl.load(grads.cell + slot + rows[:, None] * HIDDEN + units[None, :], mask=present, other=0.0)
    grad_cell = carried_cell
    if grads.cells is not None:
        grad_cell += tl.load(grads.cells + at, mask=here, other=0.0)
    of_output = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
    if grads.output is not None and not LAYER.projected:
        of_output = tl.load(grads.output + at, mask=here, other=0.0).to(tl.float32) * output_mask
    return of_output, carried_cell, grad_cell


@triton.jit
def through_zones(grad_hidden, arrived, LAYER: tl.constexpr):
    """``dh`` and ``dc`` through zoneout; with a projection ``du``, which is past it, and ``dc``.

    Returns the previous ``h``'s share, the gradient of ``h_candidate``, the previous ``c``'s share, the gradient of
    the candidate cell but for what comes through ``h_candidate``, and ``dc`` as it came.
    """
    zone_hidden, zone_cell, of_output, carried_cell, grad_cell = arrived
    if LAYER.projected:
        direct, grad_candidate = grad_hidden, grad_hidden
    else:
        direct, grad_candidate = through_hidden_zone(zone_hidden, grad_hidden, of_output, LAYER)
    previous_cell, candidate_cell = through_zone(zone_cell, grad_cell)
    return direct, grad_candidate, previous_cell, candidate_cell, carried_cell


@triton.jit
def through_hidden_zone(zone, grad_hidden, of_output, LAYER: tl.constexpr):
    """``dh``, and what comes through ``y``, to the previous ``h``'s share and the gradient of ``h_candidate``."""
    if LAYER.candidate_output:
        direct, grad_candidate = through_zone(zone, grad_hidden)
        grad_candidate += of_output
    else:
        direct, grad_candidate = through_zone(zone, grad_hidden + of_output)
    return direct, grad_candidate


@triton.jit
def pass_on_hidden(s, rows, units, valid, resets, grad_hidden, direct, grads, sizes, LAYER: tl.constexpr):
    """Leave ``direct`` for the step before: ``dh`` itself past a row's length, nothing through a reset."""
    WIDTH: tl.constexpr = LAYER.projected_size
    present = (rows[:, None] < sizes.rows) & (units[None, :] < WIDTH)
    at = (s % 2).to(tl.int64) * sizes.rows * WIDTH + rows[:, None] * WIDTH + units[None, :]
    passed = tl.where((resets != 0)[:, None], 0.0, direct)
    tl.store(grads.direct + at, tl.where(valid[:, None], passed, grad_hidden), mask=present)


@triton.jit
def pass_on(s, rows, units, valid, resets, grad_hidden, direct, carried_cell, grad_cell, grads, sizes,
            LAYER: tl.constexpr):  # fmt: skip
    """Leave ``direct`` and ``dc`` for the step before: unchanged past a row's length, nothing through a reset."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    present = (rows[:, None] < sizes.rows) & (units[None, :] < HIDDEN)
    stops, takes_part = (resets != 0)[:, None], valid[:, None]
    at = (s % 2).to(tl.int64) * sizes.rows * HIDDEN + rows[:, None] * HIDDEN + units[None, :]
    cell = tl.where(takes_part, tl.where(stops, 0.0, grad_cell), carried_cell)
    if not LAYER.projected:
        pass_on_hidden(s, rows, units, valid, resets, grad_hidden, direct, grads, sizes, LAYER)
    tl.store(grads.cell + at, cell, mask=present)


@triton.jit
def store_hidden_probe(grad_hidden, of_output, rows, units, position, here, grads, sizes, LAYER: tl.constexpr):
    """The gradient of an amount added to ``h_s``, where it is wanted; 0 in padding."""
    if grads.hidden_probe is not None:
        WIDTH: tl.constexpr = LAYER.projected_size
        present = (rows[:, None] < sizes.rows) & (units[None, :] < WIDTH)
        at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * WIDTH + units[None, :]
        value = grad_hidden
        if not LAYER.candidate_output:  # where y is h_s
            value += of_output
        value = narrow(tl.where(here, value, 0.0), grads.hidden_probe.dtype.element_ty)
        tl.store(grads.hidden_probe + at, value, mask=present)


@triton.jit
def store_probes(grad_hidden, grad_argument, rows, units, position, here, arrived, grads, sizes, LAYER: tl.constexpr):
    """The gradients of amounts added to ``h_s``, and to the cell wherever it is read: by ``h̃_s`` and as ``c_s``."""
    _, _, of_output, _, grad_cell = arrived
    if not LAYER.projected:
        store_hidden_probe(grad_hidden, of_output, rows, units, position, here, grads, sizes, LAYER)
    if grads.cell_probe is not None:
        HIDDEN: tl.constexpr = LAYER.hidden_size
        present = (rows[:, None] < sizes.rows) & (units[None, :] < HIDDEN)
        at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * HIDDEN + units[None, :]
        tl.store(grads.cell_probe + at, tl.where(here, grad_cell + grad_argument, 0.0), mask=present)


@triton.jit
def store_activated(argument, o, rows, units, position, here, grads, sizes, LAYER: tl.constexpr):
    """``u = o tanh(N_c(c̃))`` again, where ``dW_hr`` needs it; 0 in padding."""
    if grads.activated is not None:
        HIDDEN: tl.constexpr = LAYER.hidden_size
        present = (rows[:, None] < sizes.rows) & (units[None, :] < HIDDEN)
        at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * HIDDEN + units[None, :]
        value = narrow(tl.where(here, o * tanh(argument), 0.0), grads.activated.dtype.element_ty)
        tl.store(grads.activated + at, value, mask=present)


@triton.jit
def store_gates(target, rows, units, position, dz, here, sizes, LAYER: tl.constexpr):
    """``dz`` (or ``da``) of the four gates at each row's position, 0 in padding."""
    HIDDEN: tl.constexpr = LAYER.hidden_size
    present = (rows[:, None] < sizes.rows) & (units[None, :] < HIDDEN)
    at = (position.to(tl.int64) * sizes.rows + rows)[:, None] * (4 * HIDDEN) + units[None, :]
    for gate in tl.static_range(4):
        value = narrow(tl.where(here, dz[gate], 0.0), target.dtype.element_ty)
        tl.store(target + at + gate * HIDDEN, value, mask=present)


@triton.jit
def read_tile(s, rows, units, of_batch, loop, saved, grads, sizes, rates, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """Everything of a tile that does not wait for ``dh``.

    Returns three tuples: where its rows are (``valid, position, resets, here``); the cell (``i, f, g, o``, ``c_{s-1}``,
    update mask, cell mask, candidate); what arrives (both zones, and what :func:`arriving` returns).
    """
    valid, position, resets, here = step_tile(s, rows, units, loop, sizes, LAYER)
    masks = tile_masks(rows, units, position, loop.seed, sizes, rates, LAYER)
    zone_hidden, zone_cell, update, cell_mask, output_mask = masks
    of_output, carried, grad_cell = arriving(s, rows, units, position, here, output_mask, grads, sizes, LAYER)
    i = gate_value(0, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates, LAYER, BLOCK)
    f = gate_value(1, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates, LAYER, BLOCK)
    g = gate_value(2, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates, LAYER, BLOCK)
    o = gate_value(3, s, rows, units, valid, position, of_batch, here, loop, saved, sizes, rates, LAYER, BLOCK)
    previous = previous_cells(s, rows, units, position, resets, here, loop, saved, sizes, LAYER)
    candidate = candidate_cell(i, f, g, previous, update, cell_mask)
    place = (valid, position, resets, here)
    cell = (i, f, g, o, previous, update, cell_mask, candidate)
    return place, cell, (zone_hidden, zone_cell, of_output, carried, grad_cell)


@triton.jit
def leave_tile(cell, grad_candidate, grad_o):
    """From the candidate cell's gradient, and ``o``'s, to ``dz`` of the four gates and ``c_{s-1}``'s share by ``f``."""
    i, f, g, o, previous, update, cell_mask, _ = cell
    dz_i, dz_f, dz_g, dz_o, through_forget = leave_cell(i, f, g, o, previous, update, cell_mask, grad_candidate, grad_o)
    return (dz_i, dz_f, dz_g, dz_o), through_forget
