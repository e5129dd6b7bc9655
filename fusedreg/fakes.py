"""The operators on tensors without values: what ``torch.compile`` and ``torch.export`` see of them.

Shapes, strides and types are the kernels', with symbolic sizes too. An input ``(M, T, B, I)`` is of ``M`` models, and
every result then has an axis of them in front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedreg.encoding import (
    DIFFERENTIABLE,
    GRADIENT_GROUPS,
    NORM_BATCH,
    NORM_LAYER,
    NORM_NONE,
    NUMBER_OF_TENSORS,
    SAVE_GATES,
    SAVE_NOTHING,
    TENSOR_ARGUMENTS,
    hidden_differs,
)
from fusedreg.layer import compute_dtype


def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """``fusedreg::lstm_layer_forward`` without values."""
    tensors, (rates, options, _) = arguments[:NUMBER_OF_TENSORS], arguments[NUMBER_OF_TENSORS:]
    input, weight_hh = tensors[0], tensors[2]
    *models, steps, rows, _ = input.shape
    hidden_size, output_size = weight_hh.shape[-2] // 4, weight_hh.shape[-1]
    kind, norm_input, norm_recurrent, norm_cell, input_sequence, return_cells, save, _ = options[7:]
    compute = compute_dtype(input.dtype)
    # Activated gates beside 16-bit inputs are kept in 16-bit fixed point, everything else of a gate unrounded.
    kept_gates = torch.int16 if compute != input.dtype and kind == NORM_NONE else compute

    def new(wanted: Any, *shape: Any, dtype: torch.dtype = input.dtype) -> Tensor:
        value: Tensor = input.new_empty((*models, *(shape if wanted else (0,))), dtype=dtype)
        return value

    if kind == NORM_LAYER:
        statistics_wanted = save != SAVE_NOTHING
        statistics_shapes = [(steps, 2, rows)] * 3
    else:
        statistics_wanted = kind == NORM_BATCH and (bool(options[2]) or save != SAVE_NOTHING)
        gates_shape = (steps, 2, 4 * hidden_size)
        input_shape = (1, 2, 4 * hidden_size) if input_sequence else gates_shape
        statistics_shapes = [input_shape, gates_shape, (steps, 2, hidden_size)]
    return (
        new(True, steps, rows, output_size),
        new(True, rows, output_size),
        new(True, rows, hidden_size, dtype=compute),
        new(save != SAVE_NOTHING or return_cells, steps, rows, hidden_size, dtype=compute),
        new(save != SAVE_NOTHING and hidden_differs(rates, options), steps, rows, output_size),
        new(save == SAVE_GATES, steps, rows, 4 * hidden_size, dtype=kept_gates),
        new(save == SAVE_GATES and kind != NORM_NONE, steps, rows, 4 * hidden_size, dtype=compute),
        *(
            new(statistics_wanted and site, *shape, dtype=compute)
            for site, shape in zip((norm_input, norm_recurrent, norm_cell), statistics_shapes, strict=True)
        ),
    )


def backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """``fusedreg::lstm_layer_backward`` without values."""
    tensors, options, needed = arguments[4 : 4 + NUMBER_OF_TENSORS], arguments[-3], arguments[-1]
    input, weight_hh = tensors[0], tensors[2]
    *models, steps, rows, input_size = input.shape
    gates, output_size = weight_hh.shape[-2:]
    hidden_size = gates // 4
    compute = compute_dtype(input.dtype)
    groups = (options[GRADIENT_GROUPS],) if options[GRADIENT_GROUPS] > 1 else ()
    norm_shapes = [(gates,)] * 4 + [(hidden_size,)] * 2
    shapes: list[tuple[Any, ...]] = [
        (steps, rows, input_size),
        (*groups, gates, input_size),
        (*groups, gates, output_size),
        (*groups, gates),
        (*groups, gates),
        (*groups, output_size, hidden_size),
        (rows, output_size),
        (rows, hidden_size),
        *((*groups, *shape) for shape in norm_shapes),
        (steps, rows, output_size),
        (steps, rows, hidden_size),
    ]
    in_compute = {DIFFERENTIABLE.index(TENSOR_ARGUMENTS.index(name)) for name in ("initial_cell", "cell_probe")}
    return tuple(
        input.new_empty((*models, *(shape if wanted else (0,))), dtype=compute if place in in_compute else input.dtype)
        for place, (shape, wanted) in enumerate(zip(shapes, needed, strict=True))
    )
