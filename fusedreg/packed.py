"""``PackedSequence`` in and out: padded with lengths inside, rows in the caller's order.

The operators take padded batches with lengths. Rows go back to the caller's order first, so that row ``b`` of the
masks and of the initial states is the caller's row ``b``, sorted or not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence


class Padded(NamedTuple):
    """``input (T, B, I)`` in the caller's order of rows, and their ``lengths (B,)``, int64 on the host."""

    input: Tensor
    lengths: Tensor


def pad(packed: PackedSequence) -> Padded:
    """Unpack a sequence to a padded batch.

    Args:
        packed: from ``pack_padded_sequence`` or ``pack_sequence``, with ``enforce_sorted`` or without.
    """
    input, lengths = pad_packed_sequence(packed)
    return Padded(input, lengths)


def pack_like(padded: Tensor, lengths: Tensor, packed: PackedSequence) -> PackedSequence:
    """Pack a result as the input was: the same batch sizes and the same permutations.

    Args:
        padded: ``(T, B, F)`` in the caller's order of rows.
        lengths: ``(B,)`` on the host, as :func:`pad` gave them.
        packed: the input.
    """
    if packed.sorted_indices is not None:
        padded = padded.index_select(1, packed.sorted_indices)
        lengths = lengths.index_select(0, packed.sorted_indices.to(lengths.device))
    data, _ = torch._VF._pack_padded_sequence(padded, lengths, False)
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
