"""The backward loop: what it reads and writes, the kernels of a step, and their launches."""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedreg.backends.triton.backward_configuration import BackwardConfiguration, backward_configuration
from fusedreg.backends.triton.backward_persistent import launch_persistent
from fusedreg.backends.triton.backward_projection import projection_kernel
from fusedreg.backends.triton.backward_step import rows_stage, units_stage
from fusedreg.backends.triton.jit_numbers import packed_numbers, restored_numbers
from fusedreg.backends.triton.layout import Layer, LoopInputs, Numbers, aligned
from fusedreg.encoding import NORM_BATCH, NORM_LAYER


class Saved(NamedTuple):
    """What the forward kept. ``gates (T, B, 4H)``: after their activations, or the raw ``a`` in float32."""

    cells: Any
    gates: Any
    recurrent_statistics: Any
    cell_statistics: Any


class Gradients(NamedTuple):
    """What reaches the layer's results, what the loop carries and what it leaves; ``None`` where there is no need.

    Read: ``output (T, B, P)``, ``cells (T, B, H)``, ``counts (T,)`` the valid rows of each step.
    Carried, float32: ``direct (2, B, P)`` and ``cell (2, B, H)`` in two halves, ``hidden (B, H)``.
    Written: ``grad_recurrent (T, B, 4H)``, which is ``da``, in the storage type; ``grad_gates``, which is ``dz``, in
    float32; ``cell_sums (T or B, 2, H)`` by step or by row: the gradients of ``N_c``'s shift and gain. With a
    projection, in the storage type: ``projected (T, B, P)``, which is ``dh̃``, and where ``dW_hr`` is wanted
    ``activated (T, B, H)``, which is ``u``. The probes' gradients are the operator's results.
    """

    output: Any
    cells: Any
    counts: Any
    direct: Any
    cell: Any
    hidden: Any
    grad_recurrent: Any
    grad_gates: Any
    cell_sums: Any
    projected: Any
    activated: Any
    hidden_probe: Any
    cell_probe: Any


class BackwardTensors(NamedTuple):
    """Everything in memory that a step of the backward reads or writes."""

    inputs: LoopInputs
    saved: Saved
    grads: Gradients


class Incoming(NamedTuple):
    """The gradients of the forward's results; ``None`` where nothing comes."""

    output: Tensor | None
    final_hidden: Tensor | None
    final_cell: Tensor | None
    cells: Tensor | None


class Wanted(NamedTuple):
    """What the loop leaves besides: the initial ``h``'s gradient, and room for those of the projection and probes."""

    initial_hidden: bool
    weight_hr: bool
    hidden_probe: Tensor | None
    cell_probe: Tensor | None


@triton.jit(do_not_specialize=["s", "numbers"])
def units_kernel(s, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of a program's units; -1 is what is left of the step after: the initial state's gradient."""
    numbers = restored_numbers(numbers)
    unit_tiles: tl.constexpr = (LAYER.hidden_size + BLOCK.units - 1) // BLOCK.units
    unit_tile, row_tile = tl.program_id(0) % unit_tiles, tl.program_id(0) // unit_tiles
    units_stage(s, unit_tile, row_tile, None, 0, (), tensors, numbers, LAYER, BLOCK)


@triton.jit(do_not_specialize=["s", "numbers"])
def rows_kernel(s, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second stage of a step with layer norm in the loop: a program has whole rows."""
    numbers = restored_numbers(numbers)
    rows_stage(s, tl.program_id(0), tensors, numbers, LAYER, BLOCK)


def new_gradients(layer: Layer, incoming: Incoming, configuration: BackwardConfiguration, wanted: Wanted) -> Gradients:
    """What the loop carries, as it stands after the last step, and room for what it leaves."""
    flags, (steps, rows, *_), size = layer.flags, layer.sizes, layer.flags.hidden_size
    weight = layer.tensors.weight_hh

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=weight.device)

    def stored(width: int, wanted: object = True) -> Tensor | None:
        return torch.empty(steps, rows, width, dtype=weight.dtype, device=weight.device) if wanted else None

    direct, cell = zeros(2, rows, flags.projected_size), zeros(2, rows, size)
    for carried, final in ((direct, incoming.final_hidden), (cell, incoming.final_cell)):
        if final is not None:
            carried[steps % 2].copy_(final)  # where the last step, T - 1, looks
    cell_sums = None
    if flags.norm_cell:
        cell_sums = zeros(rows if configuration.block.sums_by_row else steps, 2, size)
    return Gradients(
        output=_aligned(incoming.output),
        cells=_aligned(incoming.cells),
        counts=_valid_rows(layer) if flags.batch_statistics else None,
        direct=direct,
        cell=cell,
        hidden=torch.empty(rows, size, dtype=torch.float32, device=weight.device),
        grad_recurrent=stored(4 * size),
        grad_gates=torch.empty(steps, rows, 4 * size, dtype=torch.float32, device=weight.device)
        if flags.norm_input or flags.norm_recurrent
        else None,
        cell_sums=cell_sums,
        projected=stored(flags.projected_size, flags.projected),
        activated=stored(size, flags.projected and wanted.weight_hr),
        hidden_probe=wanted.hidden_probe,
        cell_probe=wanted.cell_probe,
    )


