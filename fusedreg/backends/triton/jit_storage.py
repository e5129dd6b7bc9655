"""Between the types that values are stored in and the float32 they are computed in; and the product of two tiles.

Under Triton's interpreter bfloat16 tensors are bare 16-bit numbers: narrowing cuts bits off and products take them for
integers. Both are said here in a way that is right there too, and is the plain instruction where compiled.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))
_FIXED_NAN: tl.constexpr = tl.constexpr(-32768)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``a b + accumulator`` of tiles in the storage type, summed in float32.

    ``PRECISION`` is Triton's ``input_precision`` of float32 tiles: ``"ieee"`` or ``"tf32"``.
    """
    if _INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        result = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return result


@triton.jit
def tile_columns(first_column, BLOCK: tl.constexpr):
    """The columns of a tile: in one piece, or ``(split, ·)``, a piece for each warp."""
    if BLOCK.split > 1:
        # A sum of two ranges and not one range reshaped: so the compiler sees what is adjacent.
        piece: tl.constexpr = BLOCK.columns // BLOCK.split
        columns = first_column + (tl.arange(0, BLOCK.split) * piece)[:, None] + tl.arange(0, piece)[None, :]
    else:
        columns = first_column + tl.arange(0, BLOCK.columns)
    return columns


@triton.jit
def sum_of_pieces(pieces, SPLIT: tl.constexpr):
    """The sum of a product that ``SPLIT`` warps have a piece each of, ``(split, rows, units)``: 2, 4 or 8; 1 is whole.

    By pairs, and not by ``tl.sum``: that leaves the whole sum with every warp, each of which would then do all of what
    follows; a pair has to be one thread's, which shares the elements out between the warps again.
    """
    total = pieces
    if SPLIT > 1:
        rows: tl.constexpr = pieces.shape[1]
        units: tl.constexpr = pieces.shape[2]
        total = tl.permute(total, (1, 2, 0))
        if SPLIT == 8:
            low, high = tl.split(tl.reshape(total, (rows, units, 4, 2)))
            total = low + high
        if SPLIT >= 4:
            low, high = tl.split(tl.reshape(total, (rows, units, 2, 2)))
            total = low + high
        low, high = tl.split(total)
        total = low + high
    return total


@triton.jit
def keep_activation(value, IS_TANH: tl.constexpr, FIXED: tl.constexpr):
    """A gate as it is saved: as it is, or (``FIXED``, beside 16-bit inputs) in 16-bit fixed point with a mark for NaN.

    A gate lies in [0, 1] or [-1, 1], where fixed point is exact to 8e-6: as ``csrc/cpu/kept.h``.
    """
    if FIXED:
        offset: tl.constexpr = 0.0 if IS_TANH else 0.5
        scale: tl.constexpr = 32767.0 if IS_TANH else 65534.0
        # Adding 1.5 * 2**23 rounds to an integer, which is then in the low bits.
        rounded = ((value - offset) * scale + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        kept = tl.where(value == value, rounded, _FIXED_NAN).to(tl.int16)
    else:
        kept = value
    return kept


@triton.jit
def kept_activation(kept, IS_TANH: tl.constexpr, FIXED: tl.constexpr):
    """The gate that :func:`keep_activation` saved, in float32."""
    if FIXED:
        offset: tl.constexpr = 0.0 if IS_TANH else 0.5
        scale: tl.constexpr = 1.0 / 32767.0 if IS_TANH else 1.0 / 65534.0
        value = tl.where(kept == _FIXED_NAN, float("nan"), kept.to(tl.float32) * scale + offset)
    else:
        value = kept
    return value


@triton.jit
def narrow(value, STORAGE: tl.constexpr):
    """float32 in the storage type, rounded to nearest, ties to even."""
    if _INTERPRETED and STORAGE == tl.bfloat16:
        # The interpreter would cut the low bits off.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        narrowed = tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrowed = value.to(STORAGE)
    return narrowed


@triton.jit
def rounded(value, STORAGE: tl.constexpr):
    """float32 rounded to what the storage type can hold, in float32 again."""
    return narrow(value, STORAGE).to(tl.float32)
