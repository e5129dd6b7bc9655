"""What one layer, in one direction, takes and returns: the contract that every backend implements.

``reference.lstm_layer`` and ``ops.lstm_layer`` have the same signature, written with the types of this
file, so that :mod:`fusedreg.functional` can stack layers without knowing which of them does the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusedreg.regularization import (
    BatchNorm,
    GateMasks,
    LayerNorm,
    UpdateMask,
    WeightMask,
    ZoneoutOutput,
)

FORWARD, REVERSE = 0, 1


@dataclass(frozen=True)
class LayerOptions:
    """Everything about one layer and direction that is not a tensor. Rates are this layer's own numbers.

    ``dropout`` is the between-layer dropout on this layer's output, so 0 for the last layer.
    ``training`` says whether masks are drawn and batch statistics taken; in evaluation the rates of
    zoneout and cell dropout still act, as expectations.
    """

    layer: int = 0
    direction: int = FORWARD
    training: bool = True
    dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    update_dropout: float = 0.0
    cell_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout_hidden: float = 0.0
    zoneout_cell: float = 0.0
    gate_masks: GateMasks = "tied"
    update_mask: UpdateMask = "step"
    weight_mask: WeightMask = "element"
    zoneout_output: ZoneoutOutput = "state"
    norm: BatchNorm | LayerNorm | None = None
    recompute: bool = False
    return_cells: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The nine rates, in the order of ``Rates`` in ``csrc/common/params.h``."""
        return (
            self.dropout,
            self.input_dropout,
            self.hidden_dropout,
            self.output_dropout,
            self.update_dropout,
            self.cell_dropout,
            self.weight_dropout,
            self.zoneout_hidden,
            self.zoneout_cell,
        )

    @property
    def draws(self) -> bool:
        """Whether a forward pass with these options draws any mask, and so needs a seed."""
        return self.training and any(rate > 0.0 for rate in self.rates)


class LayerParameters(NamedTuple):
    """The parameters of one layer and direction, under ``nn.LSTM``'s names. Absent ones are ``None``.

    Shapes: ``weight_ih (4H, I)``, ``weight_hh (4H, P)``, ``bias_ih`` and ``bias_hh`` ``(4H,)``,
    ``weight_hr (P, H)``, the input's and recurrent norm's ``(4H,)``, the cell norm's ``(H,)``.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None
    norm_input_weight: Tensor | None = None
    norm_input_bias: Tensor | None = None
    norm_recurrent_weight: Tensor | None = None
    norm_recurrent_bias: Tensor | None = None
    norm_cell_weight: Tensor | None = None
    norm_cell_bias: Tensor | None = None


class RunningStatistics(NamedTuple):
    """Population statistics that batch norm reads: ``(R, 4H)`` or, for the cell, ``(R, H)``.

    ``index`` is ``(T,)`` int64: the row to read at processed step ``s``, or -1 for mean 0 and variance 1.
    ``input_index`` is the same for the input's buffers, which have one row with
    ``input_statistics="sequence"``. Read in evaluation, and in training at steps with a single valid row.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls here
    input_index: Tensor
    input_mean: Tensor | None = None
    input_var: Tensor | None = None
    recurrent_mean: Tensor | None = None
    recurrent_var: Tensor | None = None
    cell_mean: Tensor | None = None
    cell_var: Tensor | None = None


Probes = tuple[Tensor | None, Tensor | None]
"""``hidden_probe (T, B, P)`` in the input's type and ``cell_probe (T, B, H)`` in the compute type, of zeros.

They are there to be differentiated. The first is added to the carried ``h_s``, so that its gradient is ``dL/dh_s``;
the second to the cell of step ``s`` wherever that is read: by ``h̃_s``, and as the carried ``c_s``. Both stand at the
step's position ``t`` in the input, and have a gradient of 0 in padding. Kernels take them to be zero and read neither.
"""


class BatchStatistics(NamedTuple):
    """The mean ``[:, 0]`` and biased variance ``[:, 1]`` that each processed step was normalised with.

    ``input (T or 1, 2, 4H)``, one row with ``input_statistics="sequence"``; ``recurrent (T, 2, 4H)``;
    ``cell (T, 2, H)``; in the compute dtype; ``None`` where that norm is off. Rows of steps that no row of
    the batch reaches are 0. Constants: no gradient flows through them.
    """

    input: Tensor | None
    recurrent: Tensor | None
    cell: Tensor | None


class LayerResult(NamedTuple):
    """``output (T, B, P)``, ``final_hidden (B, P)``, ``final_cell (B, H)``, and what was asked for besides.

    ``cells (T, B, H)`` where ``return_cells`` (compute dtype, 0 in padding), ``statistics`` in training with a
    batch norm.
    """

    output: Tensor
    final_hidden: Tensor
    final_cell: Tensor
    cells: Tensor | None
    statistics: BatchStatistics | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of gates, cells and statistics: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
