"""What acts around the cell: weight decay and penalties by component, constraints, clipping, AWD-LSTM's parts.

Everything here works with :class:`fusedreg.LSTM`, :class:`torch.nn.LSTM`, their cells, and models that hold several.

Example:
    >>> import torch, fusedreg
    >>> from fusedreg import training
    >>> lstm = fusedreg.LSTM(3, 4)
    >>> groups = training.parameter_groups(lstm, weight_decay={"kernel": 1e-4, "recurrent": 1e-5})
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    >>> lstm(torch.randn(5, 2, 3))[0].square().mean().backward()
    >>> norms = training.clip_gradients(lstm, 1.0)
    >>> optimizer.step()
"""

from __future__ import annotations

from fusedreg.training.averaging import NonMonotonicTrigger, ParameterAverage
from fusedreg.training.clipping import GradientNorms, clip_gradients
from fusedreg.training.components import COMPONENTS, Classified, Component, classify
from fusedreg.training.constraints import SpectralNormCap, cap_spectral_norm_, cap_spectral_radius_, max_norm_
from fusedreg.training.embedding import EmbeddingDropout, embedding_dropout
from fusedreg.training.groups import parameter_groups
from fusedreg.training.language_model import AWDLSTM, LanguageModelResult
from fusedreg.training.locked_dropout import LockedDropout
from fusedreg.training.penalties import (
    activation_regularization,
    activity_l1,
    activity_l2,
    l1_penalty,
    l2_penalty,
    temporal_activation_regularization,
)
from fusedreg.training.random_length import RandomLength, scaled_learning_rate
from fusedreg.training.residual import ResidualLSTM, ResidualResult
from fusedreg.training.stateful import StatefulBatches, StreamBatch, contiguous_streams
from fusedreg.training.vanishing import vanishing_gradient_penalty

__all__ = [
    "AWDLSTM",
    "COMPONENTS",
    "Classified",
    "Component",
    "EmbeddingDropout",
    "GradientNorms",
    "LanguageModelResult",
    "LockedDropout",
    "NonMonotonicTrigger",
    "ParameterAverage",
    "RandomLength",
    "ResidualLSTM",
    "ResidualResult",
    "SpectralNormCap",
    "StatefulBatches",
    "StreamBatch",
    "activation_regularization",
    "activity_l1",
    "activity_l2",
    "cap_spectral_norm_",
    "cap_spectral_radius_",
    "classify",
    "clip_gradients",
    "contiguous_streams",
    "embedding_dropout",
    "l1_penalty",
    "l2_penalty",
    "max_norm_",
    "parameter_groups",
    "scaled_learning_rate",
    "temporal_activation_regularization",
    "vanishing_gradient_penalty",
]
