"""Under ``torch.autocast``: tensors in its type, as ``nn.LSTM`` has them, but for the carried cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedreg.layer import LayerParameters


def autocast(input: Any, hx: Any, layers: Sequence[LayerParameters]) -> tuple[Any, Any, Sequence[LayerParameters]]:
    """Cast a call's tensors where an autocast is on for the input's device; else return them as they are.

    float64 is left alone, as autocast leaves it. ``c_0`` keeps its type, for a float32 one is carried unrounded.
    What is not as it should be is left to :mod:`fusedreg.validation`.

    Args:
        input: a tensor or a ``PackedSequence``.
        hx: ``(h_0, c_0)`` or ``None``.
        layers: parameters by layer and direction.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor) or not torch.is_autocast_enabled(data.device.type):
        return input, hx, layers
    dtype = torch.get_autocast_dtype(data.device.type)

    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    if data.dtype != dtype:
        input = input._replace(data=cast(data)) if isinstance(input, PackedSequence) else cast(data)
    if isinstance(hx, (tuple, list)) and len(hx) == 2:
        cell = hx[1] if isinstance(hx[1], Tensor) and hx[1].dtype == torch.float32 else cast(hx[1])
        hx = cast(hx[0]), cell
    return input, hx, [LayerParameters(*(cast(value) for value in layer)) for layer in layers]
