"""How the operators' arguments are laid out: the order of the tensors, and the options as plain numbers.

The same orders stand in ``csrc/common/params.h`` and in the schemas of ``csrc/registration.cpp``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from fusedreg.layer import LayerOptions, LayerParameters, Probes, RunningStatistics
from fusedreg.regularization import RATE_NAMES, BatchNorm, LayerNorm

# What the forward keeps for the backward: `Save` in csrc/common/params.h.
SAVE_NOTHING, SAVE_GATES, SAVE_RECOMPUTE = 0, 1, 2
NORM_NONE, NORM_BATCH, NORM_LAYER = 0, 1, 2

# The tensor arguments of the forward, in the schema's order.
TENSOR_ARGUMENTS = (
    "input",
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
    "initial_hidden",
    "initial_cell",
    "lengths",
    "reset",
    "seed",
    "norm_input_weight",
    "norm_input_bias",
    "norm_recurrent_weight",
    "norm_recurrent_bias",
    "norm_cell_weight",
    "norm_cell_bias",
    "hidden_probe",
    "cell_probe",
    "running_index",
    "running_input_index",
    "running_input_mean",
    "running_input_var",
    "running_recurrent_mean",
    "running_recurrent_var",
    "running_cell_mean",
    "running_cell_var",
)
NUMBER_OF_TENSORS = len(TENSOR_ARGUMENTS)
# Those that have a gradient, in the order of the backward's results.
DIFFERENTIABLE = (*range(8), *range(11, 19))
FIRST_RUNNING = TENSOR_ARGUMENTS.index("running_index")
# Of the `options`, those that callers look at or change by place.
RETURN_CELLS, SAVE, GRADIENT_GROUPS = 12, 13, 14
_NO_PROBES, _NOTHING_RUNNING = (None,) * 2, (None,) * 8

Encoded = tuple[list[float], list[int], float]


def encode_options(options: LayerOptions, save: int) -> Encoded:
    """``(rates, options, norm_eps)`` as the operators take them: the order of the structs in ``params.h``.

    Args:
        options: of one layer and direction.
        save: one of ``SAVE_NOTHING``, ``SAVE_GATES`` and ``SAVE_RECOMPUTE``.
    """
    norm = options.norm
    kind = NORM_BATCH if isinstance(norm, BatchNorm) else NORM_LAYER if isinstance(norm, LayerNorm) else NORM_NONE
    flags = [
        options.layer,
        options.direction,
        int(options.training),
        int(options.gate_masks == "untied"),
        int(options.update_mask == "sequence"),
        int(options.weight_mask == "row"),
        int(options.zoneout_output == "candidate"),
        kind,
        int(norm is not None and norm.input),
        int(norm is not None and norm.recurrent),
        int(norm is not None and norm.cell),
        int(isinstance(norm, BatchNorm) and norm.input_statistics == "sequence"),
        int(options.return_cells),
        save,
        1,  # gradient_groups: the backward's, for whom a vmap rule changes it
    ]
    return list(options.rates), flags, 0.0 if norm is None else norm.eps


encode_once = functools.lru_cache(maxsize=1024)(encode_options)


def decode_options(rates: Sequence[float], options: Sequence[int], norm_eps: float) -> tuple[LayerOptions, int]:
    """The inverse of :func:`encode_options`, but for what the operators do not need (a batch norm's momentum).

    ``gradient_groups`` is no option of a layer, and is left out.
    """
    layer, direction, training, untied, update_sequence, weight_row, candidate = options[:7]
    kind, norm_input, norm_recurrent, norm_cell, input_sequence, return_cells, save, _ = options[7:]
    norm: BatchNorm | LayerNorm | None = None
    if kind == NORM_BATCH:
        norm = BatchNorm(
            input=bool(norm_input),
            recurrent=bool(norm_recurrent),
            cell=bool(norm_cell),
            statistics="shared",
            input_statistics="sequence" if input_sequence else "step",
            eps=norm_eps,
        )
    elif kind == NORM_LAYER:
        norm = LayerNorm(input=bool(norm_input), recurrent=bool(norm_recurrent), cell=bool(norm_cell), eps=norm_eps)
    named = dict(zip(RATE_NAMES, rates, strict=True))
    decoded = LayerOptions(
        layer=layer,
        direction=direction,
        training=bool(training),
        gate_masks="untied" if untied else "tied",
        update_mask="sequence" if update_sequence else "step",
        weight_mask="row" if weight_row else "element",
        zoneout_output="candidate" if candidate else "state",
        norm=norm,
        recompute=save == SAVE_RECOMPUTE,
        return_cells=bool(return_cells),
        **named,
    )
    return decoded, save


def tensor_arguments(
    input: Tensor,
    initial_hidden: Tensor | None,
    initial_cell: Tensor | None,
    parameters: LayerParameters,
    lengths: Tensor | None,
    reset: Tensor | None,
    seed: Tensor | None,
    probes: Probes | None,
    running: RunningStatistics | None,
) -> tuple[Tensor | None, ...]:
    """The arguments of ``lstm_layer`` that are tensors, in the order of ``TENSOR_ARGUMENTS``."""
    return (
        input,
        *parameters[:5],
        initial_hidden,
        initial_cell,
        lengths,
        reset,
        seed,
        *parameters[5:],
        *(probes or _NO_PROBES),
        *(running or _NOTHING_RUNNING),
    )


def hidden_differs(rates: Sequence[float], options: Sequence[int]) -> bool:
    """Whether the carried ``h`` is something else than the output, and so has to be saved beside it."""
    dropout, _, _, output_dropout, _, _, _, zoneout_hidden, _ = rates
    training, candidate = options[2], options[6]
    return bool((training and (dropout > 0 or output_dropout > 0)) or (candidate and zoneout_hidden > 0))
