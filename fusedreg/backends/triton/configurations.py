"""Which kernels a call gets, and with tiles of which size: a small table, and no tuning at run time.

A persistent kernel runs the whole loop where its programs fit on the device at once; else each step is a kernel. A
program owns the fewest units with which they fit: the more programs, the more of ``W_hh`` is held in shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton import knobs

from fusedreg.backends.common import allows_tf32
from fusedreg.backends.triton.layout import UNTIED, Layer
from fusedreg.encoding import NORM_BATCH, NORM_LAYER

_UNITS = (8, 16, 32)
_STEP_UNITS = 16
SPARE_BYTES = 24 * 1024  # of a program's shared memory: for sums over warps, and for the compiler's own use
_LEAST_SHARED = 64 * 1024
_TILE_BYTES = 16 * 1024  # of h, of which two tiles are in registers at once, or a single one of twice the size
_TILES = 8  # of a gate at most that are held: each is code of its own, and compiling it takes its time
MANY_ELEMENTS = 1024  # of a tile, that eight warps are needed for to hold a step's values in registers
PADDING = 1.34  # how much wider than H the tiles may be together


class Block(NamedTuple):
    """Sizes of a kernel's tiles, powers of two, and how it runs; compiled in.

    A product takes ``rows`` by ``columns`` of ``h`` and ``columns`` by ``units`` of each gate's ``W_hh``; where that is
    too small to give every warp rows or units of its own, warps ``split`` the columns and add up. A stage that
    owns whole rows takes ``whole_rows`` of them, ``wide`` units at once. ``precision`` is Triton's
    ``input_precision``.
    """

    rows: int
    units: int
    columns: int
    split: int
    wide: int
    whole_rows: int
    persistent: int
    resident: int
    precision: str


class Configuration(NamedTuple):
    """A kernel's tiles and its launch: ``programs`` of units by ``groups`` of rows."""

    block: Block
    programs: int
    groups: int
    rows_per_group: int
    warps: int
    stages: int


def power_of_two(number: int) -> int:
    """The smallest one that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


class Device(NamedTuple):
    """What the table asks about a device: how many programs run at once for certain, and with how much memory each."""

    multiprocessors: int
    shared_bytes: int


def device_limits(device: torch.device) -> Device:
    """Of a GPU; under the interpreter, on a CPU, programs run one after another."""
    if device.type == "cpu":
        return Device(1, _LEAST_SHARED)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED)
    return Device(int(properties.multi_processor_count), int(shared))


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once for certain."""
    return device_limits(device).multiprocessors


def least_units() -> int:
    """The narrowest tile of a product. AMD's matrix instructions take 16 columns, and Triton fails for fewer there."""
    return 16 if torch.version.hip is not None else 8


def wide_columns(width: int) -> int:
    """How many columns at once a program takes that owns whole rows of ``width``."""
    return min(256, max(16, power_of_two(width)))


def whole_rows(rows: int) -> int:
    """How many rows such a program owns: one, but under the interpreter, which runs one program after another."""
    return min(64, power_of_two(rows)) if knobs.runtime.interpret else 1


