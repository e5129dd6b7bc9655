"""Under ``torch.autocast``: tensors and results in the types that ``nn.LSTM`` and ``nn.LSTMCell`` have there.

A call's tensors are cast to autocast's type, but for the carried cell; the gates, the cell and all statistics stay
float32, as they are beside 16-bit inputs without autocast.

On a GPU results come back in autocast's type: ``_cudnn_rnn`` and ``lstm_cell`` are cast as a whole. (cuDNN's wrapper in
torch takes float16 even where bfloat16 was asked for. Here it is what was asked for.) On a CPU only the LSTM of padded
input without a projection is cast as a whole. For the others torch multiplies in autocast's type, adds up a cell that
keeps its own, and so gives back the wider of both: ``c_n`` with a projection, all results with packed input and of a
cell. Here such results are widened, so that their type is the same; an ``h`` has autocast's precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedreg.layer import LayerParameters

Kind = Literal["padded", "packed", "projected", "cell"]


class Cast(NamedTuple):
    """A call's arguments under autocast, and the types of its results: of ``output`` and ``h``, and of ``c``."""

    input: Any
    hx: Any
    layers: Sequence[LayerParameters]
    hidden_type: torch.dtype
    cell_type: torch.dtype


def autocast(input: Any, hx: Any, layers: Sequence[LayerParameters], *, of_cell: bool = False) -> Cast | None:
    """Cast a call's tensors where an autocast is on for the input's device; ``None`` where none is.

    float64 is left alone, as autocast leaves it. A float32 ``c_0`` keeps its type, for it is carried unrounded. What
    is not as it should be is left to :mod:`fusedreg.validation`.

    Args:
        input: a tensor or a ``PackedSequence``.
        hx: ``(h_0, c_0)`` or ``None``.
        layers: parameters by layer and direction.
        of_cell: whether it is a call of ``LSTMCell``.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor) or not torch.is_autocast_enabled(data.device.type):
        return None
    dtype = torch.get_autocast_dtype(data.device.type)

    def cast(value: Any, to: torch.dtype = dtype) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(to) if eligible else value

    given = data.dtype
    narrow = cast(data).dtype
    if isinstance(hx, (tuple, list)) and len(hx) == 2:
        cell = hx[1]
        if isinstance(cell, Tensor):
            given = cell.dtype
            cell = cast(cell, torch.promote_types(given, dtype))
        hx = cast(hx[0]), cell
    kind: Kind = "padded"
    if of_cell:
        kind = "cell"
    elif layers[0].weight_hr is not None:
        kind = "projected"
    elif isinstance(input, PackedSequence):
        kind = "packed"
    cast_input = input._replace(data=cast(data)) if isinstance(input, PackedSequence) else cast(data)
    cast_layers = [LayerParameters(*(cast(value) for value in layer)) for layer in layers]
    return Cast(cast_input, hx, cast_layers, *result_types(kind, data.device.type, narrow, given))


def result_types(kind: Kind, device: str, narrow: torch.dtype, given: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The types of ``output`` and ``h``, and of ``c``.

    Args:
        kind: of the call.
        device: the type of its device.
        narrow: autocast's type; float64 where that is what the input has.
        given: the type of ``c_0``, or of the input where there is none, before the cast.
    """
    if device != "cpu" or kind == "padded":
        return narrow, narrow
    wide = torch.promote_types(narrow, given)
    return (narrow if kind == "projected" else wide), wide
