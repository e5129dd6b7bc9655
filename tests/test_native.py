"""The kernels and their teams without torch: C++ drivers with threads of their own, as `make sanitize` has too."""

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
def drivers() -> tuple[Path, Path]:
    return sanitize.build_drivers(native_build.find_compiler(), native_build.OBJECTS)


@pytest.mark.parametrize("name", list(native_build.instruction_sets()))
def test_any_team_gives_the_same_bits(drivers: tuple[Path, Path], name: str) -> None:
    """Teams of 1 to 5, two callers at once, fourteen kinds of layer."""
    answer = subprocess.run([drivers[0], name], capture_output=True, text=True, check=False)
    if answer.returncode == 77:
        pytest.skip(answer.stderr.strip())
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"{name}: ")
    assert answer.stdout.endswith(", 0 failed\n")


def test_an_unknown_instruction_set_is_not_run(drivers: tuple[Path, Path]) -> None:
    answer = subprocess.run([drivers[0], "mmx"], capture_output=True, text=True, check=False)
    assert answer.returncode == 77
    assert "mmx: not run" in answer.stderr


def test_teams_are_those_who_came(drivers: tuple[Path, Path]) -> None:
    """Fewer pieces than asked, larger ones, late ones, one alone, one that throws."""
    answer = subprocess.run([drivers[1]], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith(", 0 failed\n")
