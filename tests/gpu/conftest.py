"""Tests of the GPU's kernels on a GPU: all are marked ``gpu``, and skipped with the reason where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_targets import BACKENDS, CHOSEN, DEVICE, STAND_IN, TARGETS, Target, available, missing_device

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = missing_device()
    own = [item for item in items if HERE in Path(item.path).parents]
    deselected = []
    for item in own:
        item.add_marker(pytest.mark.gpu)
        # Told of because the fill of uninitialised memory comes with torch's deterministic mode (tests/conftest.py).
        item.add_marker(pytest.mark.filterwarnings("ignore:.*[Dd]eterminis.*:UserWarning"))
        if CHOSEN and _target_of(item) != CHOSEN:
            deselected.append(item)
        elif reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"not run: {reason}"))
        elif STAND_IN and item.get_closest_marker("device"):
            item.add_marker(pytest.mark.skip(reason="not run: needs a GPU itself, and no stand-in"))
    if deselected:
        config.hook.pytest_deselected(items=deselected)
    # One case after the other, each on all targets: its truth is computed once.
    places: dict[Any, int] = {}
    kept = [item for item in own if item not in set(deselected)]
    for item in kept:
        places.setdefault(_case_of(item), len(places))
    kept.sort(key=lambda item: places[_case_of(item)])
    items[:] = [item for item in items if HERE not in Path(item.path).parents] + kept


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return dict(callspec.params) if callspec is not None else {}


def _target_of(item: pytest.Item) -> str:
    """The target of a test; what has none is about the CUDA kernels and their choice of a tier."""
    given = _parameters(item)
    target = given.get("target", given.get("backend"))
    return target.name if isinstance(target, Target) else "cuda"


def _case_of(item: pytest.Item) -> Any:
    given = {name: str(value) for name, value in _parameters(item).items() if name not in ("target", "backend")}
    return item.path, getattr(item, "originalname", item.name), tuple(sorted(given.items()))


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> Target:
    """Every tier of the CUDA kernels, their own choice of a tier, and Triton."""
    return available(request.param)


@pytest.fixture(params=BACKENDS, ids=lambda target: target.name)
def backend(request: pytest.FixtureRequest) -> Target:
    """The CUDA kernels with the tier they choose, and Triton."""
    return available(request.param)


_lost: list[str] = []


@pytest.fixture(autouse=True)
def the_device_still_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that failed is told of in its own test; the process cannot use the GPU after it, and says so at once."""
    if _lost:
        pytest.fail(f"not run: the CUDA context was lost in {_lost[0]}")
    yield
    if DEVICE.type == "cuda" and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _lost.append(request.node.nodeid)
            pytest.fail(f"the CUDA context is lost: {error}")
