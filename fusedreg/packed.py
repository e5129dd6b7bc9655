"""``PackedSequence`` in and out: padded with lengths inside, rows in the caller's order.

The operators take padded batches with lengths. Rows go back to the caller's order first, so that row ``b`` of the
masks and of the initial states is the caller's row ``b``, sorted or not. Lengths are known on the host in the packed
order, and go to the device before they are put into the caller's: nothing waits for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedreg.validation import lengths_on


class Padded(NamedTuple):
    """``input (T, B, I)`` and ``lengths (B,)``, int64 on its device, in the caller's order of rows.

    ``packed_lengths (B,)`` are the lengths in the packed order, on the host.
    """

    input: Tensor
    lengths: Tensor
    packed_lengths: Tensor


def pad(packed: PackedSequence) -> Padded:
    """Unpack a sequence to a padded batch.

    Args:
        packed: from ``pack_padded_sequence`` or ``pack_sequence``, with ``enforce_sorted`` or without.
    """
    steps = packed.batch_sizes.shape[0]
    input, packed_lengths = torch._VF._pad_packed_sequence(packed.data, packed.batch_sizes, False, 0.0, steps)
    lengths = lengths_on(input.device, packed_lengths)
    if packed.unsorted_indices is not None:
        input = input.index_select(1, packed.unsorted_indices)
        lengths = lengths.index_select(0, packed.unsorted_indices)
    return Padded(input, lengths, packed_lengths)


def pack_like(padded: Tensor, packed_lengths: Tensor, packed: PackedSequence) -> PackedSequence:
    """Pack a result as the input was: the same batch sizes and the same permutations.

    Args:
        padded: ``(T, B, F)`` in the caller's order of rows.
        packed_lengths: ``(B,)``, as :func:`pad` gave them.
        packed: the input.
    """
    if packed.sorted_indices is not None:
        padded = padded.index_select(1, packed.sorted_indices)
    data, _ = torch._VF._pack_padded_sequence(padded, packed_lengths, False)
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
