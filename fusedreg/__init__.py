"""fusedreg: a drop-in for ``torch.nn.LSTM`` with its regularisers inside one fused loop.

Example:
    >>> import torch, fusedreg
    >>> lstm = fusedreg.LSTM(10, 20, zoneout_cell=0.5, hidden_dropout=0.25)
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
"""

from __future__ import annotations

from fusedreg import backends, checkpoints, functional, initialization, inspect, onnx, training, truncated
from fusedreg._version import __version__
from fusedreg.cell import CellSequence, LSTMCell
from fusedreg.functional import LSTMResult, LSTMResultWithCells
from fusedreg.masks import masks
from fusedreg.modules import LSTM
from fusedreg.regularization import BatchNorm, LayerNorm, Regularization
from fusedreg.replacement import Replacements, replace_lstms

__all__ = [
    "LSTM",
    "LSTMCell",
    "BatchNorm",
    "CellSequence",
    "LSTMResult",
    "LSTMResultWithCells",
    "LayerNorm",
    "Regularization",
    "Replacements",
    "__version__",
    "backends",
    "checkpoints",
    "functional",
    "initialization",
    "inspect",
    "masks",
    "onnx",
    "replace_lstms",
    "training",
    "truncated",
]
