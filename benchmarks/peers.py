"""Implementations of other projects, where they are installed: adapted to ``module(values) -> (output, state)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TorchRLLSTM(nn.Module):
    """TorchRL's ``LSTMModule`` with one of its ``recurrent_backend``s, resets included. Parameters as ``nn.LSTM``'s.

    It takes batches first and hidden states of every step; what it needs besides the values is made once and kept, and
    the values are laid out anew in each call only where they come time first, as they do here on every side.

    Raises ``ImportError`` where TorchRL is missing, ``RuntimeError`` or ``TypeError`` where its version has no such
    backend.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, recurrent_backend: str = "triton") -> None:
        super().__init__()
        from torchrl.modules import LSTMModule

        self.peer: Any = LSTMModule(
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            in_keys=["values", "hidden", "cell"],
            out_keys=["output", ("next", "hidden"), ("next", "cell")],
            recurrent_backend=recurrent_backend,
            default_recurrent_mode=True,
        )
        self.states = (num_layers, hidden_size)
        self._prepared: tuple[Any, Tensor, Tensor] | None = None

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Weights under ``nn.LSTM``'s names."""
        return self.peer.lstm.load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(self, values: Tensor, *, reset: Tensor | None = None) -> tuple[Tensor, None]:
        """``values (T, B, I)``, ``reset (T, B)`` bool → ``(T, B, H)``."""
        from tensordict import TensorDict

        if values.dtype == torch.bfloat16:
            self.peer.recurrent_compute_dtype = torch.bfloat16  # its products in bfloat16: otherwise TF32
        steps, rows = values.shape[:2]
        key = (values.shape, values.dtype, None if reset is None else id(reset))
        if self._prepared is None or self._prepared[0] != key:
            zeros = values.new_zeros(rows, steps, *self.states)
            starts = torch.zeros(rows, steps, dtype=torch.bool, device=values.device)
            if reset is not None:
                starts |= reset.t()
            self._prepared = (key, zeros, starts.unsqueeze(-1))
        _, zeros, starts = self._prepared
        given = {"values": values.transpose(0, 1), "hidden": zeros, "cell": zeros, "is_init": starts}
        result = self.peer(TensorDict(given, (rows, steps)))
        output: Tensor = result["output"]
        return output.transpose(0, 1), None
