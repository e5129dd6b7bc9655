"""Cases as data: the shapes and options of one layer, and the random arguments that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusedreg.encoding import tensor_arguments
from fusedreg.layer import FORWARD, LayerOptions, LayerParameters, Probes, RunningStatistics, compute_dtype
from fusedreg.regularization import BatchNorm, Regularization


@dataclass(frozen=True)
class LayerCase:
    """One layer in one direction: shapes, options, and which of the optional inputs it is given.

    ``ragged`` gives lengths from 0 to ``steps``; ``resets`` a reset mask that also hits step 0 and padding.
    ``proj_size`` is ``P`` where there is a projection; ``probes`` are to be differentiated too.
    ``layer`` counts from 0 among ``num_layers``: between-layer dropout acts below the last only.
    """

    name: str
    steps: int = 7
    rows: int = 5
    input_size: int = 6
    hidden_size: int = 11
    regularization: Regularization = Regularization()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layer: int = 0
    num_layers: int = 2
    direction: int = FORWARD
    training: bool = True
    recompute: bool = False
    return_cells: bool = True
    ragged: bool = False
    resets: bool = False
    bias: bool = True
    initial_state: bool = True
    proj_size: int = 0
    probes: bool = False

    @property
    def id(self) -> str:
        """The name, shape and type, for a test's id or a benchmark's row."""
        shape = f"T{self.steps}B{self.rows}I{self.input_size}H{self.hidden_size}"
        shape += f"P{self.proj_size}" if self.proj_size else ""
        return f"{self.name}-{shape}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def options(self) -> LayerOptions:
        """What the layer is told."""
        return self.regularization.layer_options(
            self.layer,
            self.num_layers,
            direction=self.direction,
            training=self.training,
            recompute=self.recompute,
            return_cells=self.return_cells,
        )


class LayerArguments(NamedTuple):
    """The arguments of one call of a layer, and the gradients that its results receive (by result's name)."""

    input: Tensor
    initial_hidden: Tensor | None
    initial_cell: Tensor | None
    parameters: LayerParameters
    lengths: Tensor | None
    reset: Tensor | None
    seed: Tensor | None
    running: RunningStatistics | None
    gradients: dict[str, Tensor]
    probes: Probes | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensor arguments of the operators, in their order."""
        return tensor_arguments(
            self.input,
            self.initial_hidden,
            self.initial_cell,
            self.parameters,
            self.lengths,
            self.reset,
            self.seed,
            self.probes,
            self.running,
        )

    def to(self, dtype: torch.dtype) -> LayerArguments:
        """The same values in another type; what the layer takes in its compute type goes to that one."""
        compute = compute_dtype(dtype)

        def cast(value: Tensor | None, to: torch.dtype) -> Tensor | None:
            return value.to(to) if value is not None and value.is_floating_point() else value

        gradients = {
            name: value.to(compute if name in ("final_cell", "cells") else dtype)
            for name, value in self.gradients.items()
        }
        return self._replace(
            input=self.input.to(dtype),
            initial_hidden=cast(self.initial_hidden, dtype),
            initial_cell=cast(self.initial_cell, compute),
            parameters=LayerParameters(*(cast(value, dtype) for value in self.parameters)),  # type: ignore[arg-type]
            running=None
            if self.running is None
            else RunningStatistics(*(cast(value, compute) for value in self.running)),  # type: ignore[arg-type]
            gradients=gradients,
            probes=None if self.probes is None else (cast(self.probes[0], dtype), cast(self.probes[1], compute)),
        )


def make_arguments(case: LayerCase, seed: int) -> LayerArguments:
    """Random arguments of a layer, the same for one case and seed on every device and for every type but rounding.

    Weights are uniform in ``±1/sqrt(H)`` as ``nn.LSTM`` makes them, inputs and states normal, so that variances stay
    far above ``eps``. Gains are in ``[0.5, 1.5]``, but the recurrent norm's a fifth of that: the norm undoes any
    smallness of ``h``, so with a gain of 1 the loop is chaotic, and two correct programs drift apart.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, device, compute = case.dtype, case.device, compute_dtype(case.dtype)
    steps, rows, inputs, hidden = case.steps, case.rows, case.input_size, case.hidden_size
    outputs = case.proj_size or hidden

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=to)

    def uniform(*shape: int, low: float, high: float, to: torch.dtype = dtype) -> Tensor:
        values = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=to)

    def zero(*shape: int, to: torch.dtype) -> Tensor:
        return torch.zeros((), dtype=to, device=device).expand(shape)

    bound = 1.0 / math.sqrt(hidden)
    norm = case.options.norm

    def affine(on: bool, width: int, shift: bool, scale: float = 1.0) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = uniform(width, low=0.5 * scale, high=1.5 * scale), uniform(width, low=-0.5, high=0.5)
        return (weight if on else None), (bias if on and shift else None)

    layer_norm = norm is not None and not isinstance(norm, BatchNorm)
    parameters = LayerParameters(
        uniform(4 * hidden, inputs, low=-bound, high=bound),
        uniform(4 * hidden, outputs, low=-bound, high=bound),
        uniform(4 * hidden, low=-bound, high=bound) if case.bias else None,
        uniform(4 * hidden, low=-bound, high=bound) if case.bias else None,
        uniform(outputs, hidden, low=-bound, high=bound) if case.proj_size else None,
        *affine(norm is not None and norm.input, 4 * hidden, shift=layer_norm),
        *affine(norm is not None and norm.recurrent, 4 * hidden, shift=layer_norm, scale=0.2),
        *affine(norm is not None and norm.cell, hidden, shift=True),
    )
    lengths = _ragged_lengths(case, generator).to(device) if case.ragged else None
    reset = (torch.rand(steps, rows, generator=generator) < 0.25).to(device) if case.resets else None
    # Seeds beyond 32 bits and below zero: the key is the seed modulo 2**64.
    mask_seed = (seed * 0x9E3779B97F4A7C15 + 1) % 2**64 - 2**63
    return LayerArguments(
        input=normal(steps, rows, inputs),
        initial_hidden=normal(rows, outputs) if case.initial_state else None,
        initial_cell=normal(rows, hidden, to=compute) if case.initial_state else None,
        parameters=parameters,
        lengths=lengths,
        reset=reset,
        seed=torch.tensor(mask_seed, dtype=torch.int64, device=device) if case.options.draws else None,
        running=_running_statistics(case, norm, normal, uniform) if isinstance(norm, BatchNorm) else None,
        gradients={
            "output": normal(steps, rows, outputs),
            "final_hidden": normal(rows, outputs),
            "final_cell": normal(rows, hidden, to=compute),
            "cells": normal(steps, rows, hidden, to=compute),
        },
        probes=(zero(steps, rows, outputs, to=dtype), zero(steps, rows, hidden, to=compute)) if case.probes else None,
    )


