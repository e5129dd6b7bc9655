"""What a module is made with: what is let through. ``test_bad_inputs.py`` holds the table of what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fusedreg import Regularization, hyperparameters


@pytest.mark.parametrize("value", [0.5, 0, [0.1, 0.2], ()])
def test_dropouts_that_are_fine(value: Any) -> None:
    hyperparameters.check_dropout(value)


def test_merging_regularisers() -> None:
    merged = hyperparameters.merge_regularization(Regularization(zoneout_cell=0.5), Regularization(dropout=0.2))
    assert merged == Regularization(dropout=0.2, zoneout_cell=0.5)
    same = hyperparameters.merge_regularization(Regularization(dropout=0.2), Regularization(dropout=0.2))
    assert same == Regularization(dropout=0.2)