def _aligned(value: Tensor | None) -> Tensor | None:
    return None if value is None else aligned(value)


def _valid_rows(layer: Layer) -> Tensor:
    steps, rows, lengths = layer.sizes.steps, layer.sizes.rows, layer.tensors.lengths
    device = layer.tensors.weight_hh.device
    if lengths is None:
        return torch.full((steps,), rows, dtype=torch.int32, device=device)
    return (torch.arange(steps, device=device).unsqueeze(1) < lengths).sum(1).to(torch.int32)


def backward_loop(
    layer: Layer, inputs: LoopInputs, saved: Saved, incoming: Incoming, *, activated: bool, wanted: Wanted
) -> Gradients:
    """Run the loop.

    Args:
        layer, inputs: the call, and what stands before its loop.
        saved: what the forward kept, or what was built anew.
        incoming: the gradients of the results.
        activated: whether ``saved.gates`` went through their activations.
        wanted: what to leave besides. The initial hidden state's gradient is ``grads.hidden`` in the end, or, with a
            projection, ``grads.direct[1]``; the initial cell's is ``grads.cell[0]`` in any case.
    """
    configuration = backward_configuration(layer, activated=activated)
    grads = new_gradients(layer, incoming, configuration, wanted)
    tensors = BackwardTensors(inputs, saved, grads)
    numbers = packed_numbers(layer.sizes, layer.rates)
    if configuration.block.persistent:
        launch_persistent(tensors, numbers, layer.flags, configuration, wanted.initial_hidden)
    else:
        _launch_steps(tensors, numbers, layer, configuration, wanted.initial_hidden)
    return grads


def _launch_steps(
    tensors: BackwardTensors,
    numbers: Numbers,
    layer: Layer,
    configuration: BackwardConfiguration,
    to_initial_hidden: bool,
) -> None:
    flags, block, options = layer.flags, configuration.block, configuration.launch
    # One axis each: a second one ends at 65,535.
    grid = (configuration.unit_tiles * (1 if block.norm == NORM_BATCH else configuration.row_tiles),)
    projection_grid = (triton.cdiv(flags.projected_size, block.units) * configuration.row_tiles,)
    row_groups = triton.cdiv(layer.sizes.rows, block.whole_rows)
    for s in range(layer.sizes.steps - 1, -2 if to_initial_hidden else -1, -1):
        if flags.projected:
            projection_kernel[projection_grid](s, tensors, numbers, flags, block, **options)
        if s >= 0 or not flags.projected:
            units_kernel[grid](s, tensors, numbers, flags, block, **options)
        if block.norm == NORM_LAYER and s >= 0:
            rows_kernel[(row_groups,)](s, tensors, numbers, flags, block, **configuration.rows_launch)
