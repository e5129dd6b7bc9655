"""Tests of the GPU's kernels on a GPU: all are marked ``gpu``, and skipped with the reason where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_targets import BACKENDS, STAND_IN, TARGETS, Target, available, missing_device

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing_device()
    for item in items:
        if HERE not in Path(item.path).parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"not run: {reason}"))
        elif STAND_IN and item.get_closest_marker("device"):
            item.add_marker(pytest.mark.skip(reason="not run: needs a GPU itself, and no stand-in"))


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> Target:
    """Every tier of the CUDA kernels, their own choice of a tier, and Triton."""
    return available(request.param)


@pytest.fixture(params=BACKENDS, ids=lambda target: target.name)
def backend(request: pytest.FixtureRequest) -> Target:
    """The CUDA kernels with the tier they choose, and Triton."""
    return available(request.param)
