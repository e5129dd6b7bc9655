"""The masks' random words in Triton: Philox4x32-10 on the counters of :mod:`fusedreg.masks`, bit for bit.

Counters are logical coordinates (unit, row, position), so any tiling draws the same bits. A step's word serves each
of its sites; which word serves which is in the table of :mod:`fusedreg.masks`. Coordinates are integer tensors or
scalars that broadcast against each other; words have their common shape.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math

import triton
import triton.language as tl

SEQUENCE: tl.constexpr = tl.constexpr(0xFFFFFFFF)
UNTIED_HIDDEN: tl.constexpr = tl.constexpr(0xFFFFFFFE)
INPUT: tl.constexpr = tl.constexpr(0xFFFFFFFD)
UNTIED_INPUT: tl.constexpr = tl.constexpr(0xFFFFFFFC)
WEIGHT: tl.constexpr = tl.constexpr(0xFFFFFFFB)

_MULTIPLIER_0: tl.constexpr = tl.constexpr(0xD2511F53)
_MULTIPLIER_1: tl.constexpr = tl.constexpr(0xCD9E8D57)
_KEY_INCREMENT_0: tl.constexpr = tl.constexpr(0x9E3779B9)
_KEY_INCREMENT_1: tl.constexpr = tl.constexpr(0xBB67AE85)
_ROUNDS: tl.constexpr = tl.constexpr(10)


def threshold(rate: float) -> int:
    """The word below which an element is dropped, ``floor(rate * 2**32)``, as the signed 32-bit number of its bits.

    Kernels take it as an ``int32`` whatever the rate, so that no rate compiles anything anew.
    """
    word = math.floor(rate * 2.0**32)
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def is_below(word, threshold):
    """Whether an element is dropped, or zoned out: its word is below the threshold, both without sign."""
    return word < tl.cast(tl.cast(threshold, tl.int32), tl.uint32, bitcast=True)


@triton.jit
def load_key(seed):
    """The key: the two words, low one first, of the int64 that ``seed`` points to."""
    value = tl.load(seed)
    return (value & 0xFFFFFFFF).to(tl.uint32), ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def row_key(row, seed, rows, group_rows, GROUPED: tl.constexpr):
    """What the counters of some rows are made with: the key's two words, the row that is counted, its first step.

    ``GROUPED``: ``seed`` points to ``(S, 2)`` rows of a seed and a first step, each for ``group_rows`` rows of the
    call, which are counted from 0 in each group. Otherwise all rows have one seed, and the first step 0.
    """
    if GROUPED:
        group = row // group_rows
        own = seed + 2 * group
        value = tl.load(own, mask=row < rows, other=0)
        key0 = (value & 0xFFFFFFFF).to(tl.uint32)
        key1 = ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)
        counted = row - group * group_rows
        first_step = tl.load(own + 1, mask=row < rows, other=0)
    else:
        key0, key1 = load_key(seed)
        counted = row
        first_step = row * 0
    return key0, key1, counted, first_step


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Four words from a counter of four and a key of two, all ``uint32``."""
    for _ in tl.static_range(_ROUNDS):
        high0 = tl.umulhi(c0, _MULTIPLIER_0)
        low0 = tl.mul(c0, _MULTIPLIER_0, sanitize_overflow=False)
        high1 = tl.umulhi(c2, _MULTIPLIER_1)
        low1 = tl.mul(c2, _MULTIPLIER_1, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = tl.add(k0, _KEY_INCREMENT_0, sanitize_overflow=False)
        k1 = tl.add(k1, _KEY_INCREMENT_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def step_words(unit, row, position, stream, k0, k1):
    """zoneout_hidden, zoneout_cell, update_dropout (by step) and dropout (between layers) of one position.

    ``stream`` is ``layer * 2 + direction``; ``position`` is ``t``, by row where rows stand at different ones.
    """
    return philox4x32_10(
        tl.cast(unit, tl.uint32),
        tl.cast(row, tl.uint32),
        tl.cast(position, tl.uint32),
        tl.cast(stream, tl.uint32),
        k0,
        k1,
    )


@triton.jit
def family_words(unit, row, FAMILY: tl.constexpr, stream, k0, k1):
    """The four words of a family that is drawn once a call: ``SEQUENCE``, ``UNTIED_HIDDEN`` and so on.

    For ``WEIGHT``, ``row`` is the row of 4H and ``unit`` the column divided by 4 (0 for ``weight_mask="row"``).
    """
    return philox4x32_10(
        tl.cast(unit, tl.uint32),
        tl.cast(row, tl.uint32),
        tl.full((), FAMILY, tl.uint32),
        tl.cast(stream, tl.uint32),
        k0,
        k1,
    )
