"""The kernels without torch: a C++ driver with threads of its own. `make sanitize` runs it under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import native_build
import pytest
import sanitize

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="not run: no compiler"),
]


@pytest.fixture(scope="module")
def driver() -> Path:
    return sanitize.build_driver(native_build.find_compiler(), native_build.OBJECTS)


@pytest.mark.parametrize("name", list(native_build.instruction_sets()))
def test_any_team_gives_the_same_bits(driver: Path, name: str) -> None:
    """Teams of 1 to 5, two callers at once, twelve kinds of layer."""
    answer = subprocess.run([str(driver), name], capture_output=True, text=True, check=False)
    if answer.returncode == 77:
        pytest.skip(answer.stderr.strip())
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"{name}: ")
    assert answer.stdout.endswith(", 0 failed\n")


def test_an_unknown_instruction_set_is_not_run(driver: Path) -> None:
    answer = subprocess.run([str(driver), "mmx"], capture_output=True, text=True, check=False)
    assert answer.returncode == 77
    assert "mmx: not run" in answer.stderr
