"""Locked dropout as a module: one mask a sequence, the same at every step."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Sequences = TypeVar("Sequences", Tensor, PackedSequence)


def check_rate(name: str, value: object) -> float:
    """Check a probability of dropping.

    Raises:
        TypeError: not a number. ValueError: out of [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}; pass a float")
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name}: expected a probability of dropping in [0, 1), got {value!r}; pass 0 to switch it off (this is "
            f"the probability of dropping, not of keeping)"
        )
    return float(value)


class LockedDropout(nn.Module):
    """``y_t = m ⊙ x_t``: dropout with one mask a row and sequence, as AWD-LSTM has it (Merity et al. 2018).

    In training what is kept is scaled by 1/(1-rate); in evaluation nothing happens. It is ``output_dropout`` of a
    layer (or ``input_dropout`` of the next), outside of it: for people who need the undropped output too. The mask is
    drawn with torch's generator of the input's device.

    Args:
        rate: the probability of dropping, in [0, 1).
        batch_first: the layout of a batched input.

    Shapes:
        ``(T, B, F)``, ``(B, T, F)`` with ``batch_first``, ``(T, F)``, or a ``PackedSequence``; the result alike.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch
        >>> from fusedreg.training import LockedDropout
        >>> dropped = LockedDropout(0.5)(torch.ones(7, 2, 3))
        >>> bool((dropped == dropped[0]).all())
        True
    """

    def __init__(self, rate: float, *, batch_first: bool = False) -> None:
        super().__init__()
        self.rate = check_rate("rate", rate)
        self.batch_first = batch_first

    def forward(self, input: Sequences) -> Sequences:
        """Drop the same features at every step of a row."""
        if not self.training or self.rate == 0.0:
            return input
        if isinstance(input, PackedSequence):
            return input._replace(data=input.data * self._packed_mask(input))
        if input.dim() not in (2, 3):
            raise ValueError(
                f"input: expected (T, B, F), (B, T, F) with batch_first or (T, F), got shape {tuple(input.shape)}"
            )
        time_axis = 1 if self.batch_first and input.dim() == 3 else 0
        return input * self._mask(input.narrow(time_axis, 0, 1))

    def _mask(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, requires_grad=False).bernoulli_(1.0 - self.rate).div_(1.0 - self.rate)

    def _packed_mask(self, input: PackedSequence) -> Tensor:
        """One mask a row, brought to where the row's steps are: sorted rows, the longest first, step by step."""
        counts = input.batch_sizes
        first_rows = input.data[: int(counts[0])]
        rows = torch.cat([torch.arange(int(count)) for count in counts]).to(input.data.device)
        return self._mask(first_rows)[rows]

    def extra_repr(self) -> str:
        """The rate, and the layout where it is not the default."""
        return f"{self.rate}" + (", batch_first=True" if self.batch_first else "")
