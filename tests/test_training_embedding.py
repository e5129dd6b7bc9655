"""Embedding dropout: by word type, over the whole batch, scaled; equal to dropping rows of the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedreg.training import EmbeddingDropout, embedding_dropout


def test_types_are_dropped_everywhere_alike() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(40, 6)
    words = torch.randint(40, (30, 20))
    vectors = embedding_dropout(table, words, 0.4)
    ratio = (vectors / table(words)).detach()
    by_type = torch.stack([ratio[words == word].flatten()[:1].squeeze() for word in range(40)])
    torch.testing.assert_close(ratio, by_type[words][..., None].expand_as(ratio))
    dropped = by_type == 0
    torch.testing.assert_close(by_type[~dropped], torch.full_like(by_type[~dropped], 1 / 0.6))
    assert 5 < dropped.sum() < 28


def test_the_gradient_is_that_of_a_table_with_dropped_rows() -> None:
    torch.manual_seed(0)
    table, words = nn.Embedding(10, 3, padding_idx=2, dtype=torch.float64), torch.randint(10, (7, 4))
    torch.manual_seed(5)
    ours = embedding_dropout(table, words, 0.5)
    torch.manual_seed(5)
    kept = torch.empty(10, dtype=torch.float64).bernoulli_(0.5) / 0.5
    theirs = nn.functional.embedding(words, table.weight * kept[:, None], padding_idx=2)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(one.square().sum(), table.weight)[0] for one in (ours, theirs)]
    torch.testing.assert_close(*grads)
    assert grads[0][2].eq(0).all()


def test_the_module_and_evaluation() -> None:
    table, words = nn.Embedding(10, 3), torch.tensor([[1, 2]])
    module = EmbeddingDropout(table, 0.5)
    torch.manual_seed(2)
    first = module(words)
    torch.manual_seed(2)
    assert torch.equal(first, embedding_dropout(table, words, 0.5))
    assert torch.equal(module.eval()(words), table(words))
    assert [name for name, _ in module.named_parameters()] == ["embedding.weight"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rate: expected a probability"):
        EmbeddingDropout(nn.Embedding(2, 2), 1.5)
    for function in (lambda: EmbeddingDropout(nn.Linear(2, 2), 0.1), lambda: embedding_dropout(None, None, 0.1)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"embedding: expected a torch\.nn\.Embedding"):
            function()
