"""The support matrix on a GPU: every row, in every type, comes to what the results file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_targets import Target

from benchmarks.support.features import FEATURES, Feature
from benchmarks.support.outcomes import outcomes
from benchmarks.support.places import Place

ROOT = Path(__file__).resolve().parents[2]
CLAIMED = json.loads((ROOT / "benchmarks" / "results" / "support" / "support.json").read_text())["places"]
ROWS = [feature for feature in FEATURES if not feature.evidence and not feature.only]


@pytest.mark.device
@pytest.mark.filterwarnings("ignore")  # exporters' own
@pytest.mark.parametrize("feature", ROWS, ids=lambda feature: feature.key)
def test_a_row(backend: Target, feature: Feature) -> None:
    assert outcomes(feature, Place(backend.backend)) == CLAIMED[backend.backend][feature.key]
