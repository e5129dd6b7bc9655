"""``last_seed``: reading back the seed that a call drew, to replay it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor

import fusedreg

INPUT = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))


def make(**options: Any) -> fusedreg.LSTM:
    return fusedreg.LSTM(4, 6, **{"zoneout_cell": 0.4, "hidden_dropout": 0.3, **options})


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=compiled), "reference"])
def test_a_call_is_replayed(backend: str) -> None:
    module = make(backend=backend, num_layers=2, dropout=0.4, bidirectional=True)
    assert module.last_seed is None
    first = module(INPUT).output
    seed = module.last_seed
    assert isinstance(seed, Tensor)
    assert (seed.dtype, seed.shape) == (torch.int64, ())
    second = module(INPUT).output
    assert not torch.equal(first, second)
    assert not torch.equal(seed, module.last_seed)
    assert torch.equal(module(INPUT, seed=seed).output, first)
    assert torch.equal(module.last_seed, seed)


def test_a_given_seed_and_a_generator_are_remembered_too() -> None:
    module = make()
    module(INPUT, seed=12)
    assert int(module.last_seed) == 12
    output = module(INPUT, generator=torch.Generator().manual_seed(3)).output
    assert torch.equal(module(INPUT, seed=module.last_seed).output, output)


def test_calls_without_masks_leave_it() -> None:
    module = make()
    module(INPUT, seed=5)
    module.eval()
    module(INPUT)
    assert int(module.last_seed) == 5
    plain = fusedreg.LSTM(4, 6)
    plain(INPUT)
    assert plain.last_seed is None


def test_it_is_no_state() -> None:
    module = make()
    before = list(module.state_dict())
    module(INPUT)
    assert list(module.state_dict()) == before
    assert not list(module.buffers())
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert other.last_seed is None
        assert torch.equal(other(INPUT, seed=module.last_seed).output, module(INPUT, seed=module.last_seed).output)


def test_none_after_a_transform() -> None:
    """A seed drawn inside belongs to the transform, and ends with it."""
    module = make()
    module(INPUT)
    torch.vmap(lambda x: module(x).output, randomness="different")(torch.stack((INPUT, INPUT)))
    assert module.last_seed is None
    module(INPUT)
    torch.func.grad(lambda x: module(x).output.sum())(INPUT)
    assert module.last_seed is None


@compiled
@pytest.mark.compile
def test_after_a_compiled_call() -> None:
    module = make()
    whole = torch.compile(lambda x: module(x).output, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        output = whole(INPUT)
        torch.testing.assert_close(module(INPUT, seed=module.last_seed).output, output)
    mapped = torch.compile(
        lambda x: torch.vmap(lambda row: module(row).output, randomness="different")(x),
        backend="aot_eager",
        fullgraph=True,
    )
    assert mapped(torch.stack((INPUT, INPUT))).shape == (2, 5, 3, 6)
    program = torch.export.export(module, (INPUT,))
    assert program.module()(INPUT)[0].shape == (5, 3, 6)


@pytest.mark.parametrize("kind", [fusedreg.LSTM, fusedreg.LSTMCell])
def test_a_seed_that_the_caller_counts_up_is_kept_as_it_was(kind: Any) -> None:
    module, seed = kind(3, 4, hidden_dropout=0.5), torch.tensor(12)
    module(torch.randn(2, 3), seed=seed)
    seed += 1
    assert int(module.last_seed) == 12
