"""A tile of rows and units at one step of the forward: what it reads, what it writes, and the cell between.

Every function takes the tile as ``rows`` and ``units``, and what the call consists of as ``tensors`` and ``numbers``
(:class:`~fusedreg.backends.triton.layout.ForwardTensors` and :class:`~fusedreg.backends.triton.layout.Numbers`).
Padding is written as zeros, and never read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.jit_cell import begin_cell, finish_cell, tanh, zoned
from fusedreg.backends.triton.jit_storage import keep_activation, narrow, rounded
from fusedreg.backends.triton.jit_tile import UNTIED, hidden_drops, row_order, row_resets, tile_masks


@triton.jit
def tile_order(s, rows, tensors, numbers, LAYER: tl.constexpr):
    """Which rows take part in step ``s``, their positions, and which of them start from zeros."""
    valid, position = row_order(s, rows, tensors.inputs.lengths, numbers.sizes, LAYER.reverse)
    return valid, position, row_resets(rows, valid, position, tensors.inputs.reset, numbers.sizes)


@triton.jit
def load_terms(rows, units, valid, position, tensors, numbers, LAYER: tl.constexpr):
    """``N_r(r)`` and the biases: what is added to the recurrent term of each gate."""
    size: tl.constexpr = LAYER.hidden_size
    inside = valid[:, None] & (units < size)[None, :]
    at = ((position.to(tl.int64) * numbers.sizes.rows + rows) * (4 * size))[:, None] + units[None, :]
    terms = tensors.inputs.input_terms + at
    bias = tensors.inputs.bias + units
    known = units < size
    return (
        tl.load(terms, mask=inside, other=0.0) + tl.load(bias, mask=known, other=0.0)[None, :],
        tl.load(terms + size, mask=inside, other=0.0) + tl.load(bias + size, mask=known, other=0.0)[None, :],
        tl.load(terms + 2 * size, mask=inside, other=0.0) + tl.load(bias + 2 * size, mask=known, other=0.0)[None, :],
        tl.load(terms + 3 * size, mask=inside, other=0.0) + tl.load(bias + 3 * size, mask=known, other=0.0)[None, :],
    )


@triton.jit
def load_hidden(rows, units, valid, resets, tensors, LAYER: tl.constexpr):
    """``h_{s-1}`` in float32, after the step's reset."""
    size: tl.constexpr = LAYER.projected_size
    kept = (valid & ~resets)[:, None] & (units < size)[None, :]
    at = (rows.to(tl.int64) * size)[:, None] + units[None, :]
    return tl.load(tensors.results.final_hidden + at, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def load_states(rows, units, valid, resets, tensors, LAYER: tl.constexpr):
    """``h_{s-1}`` and ``c_{s-1}`` in float32, after the step's reset; with a projection no ``h``, but zeros."""
    size: tl.constexpr = LAYER.hidden_size
    kept = (valid & ~resets)[:, None] & (units < size)[None, :]
    at = (rows.to(tl.int64) * size)[:, None] + units[None, :]
    cell = tl.load(tensors.results.final_cell + at, mask=kept, other=0.0)
    if LAYER.projected:
        hidden = tl.zeros_like(cell)
    else:
        hidden = load_hidden(rows, units, valid, resets, tensors, LAYER)
    return hidden, cell


@triton.jit
def raw_rows(rows, position, tensors, numbers, LAYER: tl.constexpr):
    """Where each row's raw ``a (4H,)`` of this step stands: where it is kept for the backward, else in scratch."""
    if tensors.results.gates is None:
        start = tensors.state.raw + rows.to(tl.int64) * (4 * LAYER.hidden_size)
    else:
        start = tensors.results.gates + (position.to(tl.int64) * numbers.sizes.rows + rows) * (4 * LAYER.hidden_size)
    return start


@triton.jit
def store_raw(a_i, a_f, a_g, a_o, rows, units, valid, position, tensors, numbers, LAYER: tl.constexpr):
    """Keep the raw ``a`` of a layer with a norm, with 0 in padding."""
    size: tl.constexpr = LAYER.hidden_size
    inside = (rows < numbers.sizes.rows)[:, None] & (units < size)[None, :]
    to = raw_rows(rows, position, tensors, numbers, LAYER)[:, None] + units[None, :]
    kept = valid[:, None]
    tl.store(to, tl.where(kept, a_i, 0.0), mask=inside)
    tl.store(to + size, tl.where(kept, a_f, 0.0), mask=inside)
    tl.store(to + 2 * size, tl.where(kept, a_g, 0.0), mask=inside)
    tl.store(to + 3 * size, tl.where(kept, a_o, 0.0), mask=inside)


@triton.jit
def load_raw(rows, units, valid, position, tensors, numbers, LAYER: tl.constexpr):
    """What :func:`store_raw` kept, 0 in padding."""
    size: tl.constexpr = LAYER.hidden_size
    inside = valid[:, None] & (units < size)[None, :]
    start = raw_rows(rows, position, tensors, numbers, LAYER)[:, None] + units[None, :]
    return (
        tl.load(start, mask=inside, other=0.0),
        tl.load(start + size, mask=inside, other=0.0),
        tl.load(start + 2 * size, mask=inside, other=0.0),
        tl.load(start + 3 * size, mask=inside, other=0.0),
    )


@triton.jit
def keep_gates(i, f, g, o, rows, units, valid, position, tensors, numbers, LAYER: tl.constexpr):
    """Keep the activated gates of a layer without a norm, where the backward wants them."""
    if tensors.results.gates is not None:
        size: tl.constexpr = LAYER.hidden_size
        fixed: tl.constexpr = LAYER.fixed_gates
        inside = (rows < numbers.sizes.rows)[:, None] & (units < size)[None, :]
        at = ((position.to(tl.int64) * numbers.sizes.rows + rows) * (4 * size))[:, None] + units[None, :]
        to = tensors.results.gates + at
        kept = valid[:, None]
        tl.store(to, tl.where(kept, keep_activation(i, False, fixed), 0), mask=inside)
        tl.store(to + size, tl.where(kept, keep_activation(f, False, fixed), 0), mask=inside)
        tl.store(to + 2 * size, tl.where(kept, keep_activation(g, True, fixed), 0), mask=inside)
        tl.store(to + 3 * size, tl.where(kept, keep_activation(o, False, fixed), 0), mask=inside)


@triton.jit
def store_cell(candidate, o, rows, units, valid, tensors, LAYER: tl.constexpr):
    """Put the candidate cell and the output gate by, until the cell's moments are known."""
    size: tl.constexpr = LAYER.hidden_size
    at = (rows.to(tl.int64) * size)[:, None] + units[None, :]
    inside = valid[:, None] & (units < size)[None, :]
    tl.store(tensors.state.candidates + at, candidate, mask=inside)
    tl.store(tensors.state.output_gates + at, o, mask=inside)


@triton.jit
def load_cell(rows, units, valid, tensors, LAYER: tl.constexpr):
    """What :func:`store_cell` put by, 0 in padding."""
    size: tl.constexpr = LAYER.hidden_size
    at = (rows.to(tl.int64) * size)[:, None] + units[None, :]
    inside = valid[:, None] & (units < size)[None, :]
    candidate = tl.load(tensors.state.candidates + at, mask=inside, other=0.0)
    return candidate, tl.load(tensors.state.output_gates + at, mask=inside, other=0.0)


@triton.jit
def publish(half, hidden, dropped, rows, units, live, tensors, numbers, LAYER: tl.constexpr):
    """Hand ``h``, in the storage type, to the next step's product: 0 where ``dropped`` has a gate's bit.

    One copy, or with untied masks one a gate. The scale of what is kept is the product's.
    """
    size: tl.constexpr = LAYER.projected_size
    copies: tl.constexpr = 4 if LAYER.hidden_dropout == UNTIED else 1
    copy = numbers.sizes.rows.to(tl.int64) * size
    inside = live[:, None] & (units < size)[None, :]
    to = tensors.state.exchange + half * (copies * copy) + (rows.to(tl.int64) * size)[:, None] + units[None, :]
    zero = tl.zeros_like(hidden)
    if LAYER.hidden_dropout == 0:
        tl.store(to, hidden, mask=inside)
    else:
        for gate in tl.static_range(copies):
            tl.store(to + gate * copy, tl.where((dropped >> gate) & 1 != 0, zero, hidden), mask=inside)


@triton.jit
def draw_drops(rows, units, tensors, numbers, LAYER: tl.constexpr):
    """What :func:`publish` drops: :func:`~fusedreg.backends.triton.jit_tile.hidden_drops` with the call's key."""
    return hidden_drops(rows, units, tensors.inputs.seed, numbers.sizes, numbers.rates, LAYER)


@triton.jit
def begin_tile(
    z_i, z_f, z_g, z_o, rows, units, valid, position, previous_cell, update, cell, tensors, numbers,
    LAYER: tl.constexpr,
):  # fmt: skip
    """From pre-activations to the output gate and the candidate cell; keeps the gates of a layer without a norm."""
    i, f, g, o, candidate = begin_cell(z_i, z_f, z_g, z_o, previous_cell, update, cell)
    if LAYER.norm == 0:
        keep_gates(i, f, g, o, rows, units, valid, position, tensors, numbers, LAYER)
    return o, candidate


@triton.jit
def finish_states(
    argument, o, candidate, previous_hidden, previous_cell, zone_hidden, zone_cell, output_mask, tensors,
    LAYER: tl.constexpr,
):  # fmt: skip
    """From ``N_c(candidate)`` to the new ``h``, rounded to the storage type, the new ``c``, and ``y``.

    With a projection ``h`` is what goes into its product, ``u``, and ``y`` is nothing.
    """
    if LAYER.projected:
        output = o * tanh(argument)
        hidden = output
        cell = zoned(zone_cell, previous_cell, candidate)
    else:
        hidden, cell, hidden_candidate = finish_cell(
            argument, o, candidate, previous_hidden, previous_cell, zone_hidden, zone_cell
        )
        hidden, output = finish_hidden(hidden, hidden_candidate, output_mask, tensors, LAYER)
    return hidden, cell, output


@triton.jit
def finish_hidden(hidden, hidden_candidate, output_mask, tensors, LAYER: tl.constexpr):
    """The new ``h`` rounded to the storage type, and ``y``."""
    hidden = rounded(hidden, tensors.results.output.dtype.element_ty)
    if LAYER.candidate_output:
        output = hidden_candidate
    else:
        output = hidden
    if LAYER.output_dropout or LAYER.dropout:
        output = output * output_mask
    return hidden, output


@triton.jit
def hand_on(half, hidden, dropped, rows, units, valid, tensors, numbers, LAYER: tl.constexpr):
    """What others wait for: ``h`` for the next step's product, or ``u`` for this step's projection."""
    if LAYER.projected:
        at = (rows.to(tl.int64) * LAYER.hidden_size)[:, None] + units[None, :]
        inside = valid[:, None] & (units < LAYER.hidden_size)[None, :]
        tl.store(tensors.state.activated + at, hidden, mask=inside)
    else:
        storage: tl.constexpr = tensors.results.output.dtype.element_ty
        publish(half, narrow(hidden, storage), dropped, rows, units, valid, tensors, numbers, LAYER)


@triton.jit
def store_states(hidden, cell, output, rows, units, valid, position, tensors, numbers, LAYER: tl.constexpr):
    """Write every result of the step, and the state that the next one finds; with a projection the cell's alone."""
    results = tensors.results
    size: tl.constexpr = LAYER.hidden_size
    known = (units < size)[None, :]
    live = valid[:, None] & known
    if not LAYER.projected:
        store_hidden(hidden, output, rows, units, valid, position, tensors, numbers, LAYER)
    if results.cells is not None:
        inside = (rows < numbers.sizes.rows)[:, None] & known
        at = ((position.to(tl.int64) * numbers.sizes.rows + rows) * size)[:, None] + units[None, :]
        tl.store(results.cells + at, tl.where(live, cell, 0.0), mask=inside)
    carried = (rows.to(tl.int64) * size)[:, None] + units[None, :]
    tl.store(results.final_cell + carried, cell, mask=live)


@triton.jit
def store_hidden(hidden, output, rows, units, valid, position, tensors, numbers, LAYER: tl.constexpr):
    """Write ``y``, and ``h`` for the next step and, where it is kept, for the backward."""
    results = tensors.results
    storage: tl.constexpr = results.output.dtype.element_ty
    size: tl.constexpr = LAYER.projected_size
    known = (units < size)[None, :]
    live = valid[:, None] & known
    inside = (rows < numbers.sizes.rows)[:, None] & known
    at = ((position.to(tl.int64) * numbers.sizes.rows + rows) * size)[:, None] + units[None, :]
    tl.store(results.output + at, narrow(tl.where(live, output, 0.0), storage), mask=inside)
    if results.hidden is not None:
        tl.store(results.hidden + at, narrow(tl.where(live, hidden, 0.0), storage), mask=inside)
    carried = (rows.to(tl.int64) * size)[:, None] + units[None, :]
    tl.store(results.final_hidden + carried, narrow(hidden, storage), mask=live)


@triton.jit
def finish_tile(
    s, argument, o, candidate, rows, units, valid, position, previous_hidden, previous_cell, zone_hidden, zone_cell,
    output_mask, tensors, numbers, LAYER: tl.constexpr,
):  # fmt: skip
    """From ``N_c(candidate)`` to the new state and every result of the step."""
    hidden, cell, output = finish_states(
        argument, o, candidate, previous_hidden, previous_cell, zone_hidden, zone_cell, output_mask, tensors, LAYER
    )
    dropped = draw_drops(rows, units, tensors, numbers, LAYER)
    hand_on((s + 1) % 2, hidden, dropped, rows, units, valid, tensors, numbers, LAYER)
    store_states(hidden, cell, output, rows, units, valid, position, tensors, numbers, LAYER)


@triton.jit
def draw_masks(rows, units, position, tensors, numbers, LAYER: tl.constexpr):
    """The step's masks: :func:`~fusedreg.backends.triton.jit_tile.tile_masks` with the call's key."""
    return tile_masks(rows, units, position, tensors.inputs.seed, numbers.sizes, numbers.rates, LAYER)
