"""Which steps of which rows are no padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_time_first(output: Tensor, batch_first: bool) -> bool:
    """Whether axis 0 is time: with the default layout, and without a batch."""
    return output.dim() == 2 or not batch_first


def valid_steps(output: Tensor, lengths: Tensor | Sequence[int] | None, batch_first: bool) -> Tensor | None:
    """Bool, the output's shape without its features: true before each row's length. ``None`` without lengths.

    Raises:
        ValueError: not one length a row, or an output that is neither batched nor unbatched.
    """
    if output.dim() not in (2, 3):
        raise ValueError(f"output: expected 3 axes, or 2 unbatched, got shape {tuple(output.shape)}")
    if lengths is None:
        return None
    on_device = torch.as_tensor(lengths, device=output.device)
    rows = output.shape[0 if batch_first else 1] if output.dim() == 3 else None
    if tuple(on_device.shape) != (() if rows is None else (rows,)):
        raise ValueError(f"lengths: expected one a row, {rows} of them, got shape {tuple(on_device.shape)}")
    steps = torch.arange(output.shape[0 if is_time_first(output, batch_first) else 1], device=output.device)
    if rows is None:
        return steps < on_device
    return steps < on_device[:, None] if batch_first else steps[:, None] < on_device


def check_not_packed_twice(lengths: object) -> None:
    """Check that lengths do not come beside a ``PackedSequence``.

    Raises:
        ValueError: they do.
    """
    if lengths is not None:
        raise ValueError("lengths: expected None with a PackedSequence, which has its own, got both; leave lengths out")
