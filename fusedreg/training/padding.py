"""Which steps of which rows are no padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedreg.validation import check_lengths


def is_time_first(output: Tensor, batch_first: bool) -> bool:
    """Whether axis 0 is time: with the default layout, and without a batch."""
    return output.dim() == 2 or not batch_first


def valid_steps(output: Tensor, lengths: Tensor | Sequence[int] | None, batch_first: bool) -> Tensor | None:
    """Bool, the output's shape without its features: true before each row's length. ``None`` without lengths.

    Raises:
        ValueError: not one length a row, one out of [0, T] on the host, or an output that is neither batched nor
            unbatched. TypeError: no tensor, or lengths that are not integers.
    """
    check_output(output)
    if output.dim() not in (2, 3):
        raise ValueError(f"output: expected 3 axes, or 2 unbatched, got shape {tuple(output.shape)}")
    if lengths is None:
        return None
    number_of_steps = output.shape[0 if is_time_first(output, batch_first) else 1]
    steps = torch.arange(number_of_steps, device=output.device)
    if output.dim() == 2:
        length = torch.as_tensor(lengths)
        if length.dim() != 0:
            raise ValueError(
                f"lengths: expected one number for an unbatched output, got shape {tuple(length.shape)}; pass an int"
            )
        return steps < check_lengths(length.unsqueeze(0), 1, number_of_steps, output.device)
    on_device = check_lengths(lengths, output.shape[0 if batch_first else 1], number_of_steps, output.device)
    return steps < on_device[:, None] if batch_first else steps[:, None] < on_device


def check_output(output: object) -> None:
    """Check that it is a tensor, and not all that an LSTM returns.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"output: expected a tensor or a PackedSequence, got {type(output).__name__}; pass the first of what the "
            f"LSTM returns: output, _ = lstm(input)"
        )


def check_not_packed_twice(lengths: object) -> None:
    """Check that lengths do not come beside a ``PackedSequence``.

    Raises:
        ValueError: they do.
    """
    if lengths is not None:
        raise ValueError("lengths: expected None with a PackedSequence, which has its own, got both; leave lengths out")
