"""The whole option space at random in every tier of the CUDA kernels, on the emulated device, in a random order of
threads. As ``test_random_options.py``, whose cases and tolerances these are; the seed stands in pytest's header.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_cuda import TIERS, emulated, lstm_layer, use
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from test_random_options import ONE_UNIT, agree, allowed_error, cases, padding_is_zero

from fusedreg.testing import LayerCase, assert_within_budget, implementation, make_arguments, run_layer

pytestmark = emulated

SCHEDULES = st.integers(0, 2**16)


@settings(max_examples=100)
@given(case=cases(), seed=st.integers(0, 2**16), schedule=SCHEDULES)
@example(case=ONE_UNIT, seed=1, schedule=1)
def test_step_tier_in_float64(case: LayerCase, seed: int, schedule: int) -> None:
    """Any shape, however small: float64 leaves no doubt whether a difference is rounding."""
    case = replace(case, dtype=torch.float64)
    event(f"norm {type(case.regularization.norm).__name__}")
    arguments = make_arguments(case, seed)
    exact = run_layer(implementation("reference"), case, arguments)
    with use("step", schedule=schedule):
        ours = run_layer(lstm_layer, case, arguments)
    agree(ours, exact, allowed_error(case.regularization))
    padding_is_zero(ours, case, arguments.lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=20)
@given(case=cases(), schedule=SCHEDULES)
def test_tiers_within_budget(tier: str, dtype: torch.dtype, case: LayerCase, schedule: int) -> None:
    """The error budget, where it says something: rows, features and an ``eps`` as in ``test_layer_within_budget``."""
    regularization = case.regularization
    if regularization.norm is not None:
        regularization = replace(regularization, norm=replace(regularization.norm, eps=0.1))
    case = replace(
        case,
        dtype=dtype,
        regularization=regularization,
        steps=min(case.steps, 5),
        hidden_size=max(case.hidden_size, 16),
        rows=max(case.rows, 12),
    )
    with use(tier, schedule=schedule):
        assert_within_budget(lstm_layer, case, seeds=4)


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=20)
@given(case=cases(), seed=st.integers(0, 2**16), schedule=SCHEDULES)
@example(case=ONE_UNIT, seed=1, schedule=1)
def test_tiers_are_finite_and_keep_padding(tier: str, case: LayerCase, seed: int, schedule: int) -> None:
    """Where norms of very few values amplify rounding, what is left to ask for."""
    case = replace(case, steps=min(case.steps, 5))
    arguments = make_arguments(case, seed)
    with use(tier, schedule=schedule):
        ours = run_layer(lstm_layer, case, arguments)
        again = run_layer(lstm_layer, case, arguments)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
    padding_is_zero(ours, case, arguments.lengths)
