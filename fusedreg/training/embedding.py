"""Embedding dropout: whole words dropped, by type."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedreg.training.locked_dropout import check_rate


def embedding_dropout(embedding: nn.Embedding, words: Tensor, rate: float) -> Tensor:
    """Look words up in a table of which a share of the *types* has been dropped (Gal & Ghahramani 2016, section 4.2).

    ``e_{t,b} = m[w_{t,b}] · E[w_{t,b}]``, with one mask value a word type: every occurrence of a word in the batch is
    dropped or kept alike, as in AWD-LSTM (Merity et al. 2018: rate 0.1). What is kept is scaled by 1/(1-rate). Only
    the looked-up vectors are multiplied, never a copy of the table.

    Args:
        embedding: the table. In its evaluation mode nothing is dropped. Its ``padding_idx`` and other options hold.
        words: indices, any shape.
        rate: the probability of dropping a type, in [0, 1).

    Returns:
        The embedding's result: ``words``' shape and the features.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, fusedreg
        >>> table = torch.nn.Embedding(10, 4)
        >>> vectors = fusedreg.training.embedding_dropout(table, torch.tensor([[3, 3], [1, 3]]), 0.5)
        >>> bool((vectors[0, 0] == vectors[1, 1]).all())
        True
    """
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"embedding: expected a torch.nn.Embedding, got {type(embedding).__name__}")
    rate = check_rate("rate", rate)
    vectors: Tensor = embedding(words)
    if not embedding.training or rate == 0.0:
        return vectors
    mask = torch.empty(embedding.num_embeddings, dtype=vectors.dtype, device=vectors.device)
    mask.bernoulli_(1.0 - rate).div_(1.0 - rate)
    return vectors * mask[words][..., None]


class EmbeddingDropout(nn.Module):
    """:func:`embedding_dropout` as a module around an embedding.

    Args:
        embedding: the table; ``module.embedding`` afterwards.
        rate: the probability of dropping a word type, in [0, 1).

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, fusedreg
        >>> module = fusedreg.training.EmbeddingDropout(torch.nn.Embedding(10, 4), 0.1)
        >>> module(torch.tensor([3, 1])).shape
        torch.Size([2, 4])
    """

    def __init__(self, embedding: nn.Embedding, rate: float) -> None:
        super().__init__()
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding: expected a torch.nn.Embedding, got {type(embedding).__name__}")
        self.embedding = embedding
        self.rate = check_rate("rate", rate)

    def forward(self, words: Tensor) -> Tensor:
        """Look words up; in training, drop whole types."""
        return embedding_dropout(self.embedding, words, self.rate)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate}"
