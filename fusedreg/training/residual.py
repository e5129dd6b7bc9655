"""Residual connections between the layers of a stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedreg.modules import LSTM
from fusedreg.training.padding import valid_steps


class ResidualResult(NamedTuple):
    """``output`` of the last layer with its residual, and ``state``, one ``(h_n, c_n)`` a layer."""

    output: Any
    state: list[tuple[Tensor, Tensor]]


class ResidualLSTM(nn.Module):
    """A stack in which a layer's input is added to its output: ``x_{l+1} = LSTM_l(x_l) + x_l`` (Wu et al. 2016).

    What the recurrence inside a layer carries is its own ``h``, without the residual. A mask on a layer's output
    (``output_dropout``) acts before the addition, so that a dropped unit passes its input on.

    Args:
        layers: LSTMs, :class:`fusedreg.LSTM` or :class:`torch.nn.LSTM`, each with any options of its own, one layer
            or more inside; all with the same ``batch_first``.
        first: index of the first one with a residual: 1 by default, for the first layer's input usually has another
            width. From there on each layer's output is as wide as its input.

    Attributes:
        layers: the LSTMs.

    Shapes:
        As the layers' own: a tensor or a ``PackedSequence``.

    Raises:
        TypeError: a layer that is no LSTM. ValueError: none at all, widths that do not fit, mixed layouts.

    Example:
        >>> import torch, fusedreg
        >>> stack = fusedreg.training.ResidualLSTM(
        ...     [fusedreg.LSTM(3, 8), fusedreg.LSTM(8, 8, zoneout_cell=0.2), fusedreg.LSTM(8, 8)]
        ... )
        >>> output, state = stack(torch.randn(5, 2, 3))
        >>> output.shape, len(state)
        (torch.Size([5, 2, 8]), 3)
    """

    def __init__(self, layers: Iterable[nn.Module], *, first: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.first = first
        if len(self.layers) == 0:
            raise ValueError("layers: expected at least one LSTM, got none")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"first: expected an index of a layer, got {first!r}; 0 for a residual around each")
        width: int | None = None
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, (LSTM, nn.LSTM)):
                raise TypeError(f"layers[{index}]: expected a fusedreg.LSTM or an nn.LSTM, got {type(layer).__name__}")
            if layer.batch_first != cast("LSTM", self.layers[0]).batch_first:
                raise ValueError(f"layers[{index}]: expected batch_first as the first layer's, got another")
            if width is not None and layer.input_size != width:
                raise ValueError(
                    f"layers[{index}]: expected input_size={width}, the width of the layer below, got "
                    f"{layer.input_size}"
                )
            width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
            if index >= first and width != layer.input_size:
                raise ValueError(
                    f"layers[{index}]: expected an output as wide as its input, {layer.input_size}, for the residual, "
                    f"got {width}; begin later with first={index + 1}, or give the layer that size"
                )

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: Sequence[tuple[Tensor, Tensor]] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> ResidualResult:
        """Run the layers.

        Args:
            input: as the layers take it.
            state: one ``(h_0, c_0)`` a layer; ``None`` for zeros. Detach it with :func:`fusedreg.truncated.detach`.
            lengths, reset: given to every layer, as :meth:`fusedreg.LSTM.forward` takes them; with ``lengths`` the
                output is 0 in padding. ``nn.LSTM`` has neither.

        Returns:
            :class:`ResidualResult`.

        Raises:
            ValueError: not one state a layer, or ``lengths`` or ``reset`` for an ``nn.LSTM``.
        """
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"state: expected one (h, c) a layer, {len(self.layers)} of them, got {len(state)}")
        given = {"lengths": lengths, "reset": reset}
        options = {name: value for name, value in given.items() if value is not None}
        if options and any(isinstance(layer, nn.LSTM) for layer in self.layers):
            raise ValueError(
                f"{next(iter(options))}: expected None with a torch.nn.LSTM among the layers, got one; use "
                f"fusedreg.LSTM (fusedreg.replace_lstms), or a PackedSequence for lengths"
            )
        valid = None
        if lengths is not None and isinstance(input, Tensor):
            valid = valid_steps(input, lengths, bool(self.layers[0].batch_first))
        states = []
        for index, layer in enumerate(self.layers):
            output, last = layer(input, None if state is None else state[index], **options)[:2]
            states.append(last)
            input = _add(output, input, valid) if index >= self.first else output
        return ResidualResult(input, states)

    def extra_repr(self) -> str:
        """Where the residuals begin."""
        return f"first={self.first}"


def _add(output: Any, input: Any, valid: Tensor | None) -> Any:
    if isinstance(output, PackedSequence):
        return output._replace(data=output.data + input.data)
    # Selected: padding of the input may hold anything, NaN included.
    return output + (input if valid is None else torch.where(valid[..., None], input, 0.0))
