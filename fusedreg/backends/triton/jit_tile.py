"""What a step needs to know of a tile of rows and units, forward and backward alike: where its rows stand, its masks.

Rows and units are integer tensors; a tile is ``rows[:, None]`` by ``units[None, :]``. What is compiled in is read from
``LAYER`` (:class:`~fusedreg.backends.triton.layout.LayerFlags`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.jit_masks import (
    SEQUENCE,
    UNTIED_HIDDEN,
    WEIGHT,
    family_words,
    is_below,
    row_key,
    step_words,
)

DRAWN: tl.constexpr = tl.constexpr(1)
EXPECTED: tl.constexpr = tl.constexpr(2)
TIED: tl.constexpr = tl.constexpr(1)
UNTIED: tl.constexpr = tl.constexpr(2)
BY_STEP: tl.constexpr = tl.constexpr(1)
BY_SEQUENCE: tl.constexpr = tl.constexpr(2)
NORM_BATCH: tl.constexpr = tl.constexpr(1)
NORM_LAYER: tl.constexpr = tl.constexpr(2)


@triton.jit
def row_order(s, rows, lengths, sizes, REVERSE: tl.constexpr):
    """Which rows take part in the step processed at ``s``, and the position ``t`` of each; padding stands at ``s``.

    A position is visited exactly once over all steps, so a loop that writes its results there writes all of them.
    """
    present = rows < sizes.rows
    if lengths is None:
        valid = present
        if REVERSE:
            position = tl.where(valid, sizes.steps - 1 - s, s)
        else:
            position = tl.where(valid, s, s)
    else:
        length = tl.load(lengths + rows, mask=present, other=0)
        length = tl.minimum(tl.maximum(length, 0), sizes.steps).to(tl.int32)
        valid = present & (s < length)
        if REVERSE:
            position = tl.where(valid, length - 1 - s, s)
        else:
            position = tl.where(valid, s, s)
    return valid, position


@triton.jit
def mask_if(condition, mask):
    """``mask`` where one condition holds, else nothing: Triton 3.9's interpreter takes no ``mask & condition`` of one
    that is no tile.
    """
    return tl.where(condition, mask, False)


@triton.jit
def row_resets(rows, valid, position, reset, sizes):
    """Which of the valid rows start this step from a state of zeros."""
    if reset is None:
        resets = rows < 0
    else:
        at = position.to(tl.int64) * sizes.rows + rows
        resets = tl.load(reset + at, mask=valid, other=0) != 0
    return resets


@triton.jit
def inverted(word, threshold, scale):
    """An inverted dropout's mask: 0, or ``scale`` where kept."""
    return tl.where(is_below(word, threshold), 0.0, scale)


@triton.jit
def row_counters(rows, seed, sizes, LAYER: tl.constexpr):
    """:func:`~fusedreg.backends.triton.jit_masks.row_key` of a tile's rows, against its units; zeros without masks."""
    row = rows[:, None]
    if seed is None:
        key0 = tl.full((), 0, tl.uint32)
        key1 = key0
        first_step = row * 0
    else:
        key0, key1, row, first_step = row_key(row, seed, sizes.rows, sizes.group_rows, LAYER.grouped_seed)
    return key0, key1, row, first_step


@triton.jit
def tile_masks(rows, units, position, seed, sizes, rates, LAYER: tl.constexpr):
    """``zone_hidden, zone_cell, update, cell, output`` of a tile at one step, float32 and of the tile's shape.

    What is off is 1, and a zone 0. ``output`` is output dropout's times that of the dropout between layers.
    """
    unit = units[None, :]
    key0, key1, row, first_step = row_counters(rows, seed, sizes, LAYER)
    blank = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
    zone_hidden = blank
    zone_cell = blank
    update = blank + 1.0
    cell = blank + 1.0
    output = blank + 1.0
    hidden_drawn: tl.constexpr = LAYER.zoneout_hidden == DRAWN
    cell_drawn: tl.constexpr = LAYER.zoneout_cell == DRAWN
    update_by_step: tl.constexpr = LAYER.update_dropout == BY_STEP
    if hidden_drawn or cell_drawn or update_by_step or LAYER.dropout:
        counted = position[:, None] + first_step
        w0, w1, w2, w3 = step_words(unit, row, counted, rates.stream, key0, key1)
        if hidden_drawn:
            zone_hidden = tl.where(is_below(w0, rates.zoneout_hidden_threshold), 1.0, blank)
        if cell_drawn:
            zone_cell = tl.where(is_below(w1, rates.zoneout_cell_threshold), 1.0, blank)
        if update_by_step:
            update = inverted(w2, rates.update_threshold, rates.update_scale)
        if LAYER.dropout:
            output = inverted(w3, rates.dropout_threshold, rates.dropout_scale)
    update_by_sequence: tl.constexpr = LAYER.update_dropout == BY_SEQUENCE
    if LAYER.cell_dropout == DRAWN or update_by_sequence or LAYER.output_dropout:
        w0, w1, w2, w3 = family_words(unit, row, SEQUENCE, rates.stream, key0, key1)
        if LAYER.cell_dropout == DRAWN:
            cell = tl.where(is_below(w1, rates.cell_threshold), 0.0, cell)
        if update_by_sequence:
            update = inverted(w2, rates.update_threshold, rates.update_scale)
        if LAYER.output_dropout:
            output = output * inverted(w3, rates.output_threshold, rates.output_scale)
    if LAYER.zoneout_hidden == EXPECTED:
        zone_hidden = blank + rates.zoneout_hidden
    if LAYER.zoneout_cell == EXPECTED:
        zone_cell = blank + rates.zoneout_cell
    if LAYER.cell_dropout == EXPECTED:
        cell = blank + rates.cell_expectation
    return zone_hidden, zone_cell, update, cell, output


@triton.jit
def hidden_drops(rows, units, seed, sizes, rates, LAYER: tl.constexpr):
    """What hidden dropout drops of a tile of ``h``: a bit a gate, or one where masks are tied.

    Not the words themselves, which would take four registers from before a wait until after it.
    """
    dropped = tl.zeros([rows.shape[0], units.shape[0]], tl.int32)
    if LAYER.hidden_dropout != 0:
        key0, key1, row, _ = row_counters(rows, seed, sizes, LAYER)
        if LAYER.hidden_dropout == UNTIED:
            words = family_words(units[None, :], row, UNTIED_HIDDEN, rates.stream, key0, key1)
            for gate in tl.static_range(4):
                dropped += is_below(words[gate], rates.hidden_threshold).to(tl.int32) << gate
        else:
            words = family_words(units[None, :], row, SEQUENCE, rates.stream, key0, key1)
            dropped += is_below(words[0], rates.hidden_threshold).to(tl.int32)
    return dropped


@triton.jit
def weight_is_dropped(row, column, stream, threshold, key0, key1, BY_ROW: tl.constexpr):
    """Weight dropout's mask of elements ``row, column`` of a ``(4H, ·)`` weight; the word is ``column % 4``."""
    if BY_ROW:
        w0, w1, w2, w3 = family_words(column * 0, row, WEIGHT, stream, key0, key1)
        word = w0
    else:
        w0, w1, w2, w3 = family_words(column // 4, row, WEIGHT, stream, key0, key1)
        choice = column % 4
        word = tl.where(choice == 0, w0, tl.where(choice == 1, w1, tl.where(choice == 2, w2, w3)))
    return is_below(word, threshold)
