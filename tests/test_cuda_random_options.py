"""The whole option space at random on the emulated device: float64 in the step tier, float32 in the persistent ones,
which have no projections.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_cuda import emulated, lstm_layer, use
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from test_random_options import ONE_UNIT, agree, allowed_error, cases, padding_is_zero

from fusedreg.testing import LayerCase, implementation, make_arguments, relative_error, run_layer

pytestmark = emulated


@settings(max_examples=80)
@given(case=cases(), seed=st.integers(0, 2**16), schedule=st.integers(0, 2**16))
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


@pytest.mark.parametrize("tier", ["grid", "cluster"])
@settings(max_examples=25)
@given(case=cases(), seed=st.integers(0, 2**16), schedule=st.integers(0, 2**16))
def test_persistent_tiers(tier: str, case: LayerCase, seed: int, schedule: int) -> None:
    """Rows, features and an ``eps`` enough that norms do not amplify float32's rounding; short, for the emulator."""
    regularization = case.regularization
    if regularization.norm is not None:
        regularization = replace(regularization, norm=replace(regularization.norm, eps=0.1))
    case = replace(
        case,
        steps=min(case.steps, 4),
        rows=min(max(case.rows, 12), 20),
        hidden_size=max(case.hidden_size, 16),
        proj_size=0,  # the step tier's
        regularization=regularization,
    )
    arguments = make_arguments(case, seed)
    exact = run_layer(implementation("reference"), case, arguments.to(torch.float64))
    with use(tier, schedule=schedule):
        ours = run_layer(lstm_layer, case, arguments)
    padding_is_zero(ours, case, arguments.lengths)
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        error = relative_error([(ours[name], value)])
        assert error < 2e-5 or (ours[name] - value).abs().max() < 1e-6, f"{name}: {error:.1e}"
