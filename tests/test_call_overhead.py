"""What a call costs besides its arithmetic: a tiny one against ``nn.LSTM``'s, by the thread's own clock.

The bounds are generous, for a busy machine; benchmarks say what it is on a quiet one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import compiled
from torch import nn

import fusedreg

pytestmark = compiled

SIZE = 16


@pytest.fixture(autouse=True)
def as_programs_run() -> Iterator[None]:
    """One thread, and without the filling of fresh memory that the other tests ask for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_num_threads(threads)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 60, calls: int = 20) -> float:
    """The least time of each, over rounds in alternation."""

    def seconds(call: Callable[[], object]) -> float:
        begin = time.thread_time()
        for _ in range(calls):
            call()
        return time.thread_time() - begin

    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return min(own for own, _ in pairs) / min(other for _, other in pairs)


@pytest.mark.parametrize("with_state", [True, False])
def test_one_step_of_one_row(with_state: bool) -> None:
    ours, theirs = fusedreg.LSTM(SIZE, SIZE), nn.LSTM(SIZE, SIZE)
    input = torch.randn(1, 1, SIZE)
    state = (torch.zeros(1, 1, SIZE), torch.zeros(1, 1, SIZE)) if with_state else None
    with torch.no_grad():
        assert ratio(lambda: ours(input, state), lambda: theirs(input, state)) < 0.7

    def train(module: nn.Module) -> Callable[[], object]:
        return lambda: module(input, state)[0].sum().backward()

    assert ratio(train(ours), train(theirs), rounds=30) < 1.1


def test_one_step_of_a_cell() -> None:
    ours, theirs = fusedreg.LSTMCell(SIZE, SIZE), nn.LSTMCell(SIZE, SIZE)
    input, state = torch.randn(1, SIZE), (torch.zeros(1, SIZE), torch.zeros(1, SIZE))
    with torch.no_grad():
        assert ratio(lambda: ours(input, state), lambda: theirs(input, state)) < 1.7
