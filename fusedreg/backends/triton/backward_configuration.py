"""Which kernels a backward loop gets, and with tiles of which size: a small table, and no tuning at run time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fusedreg.backends.triton import configurations
from fusedreg.backends.triton.configurations import MANY_ELEMENTS, power_of_two, product_precision, product_stages
from fusedreg.backends.triton.layout import FUSED, UNTIED, Layer
from fusedreg.encoding import NORM_BATCH, NORM_LAYER, NORM_NONE

# Values of a gate that a stage which owns whole rows has at once, at most.
_WHOLE_ROWS_ELEMENTS = 1024
# Of a tile of da beside held weights: two are in registers at once. Each is code of its own, and there are not many.
_TILE_BYTES = 16 * 1024
_MOST_TILES = 16


class BackwardBlock(NamedTuple):
    """Sizes of a kernel's tiles, powers of two, and how it runs; compiled in.

    A product takes ``rows`` by ``columns`` of ``da`` and ``columns`` by ``units`` of ``W_hh``, which a program holds
    over all steps where it is ``resident``; where that leaves a warp nothing of its own, warps ``split`` the columns
    and add up. ``wide`` holds a whole row's units, and a stage that owns rows takes ``whole_rows`` of them. ``norm`` is
    the norm that acts inside the loop, ``activated`` whether the gates were kept after their activations,
    ``sums_by_row`` whether the gradients of ``N_c``'s gain and shift are left by row or by step, ``precision`` Triton's
    ``input_precision``.
    """

    rows: int
    units: int
    columns: int
    split: int
    wide: int
    whole_rows: int
    norm: int
    activated: int
    persistent: int
    resident: int
    sums_by_row: int
    precision: str


class BackwardConfiguration(NamedTuple):
    """A kernel's tiles and its launch: how many tiles there are, and how many programs share them out."""

    block: BackwardBlock
    unit_tiles: int
    row_tiles: int
    programs: int
    launch: dict[str, Any]
    rows_launch: dict[str, Any]


def backward_configuration(layer: Layer, *, activated: bool, persistent: bool | None = None) -> BackwardConfiguration:
    """The kernel and the tiles of a backward loop.

    Args:
        layer: the call.
        activated: whether the saved gates went through their activations.
        persistent: force one of the two kinds, for tests. ``None``: persistent where that leaves a program
            two tiles at most, so that a step's launch would cost more than it brings.

    Raises:
        ValueError: with ``persistent=True`` for a layer that has no such kernel, with the reason.
    """
    flags, rows, hidden_size = layer.flags, layer.sizes.rows, layer.flags.hidden_size
    dtype, device = layer.tensors.weight_hh.dtype, layer.tensors.weight_hh.device
    norm = flags.norm if flags.norm_recurrent or flags.norm_cell else NORM_NONE
    limits = configurations.device_limits(device)
    present = limits.multiprocessors
    tile_rows, tile_units = _tiles(rows, hidden_size, present, norm)
    unit_tiles, row_tiles = -(-hidden_size // tile_units), -(-rows // tile_rows)
    tiles = unit_tiles if norm == NORM_BATCH else unit_tiles * row_tiles
    refused = configurations.persistent_refused(layer)
    if persistent and refused:
        raise ValueError(refused)
    if persistent is None:
        persistent = tiles <= 2 * present and device.type != "cpu" and not refused
    precision = product_precision(dtype)
    wide = max(16, power_of_two(hidden_size))
    whole_rows = min(power_of_two(-(-rows // present)), max(1, _WHOLE_ROWS_ELEMENTS // wide))
    warps = _warps(tile_rows * tile_units, whole_rows * wide if persistent else 0, norm)
    # Warps that have no rows of their own in the product split its columns.
    small = tile_rows <= 32 and not (dtype == torch.float32 and precision == "ieee")
    held = 0
    if persistent and tiles <= present and tile_rows <= 32:  # with more rows, most of what is read is da
        held = _held_columns(layer, tile_rows, tile_units, precision, limits.shared_bytes)
    columns = held or min(_columns(dtype, precision, tile_rows * tile_units, warps if small else 0), wide)
    block = BackwardBlock(
        rows=tile_rows,
        units=tile_units,
        columns=columns,
        split=warps if small and columns >= 16 * warps else 1,
        wide=wide,
        whole_rows=whole_rows,
        norm=norm,
        activated=int(activated),
        persistent=int(persistent),
        resident=int(held > 0),
        sums_by_row=int(norm == NORM_LAYER or layer.gradient_groups > 0),
        precision=precision,
    )
    tile_bytes = (block.rows + block.units) * block.columns * dtype.itemsize
    return BackwardConfiguration(
        block,
        unit_tiles,
        row_tiles,
        programs=min(tiles, present),
        launch={"num_warps": warps, "num_stages": product_stages(tile_bytes, limits.shared_bytes), **FUSED},
        rows_launch={"num_warps": min(16, max(1, block.whole_rows * wide // 128)), **FUSED},
    )


def _warps(elements: int, of_whole_rows: int, norm: int) -> int:
    """So many that no value has to leave the registers, of which a norm's passes need most."""
    if norm == NORM_LAYER and of_whole_rows >= _WHOLE_ROWS_ELEMENTS:
        return 8
    return 8 if elements >= MANY_ELEMENTS else 4


def _held_columns(layer: Layer, rows: int, units: int, precision: str, shared_bytes: int) -> int:
    """How deep the tiles of ``W_hh`` are of which a program holds all over the steps; 0 where it cannot.

    Two tiles of ``da`` have to go in beside them. True float32 goes through registers.
    """
    gates = 4 if layer.flags.hidden_dropout == UNTIED else 1  # a product of its own each
    depth, size = 4 * layer.flags.hidden_size // gates, layer.tensors.weight_hh.dtype.itemsize
    if size == 4 and precision == "ieee":
        return 0
    columns = max(_TILE_BYTES // (rows * size), power_of_two(-(-gates * depth // _MOST_TILES)))
    columns = min(columns, max(16, power_of_two(depth)))  # 16 is the least that a product takes
    while columns > 64 and -(-depth // columns) * columns > configurations.PADDING * depth:
        columns //= 2
    held = gates * units * -(-depth // columns) * columns + 2 * rows * columns
    return columns if held * size + configurations.SPARE_BYTES <= shared_bytes else 0


def _columns(dtype: torch.dtype, precision: str, elements: int, split: int) -> int:
    """How deep a product's tiles are that are read at each step, by ``split`` warps in pieces.

    True float32 products have no tensor cores, and are unrolled over the depth.
    """
    if precision == "ieee" and dtype == torch.float32:
        return 32
    if split:
        return split * 128 // dtype.itemsize
    return 128 if dtype != torch.float32 and elements <= MANY_ELEMENTS else 64


def _tiles(rows: int, hidden_size: int, present: int, norm: int) -> tuple[int, int]:
    """Rows and units of a tile: the largest with which most multiprocessors have one, or the smallest there are."""
    most_rows = min(64, max(16, power_of_two(rows)))
    if norm == NORM_BATCH:  # whose programs have every row
        narrow = [(most_rows, 8)] if configurations.least_units() <= 8 else []
        choices = [(most_rows, 32), (most_rows, 16), *narrow]
    else:
        choices = [(most_rows, 32), (most_rows, 16), (max(16, most_rows // 2), 16), (16, 16)]
    for tile_rows, units in choices:
        tiles = -(-hidden_size // units) * (1 if norm == NORM_BATCH else -(-rows // tile_rows))
        if 2 * tiles >= present:
            return tile_rows, units
    return choices[-1]
