"""Which kernels a call gets, and with tiles of which size: a small table, and no tuning at run time.

A persistent kernel runs the whole loop where its programs fit on the device at once; else each step is a kernel. A
program owns the fewest units with which they fit: the more programs, the more of ``W_hh`` is held in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton import knobs

from fusedreg.backends.triton.layout import Layer
from fusedreg.encoding import NORM_BATCH, NORM_LAYER

# Bytes of W_hh that a program holds over all steps: half of the registers of a multiprocessor with 256 threads.
_RESIDENT_BYTES = 96 * 1024
_UNITS = (8, 16, 32)
_STEP_UNITS = 32


class Block(NamedTuple):
    """Sizes of a kernel's tiles, powers of two, and how it runs; compiled in.

    A product takes ``rows`` by ``columns`` of ``h`` and ``columns`` by ``units`` of each gate's ``W_hh``. A stage that
    owns whole rows takes ``whole_rows`` of them, ``wide`` units at once. ``precision`` is Triton's
    ``input_precision``.
    """

    rows: int
    units: int
    columns: int
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


def multiprocessors(device: torch.device) -> int:
    """How many programs of 8 warps run at once on a device for certain; one under the interpreter, on a CPU."""
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def wide_columns(width: int) -> int:
    """How many columns at once a program takes that owns whole rows of ``width``."""
    return min(256, max(16, power_of_two(width)))


def whole_rows(rows: int) -> int:
    """How many rows such a program owns: one, but under the interpreter, which runs one program after another."""
    return min(64, power_of_two(rows)) if knobs.runtime.interpret else 1


def product_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision``: TF32 only where torch may use it for float32 products too."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def forward_configuration(layer: Layer, *, persistent: bool | None = None) -> Configuration:
    """The kernel and the tiles of a forward loop.

    Args:
        layer: the call.
        persistent: force one of the two kinds, for tests. ``None``: persistent where all programs fit at once.
    """
    hidden_size, rows = layer.flags.hidden_size, layer.sizes.rows
    dtype, device = layer.tensors.weight_hh.dtype, layer.tensors.weight_hh.device
    present = multiprocessors(device)
    tile_rows = min(64, max(16, power_of_two(rows)))
    columns = min(64, max(16, power_of_two(hidden_size)))
    fitting = [units for units in _UNITS if -(-hidden_size // units) <= present]
    if persistent is None:
        persistent = bool(fitting)
    units = (fitting or [_UNITS[-1]])[0] if persistent else min(_STEP_UNITS, max(8, power_of_two(hidden_size)))
    programs = -(-hidden_size // units)
    tiles = -(-rows // tile_rows)
    # A batch norm's statistics are over all rows; a layer norm's second stage shares rows out by itself.
    together = layer.flags.norm == NORM_BATCH or (persistent and layer.flags.norm == NORM_LAYER)
    groups = 1 if together else min(tiles, max(1, present // programs)) if persistent else tiles
    tiles_per_group = -(-tiles // groups)
    resident = persistent and 4 * units * hidden_size * dtype.itemsize <= _RESIDENT_BYTES
    block = Block(
        rows=tile_rows,
        units=units,
        columns=columns,
        wide=wide_columns(hidden_size),
        whole_rows=whole_rows(rows),
        persistent=int(persistent),
        resident=int(resident),
        precision=product_precision(dtype),
    )
    return Configuration(
        block,
        programs,
        groups=-(-tiles // tiles_per_group),
        rows_per_group=tiles_per_group * tile_rows,
        warps=8 if persistent else 4,
        stages=1 if persistent else 3,
    )
