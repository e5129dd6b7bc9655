"""ONNX export: what the operators become there.

Pass :func:`translations` to ``torch.onnx.export``. A layer without anything that acts in evaluation becomes an ONNX
``LSTM`` node; zoneout, cell dropout, a norm, resets and cell states become a ``Loop`` over the steps, in plain
operators. Needs the packages ``onnx`` and ``onnxscript``.

Example:
    >>> import torch, fusedreg
    >>> model = torch.nn.Sequential(fusedreg.LSTM(3, 4, zoneout_cell=0.2)).eval()
    >>> program = torch.onnx.export(  # doctest: +SKIP
    ...     model,
    ...     (torch.randn(5, 2, 3),),
    ...     "model.onnx",
    ...     dynamic_shapes=({0: "steps", 1: "batch"},),
    ...     custom_translation_table=fusedreg.onnx.translations(),
    ... )
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["translations"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` of ``torch.onnx.export`` for models with a :class:`fusedreg.LSTM`.

    Returns:
        Translations of ``fusedreg::lstm_layer_forward``, and of ``aten::cummax``, with which a batch norm finds its
        running statistics and for which ``torch.onnx`` has none. Names and shapes of inputs and outputs, dynamic
        numbers of steps and rows included, are ``torch.onnx.export``'s own.

    Raises:
        ImportError: ``onnxscript`` is not installed.

    An export raises, through ``torch.onnx``, for a model in training mode and for 16-bit types.
    """
    try:
        from fusedreg.onnx import translation
    except ImportError as error:
        raise ImportError("fusedreg.onnx needs onnxscript: pip install onnx onnxscript") from error
    return {
        torch.ops.fusedreg.lstm_layer_forward.default: translation.layer,
        torch.ops.fusedreg.draw_seed.default: translation.draw_seed,
        torch.ops.aten.cummax.default: translation.cummax,
    }
