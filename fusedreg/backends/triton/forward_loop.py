"""The forward loop: the kernels of a step, launched once a step, and the launch of the persistent kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedreg.backends.triton.configurations import Configuration, forward_configuration
from fusedreg.backends.triton.forward_batch import batch_step_of_units
from fusedreg.backends.triton.forward_cell import draw_drops, publish
from fusedreg.backends.triton.forward_persistent import persistent_kernel
from fusedreg.backends.triton.forward_projection import projection_kernel
from fusedreg.backends.triton.forward_rows import step_of_rows
from fusedreg.backends.triton.forward_step import product_of_units, step_of_units
from fusedreg.backends.triton.jit_grid import COUNTER_STRIDE
from fusedreg.backends.triton.jit_numbers import packed_numbers, restored_numbers
from fusedreg.backends.triton.layout import (
    FUSED,
    UNTIED,
    ForwardResults,
    ForwardState,
    ForwardTensors,
    Layer,
    LayerFlags,
    LoopInputs,
    Numbers,
)
from fusedreg.encoding import NORM_BATCH, NORM_LAYER


@triton.jit(do_not_specialize=["numbers"])
def start_kernel(  # type: ignore[no-untyped-def]
    tensors, numbers, LAYER: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    """Hand the initial ``h`` to the first step's product."""
    numbers = restored_numbers(numbers)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    present = rows < numbers.sizes.rows
    inside = present[:, None] & (units < LAYER.projected_size)[None, :]
    at = (rows.to(tl.int64) * LAYER.projected_size)[:, None] + units[None, :]
    hidden = tl.load(tensors.results.final_hidden + at, mask=inside, other=0.0)
    dropped = draw_drops(rows, units, tensors, numbers, LAYER)
    publish(0, hidden, dropped, rows, units, present, tensors, numbers, LAYER)


