"""The CUDA kernels on several models at once, on the emulated device: ``test_models.py`` with another pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_cuda import emulated, use
from test_models import (  # noqa: F401  # tests that run here again, with the pair below
    FULL,
    Pair,
    case_of,
    check_both,
    pair_of,
    test_a_models_own_sizes_are_checked,
    test_a_subset_of_gradients,
    test_an_axis_of_models_that_does_not_fit_is_refused,
    test_any_strides,
    test_arguments_are_not_written_and_results_are_new,
    test_groups_of_rows_within_models,
    test_inputs_of_other_ranks_are_refused,
    test_models_without_rows,
    test_no_model_and_one,
    test_what_models_have_in_common_is_expanded,
)

pytestmark = emulated


@pytest.fixture
def pair() -> Iterator[Pair]:
    with use("auto"):
        yield pair_of("fusedreg_emulated")


@pytest.mark.parametrize(
    ("tier", "name", "changes"),
    [
        ("step", "everything", FULL),
        ("step", "everything_batch_norm", {"dtype": torch.bfloat16}),
        ("grid", "everything_untied", {"dtype": torch.bfloat16}),
        ("auto", "everything_layer_norm", {"ragged": True}),
    ],
)
def test_every_kind_of_loop(tier: str, name: str, changes: dict[str, Any]) -> None:
    """Models use the same scratch memory one after another."""
    with use(tier):
        check_both(pair_of("fusedreg_emulated"), case_of(name, steps=3, **changes), models=2)
