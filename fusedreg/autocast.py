"""Under ``torch.autocast``: tensors and results in the types that ``nn.LSTM`` and ``nn.LSTMCell`` have there.

A call's tensors are cast to autocast's type, but for the carried cell; the gates, the cell and all statistics stay
float32, as they are beside 16-bit inputs without autocast.

On a GPU results come back in autocast's type: ``_cudnn_rnn`` and ``lstm_cell`` are cast as a whole. (cuDNN's wrapper in
torch takes float16 even where bfloat16 was asked for. Here it is what was asked for.) On a CPU only the LSTM of padded
input without a projection is cast as a whole, and only from float32 or bfloat16, for that is what oneDNN takes. For the
others torch multiplies in autocast's type, adds up a cell that keeps its own, and so gives back the wider of both:
``c_n`` with a projection, all results with packed or float16 input and of a cell. Here such results are widened, so
that their type is the same; an ``h`` has autocast's precision.

Where torch's own types depend on more than types, these are those of a processor with AVX-512 and a batch with rows:
without AVX-512, and for no rows at all, torch does not cast bfloat16 as a whole either, and one with float16 matrix
instructions casts float16 so outside training. A float16 autocast of padded input raises in torch on most processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedreg.layer import LayerParameters, compute_dtype

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

    float64 is left alone, as autocast leaves it, and beside it the carried cell is float64. A float32 ``c_0`` keeps its
    type, for it is carried unrounded. What is not as it should be is left to :mod:`fusedreg.validation`.

    Args:
        input: a tensor or a ``PackedSequence``.
        hx: ``(h_0, c_0)`` or ``None``.
        layers: parameters by layer and direction.
        of_cell: whether it is a call of ``LSTMCell``.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor) or not data.is_floating_point():
        return None
    device = data.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which "meta" cannot be asked
        return None
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    given = data.dtype
    narrow = cast(data).dtype
    kind: Kind = "padded"
    if of_cell:
        kind = "cell"
    elif layers[0].weight_hr is not None:
        kind = "projected"
    elif isinstance(input, PackedSequence) or data.dtype == torch.float16:
        kind = "packed"
    if isinstance(hx, (tuple, list)) and len(hx) == 2:
        cell = hx[1]
        if isinstance(cell, Tensor) and cell.is_floating_point():
            given = cell.dtype
            if given != torch.float64:
                cell = cell.to(torch.promote_types(given, narrow))
            elif kind == "cell" and device == "cpu":
                cell = cell.to(compute_dtype(narrow))  # torch takes it beside anything; here in the gates' precision
        hx = cast(hx[0]), cell
    cast_input = input._replace(data=cast(data)) if isinstance(input, PackedSequence) else cast(data)
    cast_layers = [LayerParameters(*(cast(value) for value in layer)) for layer in layers]
    return Cast(cast_input, hx, cast_layers, *result_types(kind, device, narrow, given))


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
