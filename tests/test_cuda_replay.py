"""Nothing that a call of the CUDA operators launches depends on a value: what the capture of a CUDA graph needs.

On the emulated device a call's launches, copies and products are recorded, with the bytes of each kernel's parameters.
Every argument then changes in place, and the record, done again, must give what a call with the new values gives. A
length, a seed or a flag that the host had looked at, or scratch memory that counted on being zero, would show.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_cuda import TIERS, emulated, use
from test_parity import case_of
from test_registration import SAVES, backward_arguments, forward_arguments
from torch import Tensor

from fusedreg.testing import LayerCase

pytestmark = emulated

NAMES = ["none", "everything", "everything_untied", "everything_batch_norm", "everything_layer_norm"]
CALLS = [*itertools.product(NAMES, TIERS), ("projected", "step")]

every_call = pytest.mark.parametrize(("name", "tier"), CALLS)


def case_named(name: str) -> LayerCase:
    regularization = "everything" if name == "projected" else name
    case = case_of(regularization, steps=4, hidden_size=16, ragged=True, resets=True)
    return replace(case, proj_size=8 if name == "projected" else 0)


@contextlib.contextmanager
def recording() -> Iterator[Callable[[], int]]:
    """What is called within the block is recorded, until the function that is given does all of it again."""
    library = torch.ops.fusedreg_emulated
    library._start_recording()
    try:
        yield library._replay
    finally:
        library._forget_recording()


def check_replay(operator: Any, arguments: dict[str, Any], others: dict[str, Any]) -> None:
    with recording() as replay:
        results: Sequence[Tensor] = operator(*arguments.values())
        as_recorded = [result.clone() for result in results]
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                value.copy_(others[name])
        assert replay() > 2
    fresh = operator(*others.values())
    for place, (again, right) in enumerate(zip(results, fresh, strict=True)):
        assert torch.equal(again.nan_to_num(7.25), right.nan_to_num(7.25)), place
    assert any(not torch.equal(one, other) for one, other in zip(as_recorded, fresh, strict=True)), "nothing changed"


@every_call
def test_the_forward(name: str, tier: str) -> None:
    case = case_named(name)
    one, other = (forward_arguments(case, seed=seed) for seed in (0, 1))
    with use(tier):
        check_replay(torch.ops.fusedreg_emulated.lstm_layer_forward, one, other)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@every_call
def test_the_backward(name: str, tier: str, save: str) -> None:
    case = case_named(name)
    one, other = (backward_arguments(case, SAVES[save], seed=seed) for seed in (0, 1))
    with use(tier):
        check_replay(torch.ops.fusedreg_emulated.lstm_layer_backward, one, other)
