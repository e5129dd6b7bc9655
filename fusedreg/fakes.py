"""The operators on tensors without values: what ``torch.compile`` and ``torch.export`` see of them.

Shapes, strides and types are the kernels', with symbolic sizes too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedreg.encoding import NORM_BATCH, NORM_LAYER, NORM_NONE, SAVE_GATES, SAVE_NOTHING, hidden_differs
from fusedreg.layer import compute_dtype


def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """``fusedreg::lstm_layer_forward`` without values."""
    tensors, (rates, options, _) = arguments[:24], arguments[24:]
    input, weight_hh = tensors[0], tensors[2]
    steps, rows = input.shape[0], input.shape[1]
    hidden_size = weight_hh.shape[0] // 4
    kind, norm_input, norm_recurrent, norm_cell, input_sequence, return_cells, save = options[7:]
    compute = compute_dtype(input.dtype)
    # Activated gates beside 16-bit inputs are kept in 16-bit fixed point, everything else of a gate unrounded.
    kept_gates = torch.int16 if compute != input.dtype and kind == NORM_NONE else compute

    def new(wanted: Any, *shape: Any, dtype: torch.dtype = input.dtype) -> Tensor:
        value: Tensor = input.new_empty(shape if wanted else (0,), dtype=dtype)
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
        new(True, steps, rows, hidden_size),
        new(True, rows, hidden_size),
        new(True, rows, hidden_size, dtype=compute),
        new(save != SAVE_NOTHING or return_cells, steps, rows, hidden_size, dtype=compute),
        new(save != SAVE_NOTHING and hidden_differs(rates, options), steps, rows, hidden_size),
        new(save == SAVE_GATES, steps, rows, 4 * hidden_size, dtype=kept_gates),
        new(save == SAVE_GATES and kind != NORM_NONE, steps, rows, 4 * hidden_size, dtype=compute),
        *(
            new(statistics_wanted and site, *shape, dtype=compute)
            for site, shape in zip((norm_input, norm_recurrent, norm_cell), statistics_shapes, strict=True)
        ),
    )


def backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """``fusedreg::lstm_layer_backward`` without values."""
    tensors, needed = arguments[4:28], arguments[-1]
    input, weight_hh = tensors[0], tensors[2]
    steps, rows, input_size = input.shape
    gates, hidden_size = weight_hh.shape[0], weight_hh.shape[0] // 4
    compute = compute_dtype(input.dtype)
    shapes: list[tuple[Any, ...]] = [
        (steps, rows, input_size),
        (gates, input_size),
        (gates, hidden_size),
        (gates,),
        (gates,),
        (rows, hidden_size),
        (rows, hidden_size),
        (gates,),
        (gates,),
        (gates,),
        (gates,),
        (hidden_size,),
        (hidden_size,),
    ]
    return tuple(
        input.new_empty(shape if wanted else (0,), dtype=compute if position == 6 else input.dtype)
        for position, (shape, wanted) in enumerate(zip(shapes, needed, strict=True))
    )
