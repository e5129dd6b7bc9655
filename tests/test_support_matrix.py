"""The support matrix: every row is a check that runs here, and comes to what the results file and the README say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("benchmarks.support", reason="not run: a source distribution has no benchmarks")
from benchmarks.support import table
from benchmarks.support.features import BY_KEY, DTYPES, FEATURES, WORDS, Feature
from benchmarks.support.outcomes import outcomes
from benchmarks.support.places import Place

ROOT = Path(__file__).resolve().parent.parent
RESULTS: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "support" / "support.json").read_text())
README = (ROOT / "README.md").read_text()

# Where the tests run: the GPU's own column is tests/gpu/test_gpu_support.py.
PLACES = [Place("cpu"), Place("cuda", "emulated"), Place("triton", "interpreter"), Place("reference")]
# In the interpreter a row takes seconds a type; the tool that writes the file runs all of them.
INTERPRETED: tuple[torch.dtype, ...] = (torch.float32, torch.float64)


def rows() -> list[Any]:
    made = []
    for place in PLACES:
        for feature in FEATURES:
            if feature.evidence or (feature.only and place.backend not in feature.only):
                continue
            marks = [pytest.mark.slow, pytest.mark.compile] if feature.together else []
            made.append(pytest.param(place, feature, marks=marks, id=f"{place.backend}-{feature.key}"))
    return made


@pytest.mark.filterwarnings("ignore")  # exporters' own
@pytest.mark.parametrize(("place", "feature"), rows())
def test_a_row(place: Place, feature: Feature) -> None:
    if place.stand_in == "interpreter":
        import triton_support  # noqa: F401  # switches the interpreter on
    reason = place.unavailable()
    if reason is not None:
        pytest.skip(f"not run: {reason}")
    dtypes = INTERPRETED if place.slow and len(feature.dtypes) == len(DTYPES) else DTYPES
    claimed = RESULTS["places"][place.backend][feature.key]
    found = outcomes(feature, place, dtypes)
    assert found == {word: claimed[word] for word in found}


@pytest.mark.parametrize("backend", table.COLUMNS)
def test_the_file_has_every_row_and_type(backend: str) -> None:
    found = RESULTS["places"][backend]
    expected = {
        feature.key: {"all"} if feature.evidence else {WORDS[dtype] for dtype in feature.dtypes}
        for feature in FEATURES
        if not feature.only or backend in feature.only
    }
    assert {key: set(own) for key, own in found.items()} == expected
    for key, own in found.items():
        if BY_KEY[key].evidence:
            assert (ROOT / BY_KEY[key].evidence).exists()
            assert own == {"all": "passed"}


def test_the_readmes_table_is_the_files() -> None:
    _, _, rest = README.partition(table.BEGIN + "\n")
    found, _, _ = rest.partition("\n" + table.END)
    assert found == table.markdown(RESULTS)
