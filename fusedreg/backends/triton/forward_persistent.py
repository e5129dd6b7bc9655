"""The persistent kernel of the forward: one cooperative launch for all steps, and the body that a step's kernels have.

A program holds its units' rows of ``W_hh`` in shared memory where they fit. Between two steps it waits until the others
of its group of rows have published their ``h``. Two halves of ``exchange`` are enough: who writes step ``s``'s half has
waited for everybody's step ``s - 1``, and so for everybody's last reading of what stood there, at that step's start.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.forward_batch import batch_step_of_units
from fusedreg.backends.triton.forward_rows import step_of_rows
from fusedreg.backends.triton.forward_step import product_of_units, resident_weights, step_of_units
from fusedreg.backends.triton.jit_grid import COUNTER_STRIDE, arrive, wait_for
from fusedreg.backends.triton.jit_numbers import restored_numbers
from fusedreg.backends.triton.jit_tile import NORM_BATCH


@triton.jit
def step_in_two_stages(s, units, arrivals, tiles, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A step with layer norm in the loop: everybody's columns of the product, then everybody's rows of the rest."""
    programs = tl.num_programs(0)
    wait_for(arrivals, 2 * s * programs)
    product_of_units(s, units, 0, numbers.sizes.rows, tiles, tensors, numbers, LAYER, BLOCK)
    arrive(arrivals)
    # Waits with no rows of its own too: its next arrival would count for somebody's missing first one.
    wait_for(arrivals, (2 * s + 1) * programs)
    first = tl.program_id(0) * BLOCK.whole_rows
    while first < numbers.sizes.rows:
        step_of_rows(s, first + tl.arange(0, BLOCK.whole_rows), tensors, numbers, LAYER, BLOCK)
        first += programs * BLOCK.whole_rows
    arrive(arrivals)


@triton.jit(do_not_specialize=["numbers", "rows_per_group"])
def persistent_kernel(
    tensors, numbers, rows_per_group, LAYER: tl.constexpr, BLOCK: tl.constexpr, IN_STAGES: tl.constexpr
):
    """All steps. Programs along the first axis share out the units, those along the second the rows."""
    numbers = restored_numbers(numbers)
    units = tl.program_id(0) * BLOCK.units + tl.arange(0, BLOCK.units)
    first_row = tl.program_id(1) * rows_per_group
    last_row = tl.minimum(first_row + rows_per_group, numbers.sizes.rows)
    arrivals = tensors.state.arrivals + tl.program_id(1) * COUNTER_STRIDE
    programs = tl.num_programs(0)
    tiles = resident_weights(units, tensors, LAYER, BLOCK)
    s = tl.full((), 0, tl.int32)
    while s < numbers.sizes.steps:
        if not IN_STAGES:
            step_of_units(s, units, first_row, last_row, arrivals, s * programs, tiles, tensors, numbers, LAYER, BLOCK)
        elif LAYER.norm == NORM_BATCH:
            wait_for(arrivals, s * programs)
            batch_step_of_units(s, units, tiles, tensors, numbers, LAYER, BLOCK)
            arrive(arrivals)
        else:
            step_in_two_stages(s, units, arrivals, tiles, tensors, numbers, LAYER, BLOCK)
        s += 1