def _ragged_lengths(case: LayerCase, generator: torch.Generator) -> Tensor:
    """Unsorted lengths that include 0, 1 and the whole sequence.

    Under batch norm all but a few rows are of one length, since statistics of two or three rows amplify rounding
    beyond comparison; the last step but one then has a single row, and the last none.
    """
    steps, rows = case.steps, case.rows
    if isinstance(case.options.norm, BatchNorm):
        lengths = torch.full((rows,), max(steps - 2, 1))
        special = (steps - 1, 0, 1)
    else:
        lengths = torch.randint(0, steps + 1, (rows,), generator=generator)
        special = (steps, 0, 1)
    for row, length in zip(range(rows), special, strict=False):
        lengths[row] = length
    return lengths[torch.randperm(rows, generator=generator)]


def _running_statistics(
    case: LayerCase, norm: BatchNorm, normal: Callable[..., Tensor], uniform: Callable[..., Tensor]
) -> RunningStatistics:
    """Population statistics with one step before the first trained one, and steps past the last."""
    compute, hidden = compute_dtype(case.dtype), case.hidden_size
    shared = norm.statistics == "shared"
    kept = 1 if shared else max(1, case.steps - 2)
    index = torch.zeros(case.steps, dtype=torch.int64)
    if not shared:
        index = torch.arange(-1, case.steps - 1).clamp(max=kept - 1)
    sequence = norm.input_statistics == "sequence"
    input_index = torch.zeros_like(index) if sequence else index

    def statistics(on: bool, count: int, width: int) -> tuple[Tensor | None, Tensor | None]:
        mean = 0.2 * normal(count, width, to=compute)
        variance = uniform(count, width, low=0.25, high=1.0, to=compute)
        return (mean, variance) if on else (None, None)

    return RunningStatistics(
        index.to(case.device),
        input_index.to(case.device),
        *statistics(norm.input, 1 if sequence else kept, 4 * hidden),
        *statistics(norm.recurrent, kept, 4 * hidden),
        *statistics(norm.cell, kept, hidden),
    )
