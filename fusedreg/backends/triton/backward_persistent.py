"""The whole backward loop in one kernel, whose programs run all at once and wait for each other after each step."""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fusedreg.backends.triton.backward_product import held_weights
from fusedreg.backends.triton.backward_step import rows_stage, units_stage
from fusedreg.backends.triton.jit_grid import COUNTER_STRIDE, arrive, wait_for
from fusedreg.backends.triton.jit_numbers import restored_numbers
from fusedreg.backends.triton.jit_tile import NORM_BATCH, NORM_LAYER

if TYPE_CHECKING:
    from fusedreg.backends.triton.backward_configuration import BackwardConfiguration
    from fusedreg.backends.triton.backward_loop import BackwardTensors
    from fusedreg.backends.triton.layout import LayerFlags, Numbers


@triton.jit(do_not_specialize=["numbers", "last_step"])
def persistent_kernel(  # type: ignore[no-untyped-def]
    tensors, numbers, arrivals, last_step, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    """Every step from the last one down to ``last_step``, 0 or -1. A program takes every so-manyth tile.

    One that has a single tile holds its columns of ``W_hh`` in shared memory where they fit.

    What a step writes for others, ``da`` and with layer norm ``dh``, stands before anybody reads it: a barrier of the
    grid follows each stage that does. Nothing that is still being read is overwritten: ``da`` has a place of its own
    at every step, and what is carried belongs to the tile, or to the row, and so to one program at every step; only
    ``dh`` goes from tiles to rows, with a barrier before and after.
    """
    numbers = restored_numbers(numbers)
    program, programs = tl.program_id(0), tl.num_programs(0)
    rows = numbers.sizes.rows
    unit_tiles: tl.constexpr = (LAYER.hidden_size + BLOCK.units - 1) // BLOCK.units
    row_tiles = (rows + BLOCK.rows - 1) // BLOCK.rows
    row_groups = (rows + BLOCK.whole_rows - 1) // BLOCK.whole_rows
    if BLOCK.norm == NORM_BATCH:
        row_tiles = rows * 0 + 1
    together = programs
    if BLOCK.norm != NORM_LAYER:
        # Rows know nothing of each other: where a program has one tile, only those of its rows wait for each other.
        alone = programs == unit_tiles * row_tiles
        together = tl.where(alone, unit_tiles, programs)
        arrivals += tl.where(alone, program // unit_tiles, 0) * COUNTER_STRIDE
    units = program % unit_tiles * BLOCK.units + tl.arange(0, BLOCK.units)
    tiles = held_weights(units, tensors.inputs.weight_hh, LAYER, BLOCK)
    target = programs * 0
    s = numbers.sizes.steps - 1
    while s >= last_step:
        tile = program
        while tile < unit_tiles * row_tiles:
            units_stage(s, tile % unit_tiles, tile // unit_tiles, arrivals, target, tiles, tensors, numbers, LAYER,
                        BLOCK)  # fmt: skip
            tile += programs
        arrive(arrivals)
        target += together
        if BLOCK.norm == NORM_LAYER:
            if s >= 0:
                wait_for(arrivals, target)
                row_group = program
                while row_group < row_groups:
                    rows_stage(s, row_group, tensors, numbers, LAYER, BLOCK)
                    row_group += programs
                arrive(arrivals)
                target += together
        s -= 1


def launch_persistent(
    tensors: BackwardTensors,
    numbers: Numbers,
    flags: LayerFlags,
    configuration: BackwardConfiguration,
    to_initial_hidden: bool,
) -> None:
    """Launch it so that all programs run at once, or not at all."""
    counters = configuration.row_tiles * COUNTER_STRIDE.value
    arrivals = torch.zeros(counters, dtype=torch.int32, device=tensors.grads.direct.device)
    persistent_kernel[(configuration.programs,)](
        tensors,
        numbers,
        arrivals,
        -1 if to_initial_hidden else 0,
        flags,
        configuration.block,
        launch_cooperative_grid=True,
        **configuration.launch,
    )