def product_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision``: TF32 only where torch may use it for float32 products too."""
    # AMD's GPUs have TF32 in one generation alone, and Triton refuses it for the others.
    exact = dtype != torch.float32 or not allows_tf32() or torch.version.hip is not None
    return "ieee" if exact else "tf32"


def forward_configuration(layer: Layer, *, persistent: bool | None = None) -> Configuration:
    """The kernel and the tiles of a forward loop.

    Args:
        layer: the call.
        persistent: force one of the two kinds, for tests. ``None``: persistent where all programs fit at once.

    Raises:
        ValueError: with ``persistent=True`` for a layer that has no such kernel, with the reason.
    """
    hidden_size, rows = layer.flags.hidden_size, layer.sizes.rows
    refused = persistent_refused(layer)
    if persistent and refused:
        raise ValueError(refused)
    dtype, device = layer.tensors.weight_hh.dtype, layer.tensors.weight_hh.device
    limits = device_limits(device)
    present = limits.multiprocessors
    tile_rows = min(64, max(16, power_of_two(rows)))
    precision = product_precision(dtype)
    least = least_units()
    fitting = [units for units in _UNITS if units >= least and -(-hidden_size // units) <= present]
    if persistent is None:
        persistent = bool(fitting) and present > 1 and not refused
    if persistent:
        units = (fitting or [max(least, power_of_two(hidden_size))])[0]
    else:
        units = min(_STEP_UNITS, max(least, power_of_two(hidden_size)))
    columns, resident = _columns(layer, tile_rows, units, precision, limits if persistent else None)
    # One element of the tile to a thread; and warps that have no rows of their own in the product split its columns.
    small = tile_rows <= 32 and (dtype != torch.float32 or precision != "ieee")
    wide = tile_rows * units >= MANY_ELEMENTS
    warps = 8 if wide or (resident and tile_rows == 32 and columns >= 128) else 4
    split = warps if small and columns >= 16 * warps else 1
    programs = -(-hidden_size // units)
    tiles = -(-rows // tile_rows)
    # A batch norm's statistics are over all rows; a layer norm's second stage shares rows out by itself.
    together = layer.flags.norm == NORM_BATCH or (persistent and layer.flags.norm == NORM_LAYER)
    groups = 1 if together else min(tiles, max(1, present // programs)) if persistent else tiles
    tiles_per_group = -(-tiles // groups)
    block = Block(
        rows=tile_rows,
        units=units,
        columns=columns,
        split=split,
        wide=wide_columns(hidden_size),
        whole_rows=whole_rows(rows),
        persistent=int(persistent),
        resident=int(resident),
        precision=precision,
    )
    return Configuration(
        block,
        programs,
        groups=-(-tiles // tiles_per_group),
        rows_per_group=tiles_per_group * tile_rows,
        warps=warps,
        stages=1 if resident else product_stages(_stage_bytes(layer, block), limits.shared_bytes),
    )


def persistent_refused(layer: Layer) -> str | None:
    """Why a layer has no persistent kernel, in either direction, whatever its size; ``None`` where it has."""
    if layer.flags.projected:
        return (
            f"persistent: expected a layer without a projection, got proj_size={layer.flags.projected_size}: its step "
            "has a second product, whose operands all programs would have to exchange; it runs a kernel a step"
        )
    return None


def product_stages(tile_bytes: int, shared_bytes: int) -> int:
    """How many of a product's tiles are on their way at once: three, or what the shared memory holds."""
    return max(1, min(3, (shared_bytes - SPARE_BYTES) // tile_bytes))


def _stage_bytes(layer: Layer, block: Block) -> int:
    """A tile of ``h``, one a gate where its masks are untied, and one of ``W_hh`` for all four gates."""
    copies = 4 if layer.flags.hidden_dropout == UNTIED else 1
    return (block.rows * copies + 4 * block.units) * block.columns * layer.tensors.weight_hh.dtype.itemsize


def _columns(layer: Layer, rows: int, units: int, precision: str, limits: Device | None) -> tuple[int, bool]:
    """How many columns a tile of ``W_hh (4H, P)`` has, and whether a program can hold all of its tiles over the steps.

    True float32 runs on no tensor core: its operands go through registers, so tiles are narrow, and read each step.
    With untied masks a tile of ``h`` is four, which have to be in registers as well.
    """
    depth, dtype = layer.flags.projected_size, layer.tensors.weight_hh.dtype
    most = max(16, power_of_two(depth))
    if dtype == torch.float32 and precision == "ieee":
        return min(16, most), False
    copies = 4 if layer.flags.hidden_dropout == UNTIED else 1
    column_bytes = copies * rows * dtype.itemsize
    fitting = max(16, _TILE_BYTES // column_bytes)
    if limits is not None:
        columns = most if 2 * fitting >= most else fitting
        columns = min(most, max(columns, power_of_two(-(-depth // _TILES))))
        least = min(columns, max(64, most // _TILES))
        while columns >= least:
            padded = -(-depth // columns) * columns
            held = 4 * units * padded * dtype.itemsize + min(2, padded // columns) * columns * column_bytes
            if columns <= 2 * fitting and (padded <= PADDING * depth or columns == least):
                if held + SPARE_BYTES <= limits.shared_bytes:
                    return columns, True
            columns //= 2
    streamed = 64 if rows <= 32 else min(64, max(32, fitting))
    return min(streamed, most), False
