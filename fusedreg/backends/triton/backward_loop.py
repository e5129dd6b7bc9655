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
from fusedreg.backends.triton.backward_step import rows_stage, units_stage
from fusedreg.backends.triton.jit_numbers import packed_numbers, restored_numbers
from fusedreg.backends.triton.layout import Layer, LoopInputs, Numbers
from fusedreg.encoding import NORM_BATCH, NORM_LAYER


class Saved(NamedTuple):
    """What the forward kept. ``gates (T, B, 4H)``: after their activations, or the raw ``a`` in float32."""

    cells: Any
    gates: Any
    recurrent_statistics: Any
    cell_statistics: Any


class Gradients(NamedTuple):
    """What reaches the layer's results, what the loop carries and what it leaves; ``None`` where there is no need.

    Read: ``output (T, B, H)``, ``cells (T, B, H)``, ``counts (T,)`` the valid rows of each step.
    Carried, float32: ``direct`` and ``cell (2, B, H)`` in two halves, ``hidden (B, H)``.
    Written: ``grad_recurrent (T, B, 4H)``, which is ``da``, in the storage type; ``grad_gates``, which is ``dz``, in
    float32; ``cell_sums``, of which the first axis is to be summed: the gradients of ``N_c``'s shift and gain.
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


@triton.jit(do_not_specialize=["s", "numbers"])
def units_kernel(s, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of a program's units; -1 is what is left of the step after: the initial state's gradient."""
    numbers = restored_numbers(numbers)
    units_stage(s, tl.program_id(0), tl.program_id(1), None, 0, tensors, numbers, LAYER, BLOCK)


@triton.jit(do_not_specialize=["s", "numbers"])
def rows_kernel(s, tensors, numbers, LAYER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second stage of a step with layer norm in the loop: a program has whole rows."""
    numbers = restored_numbers(numbers)
    rows_stage(s, tl.program_id(0), tensors, numbers, LAYER, BLOCK)


def new_gradients(layer: Layer, incoming: Incoming, configuration: BackwardConfiguration) -> Gradients:
    """What the loop carries, as it stands after the last step, and room for what it leaves."""
    flags, (steps, rows, _), size = layer.flags, layer.sizes, layer.flags.hidden_size
    weight = layer.tensors.weight_hh
    norm = configuration.block.norm

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=weight.device)

    direct, cell = zeros(2, rows, size), zeros(2, rows, size)
    for carried, final in ((direct, incoming.final_hidden), (cell, incoming.final_cell)):
        if final is not None:
            carried[steps % 2].copy_(final)  # where the last step, T - 1, looks
    cell_sums = None
    if flags.norm_cell:
        cell_sums = zeros(rows if norm == NORM_LAYER else steps, 2, size)
    return Gradients(
        output=_contiguous(incoming.output),
        cells=_contiguous(incoming.cells),
        counts=_valid_rows(layer) if flags.batch_statistics else None,
        direct=direct,
        cell=cell,
        hidden=torch.empty(rows, size, dtype=torch.float32, device=weight.device),
        grad_recurrent=torch.empty(steps, rows, 4 * size, dtype=weight.dtype, device=weight.device),
        grad_gates=torch.empty(steps, rows, 4 * size, dtype=torch.float32, device=weight.device)
        if flags.norm_input or flags.norm_recurrent
        else None,
        cell_sums=cell_sums,
    )


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _valid_rows(layer: Layer) -> Tensor:
    steps, rows, lengths = layer.sizes.steps, layer.sizes.rows, layer.tensors.lengths
    device = layer.tensors.weight_hh.device
    if lengths is None:
        return torch.full((steps,), rows, dtype=torch.int32, device=device)
    return (torch.arange(steps, device=device).unsqueeze(1) < lengths).sum(1).to(torch.int32)


def backward_loop(
    layer: Layer, inputs: LoopInputs, saved: Saved, incoming: Incoming, *, activated: bool, to_initial_hidden: bool
) -> Gradients:
    """Run the loop.

    Args:
        layer, inputs: the call, and what stands before its loop.
        saved: what the forward kept, or what was built anew.
        incoming: the gradients of the results.
        activated: whether ``saved.gates`` went through their activations.
        to_initial_hidden: whether ``grads.hidden`` is to hold the initial state's gradient in the end. The initial
            cell's is ``grads.cell[0]`` in any case.
    """
    configuration = backward_configuration(layer, activated=activated)
    grads = new_gradients(layer, incoming, configuration)
    tensors = BackwardTensors(inputs, saved, grads)
    numbers = packed_numbers(layer.sizes, layer.rates)
    if configuration.block.persistent:
        launch_persistent(tensors, numbers, layer.flags, configuration, to_initial_hidden)
    else:
        _launch_steps(tensors, numbers, layer, configuration, to_initial_hidden)
    return grads


def _launch_steps(
    tensors: BackwardTensors,
    numbers: Numbers,
    layer: Layer,
    configuration: BackwardConfiguration,
    to_initial_hidden: bool,
) -> None:
    block, options = configuration.block, configuration.launch
    row_tiles = 1 if block.norm == NORM_BATCH else configuration.row_tiles
    row_groups = triton.cdiv(layer.sizes.rows, block.whole_rows)
    for s in range(layer.sizes.steps - 1, -2 if to_initial_hidden else -1, -1):
        units_kernel[(configuration.unit_tiles, row_tiles)](s, tensors, numbers, layer.flags, block, **options)
        if block.norm == NORM_LAYER and s >= 0:
            rows_kernel[(row_groups,)](s, tensors, numbers, layer.flags, block, **configuration.rows_launch)
