"""An LSTM as a plain loop whose cell can do without ``tanh``: what no kernel computes, for one example.

Parameters are ``fusedreg.LSTM``'s, and with ``squash=True`` so are the numbers in training
(``tests/test_examples.py`` compares them): what a comparison of the two shows is the ``tanh`` alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedreg
from fusedreg import BatchNorm


class OpenCellLSTM(nn.Module):
    """One layer, time first: ``g = z_g`` and ``h = o ⊙ N_c(c)`` with ``squash=False``, ``tanh`` around both with it.

    ``norm`` is a :class:`fusedreg.BatchNorm` of all three terms with per-step running statistics, or ``None``.
    Parameters and running statistics live in ``self.lstm``, a :class:`fusedreg.LSTM` that is never called.
    ``cells`` has every cell of the last call, for their gradients.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, bias: bool, norm: BatchNorm | None, squash: bool = False
    ) -> None:
        super().__init__()
        self.lstm = fusedreg.LSTM(input_size, hidden_size, bias=bias, norm=norm)
        self.squash = squash
        self.cells: list[Tensor] = []

    def _normalize(self, term: str, values: Tensor, step: int) -> Tensor:
        norm = self.lstm.regularization.norm
        if norm is None:
            return values
        assert isinstance(norm, BatchNorm)
        mean, variance = (getattr(self.lstm, f"running_{term}_{what}_l0")[step] for what in ("mean", "var"))
        gain, shift = (getattr(self.lstm, f"norm_{term}_{what}_l0", None) for what in ("weight", "bias"))
        momentum = 0.1 if norm.momentum is None else norm.momentum
        return functional.batch_norm(values, mean, variance, gain, shift, self.training, momentum, norm.eps)

    def forward(self, input: Tensor, state: None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``input (T, B, I)`` → outputs ``(T, B, H)`` and the last states ``(1, B, H)``, from a zero state."""
        lstm = self.lstm
        hidden = cell = input.new_zeros(input.shape[1], lstm.hidden_size)
        bias = lstm.bias_ih_l0 + lstm.bias_hh_l0 if lstm.bias else 0.0
        outputs, self.cells = [], []
        terms = functional.linear(input, lstm.weight_ih_l0)
        norm = lstm.regularization.norm
        pooled = isinstance(norm, BatchNorm) and norm.input_statistics == "sequence"
        if pooled:  # of all steps at once: the one set of statistics is the first
            terms = self._normalize("input", terms.flatten(0, 1), 0).view_as(terms)
        for step, term in enumerate(terms.unbind(0)):
            recurrent = functional.linear(hidden, lstm.weight_hh_l0)
            own = term if pooled else self._normalize("input", term, step)
            gates = self._normalize("recurrent", recurrent, step) + own + bias
            i, f, candidate, o = gates.chunk(4, 1)
            g = candidate.tanh() if self.squash else candidate
            cell = f.sigmoid() * cell + i.sigmoid() * g
            shown = self._normalize("cell", cell, step)
            hidden = o.sigmoid() * (shown.tanh() if self.squash else shown)
            outputs.append(hidden)
            self.cells.append(cell)
        return torch.stack(outputs), (hidden.unsqueeze(0), cell.unsqueeze(0))