@triton.jit
def share_of_grid(rows_per_group, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's units and rows. The grid has one axis: a second one ends at 65,535, of which rows may need more."""
    programs: tl.constexpr = (LAYER.hidden_size + BLOCK.units - 1) // BLOCK.units
    units = tl.program_id(0) % programs * BLOCK.units + tl.arange(0, BLOCK.units)
    first_row = tl.program_id(0) // programs * rows_per_group
    return units, first_row, tl.minimum(first_row + rows_per_group, numbers.sizes.rows)


@triton.jit(do_not_specialize=["s", "numbers", "rows_per_group"])
def units_kernel(  # type: ignore[no-untyped-def]
    s, tensors, numbers, rows_per_group, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    """One step of a program's units, for its rows."""
    numbers = restored_numbers(numbers)
    units, first_row, last_row = share_of_grid(rows_per_group, numbers, LAYER, BLOCK)
    step_of_units(s, units, first_row, last_row, None, 0, (), tensors, numbers, LAYER, BLOCK)


@triton.jit(do_not_specialize=["s", "numbers"])
def batch_kernel(s, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of a program's units under batch statistics, for all rows."""
    numbers = restored_numbers(numbers)
    units = tl.program_id(0) * BLOCK.units + tl.arange(0, BLOCK.units)
    batch_step_of_units(s, units, (), tensors, numbers, LAYER, BLOCK)


@triton.jit(do_not_specialize=["s", "numbers", "rows_per_group"])
def product_kernel(  # type: ignore[no-untyped-def]
    s, tensors, numbers, rows_per_group, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    """The first stage of a step with layer norm: some columns of the product."""
    numbers = restored_numbers(numbers)
    units, first_row, last_row = share_of_grid(rows_per_group, numbers, LAYER, BLOCK)
    product_of_units(s, units, first_row, last_row, (), tensors, numbers, LAYER, BLOCK)


@triton.jit(do_not_specialize=["s", "numbers"])
def rows_kernel(s, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second stage: everything else of a program's rows."""
    numbers = restored_numbers(numbers)
    rows = tl.program_id(0) * BLOCK.whole_rows + tl.arange(0, BLOCK.whole_rows)
    step_of_rows(s, rows, tensors, numbers, LAYER, BLOCK)


def forward_state(layer: Layer, results: ForwardResults, configuration: Configuration) -> ForwardState:
    """What the loop keeps beside its results, allocated once a call."""
    flags, rows, size = layer.flags, layer.sizes.rows, layer.flags.hidden_size
    device = results.output.device
    copies = 4 if flags.hidden_dropout == UNTIED else 1

    def new(wanted: object, *shape: int) -> torch.Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=device) if wanted else None

    by_stages = in_stages(flags)
    return ForwardState(
        exchange=torch.empty(2, copies, rows, flags.projected_size, dtype=results.output.dtype, device=device),
        activated=new(flags.projected, rows, size),
        raw=new(by_stages and results.gates is None, rows, 4 * size),
        candidates=new(by_stages and flags.norm_cell, rows, size),
        output_gates=new(by_stages and flags.norm_cell, rows, size),
        arrivals=torch.zeros(configuration.groups * COUNTER_STRIDE.value, dtype=torch.int32, device=device)
        if configuration.block.persistent
        else None,
    )


def in_stages(flags: LayerFlags) -> bool:
    """Whether a step needs more of the batch than a tile: a norm in the loop, but for the population's statistics."""
    inside = flags.norm_recurrent or flags.norm_cell
    return bool(inside and (flags.norm == NORM_LAYER or flags.batch_statistics))


def forward_loop(layer: Layer, inputs: LoopInputs, results: ForwardResults) -> None:
    """Run the loop: everything of ``results`` but what belongs to the input's term."""
    configuration = forward_configuration(layer)
    for state, initial in (
        (results.final_hidden, inputs.initial_hidden),
        (results.final_cell, inputs.initial_cell),
    ):
        if initial is None:
            state.zero_()
        else:
            state.copy_(initial)
    tensors = ForwardTensors(inputs, results, forward_state(layer, results, configuration))
    numbers = packed_numbers(layer.sizes, layer.rates)
    block = configuration.block
    grid = (triton.cdiv(layer.sizes.rows, block.rows), triton.cdiv(layer.flags.projected_size, block.units))
    start_kernel[grid](tensors, numbers, layer.flags, block.rows, block.units, **FUSED)
    if block.persistent:
        persistent_kernel[configuration.programs, configuration.groups](
            tensors,
            numbers,
            configuration.rows_per_group,
            layer.flags,
            block,
            int(in_stages(layer.flags)),
            num_warps=configuration.warps,
            num_stages=configuration.stages,
            launch_cooperative_grid=True,
            **FUSED,
        )
    else:
        _launch_steps(tensors, numbers, layer, configuration)


def _launch_steps(tensors: ForwardTensors, numbers: Numbers, layer: Layer, configuration: Configuration) -> None:
    flags, block = layer.flags, configuration.block
    grid = (configuration.programs * configuration.groups,)
    row_grid = (triton.cdiv(layer.sizes.rows, block.whole_rows),)
    projection_grid = (triton.cdiv(layer.sizes.rows, block.rows) * triton.cdiv(flags.projected_size, block.units),)
    launch = {"num_warps": configuration.warps, "num_stages": configuration.stages, **FUSED}
    grouped = (tensors, numbers, configuration.rows_per_group, flags, block)
    for s in range(layer.sizes.steps):
        if not in_stages(flags):
            units_kernel[grid](s, *grouped, **launch)
        elif flags.norm == NORM_BATCH:
            batch_kernel[grid](s, tensors, numbers, flags, block, **launch)
        else:
            product_kernel[grid](s, *grouped, **launch)
            rows_kernel[row_grid](s, tensors, numbers, flags, block, **launch)
        if flags.projected:
            projection_kernel[projection_grid](s, tensors, numbers, flags, block, **launch)
