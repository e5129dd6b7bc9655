"""The CUDA emulator itself: right kernels are right in every order, and what a wrong one lacks is noticed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import cuda_build
import native_build
import pytest

pytestmark = pytest.mark.build

SEEDS = 12


@pytest.fixture(scope="session")
def driver() -> Path:
    """tests/native/emulator_driver.cpp, compiled: small kernels, each run under a number of schedules."""
    try:
        compiler = native_build.find_compiler()
    except native_build.BuildError as error:
        pytest.skip(f"not run: {error}")
    units = [native_build.Unit(native_build.ROOT / "tests" / "native" / "emulator_driver.cpp", "emulator_driver")]
    units += [unit for unit in cuda_build.emulation_units() if unit.object_name.startswith("emulation_")]
    flags = (*cuda_build.emulation_flags(), f"-I{native_build.ROOT / 'csrc'}")
    program = native_build.ROOT / "build" / "cuda_emulator_tests" / "emulator_driver"
    objects = native_build.compile_units(units, flags, compiler, program.parent)
    native_build.link(objects, ("-pthread",), compiler, program)
    return program


def outcomes(driver: Path, case: str, seeds: int = SEEDS) -> list[str]:
    command = [str(driver), case, str(seeds)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    lines = answer.stdout.splitlines()
    assert len(lines) == seeds
    return lines


@pytest.mark.parametrize(
    "case",
    ["barriers", "warp", "fetches", "shuffles", "exchange", "cluster", "mma_bfloat16", "mma_float16", "mma_float32"],
)
def test_right_in_every_order(driver: Path, case: str) -> None:
    assert outcomes(driver, case) == ["right"] * SEEDS


@pytest.mark.parametrize(
    "case",
    [
        "no_barrier_before",
        "no_barrier_after",
        "no_sync_warp",
        "no_wait_for_fetched",
        "no_release",
        "no_acquire",
        "no_barrier_of_writers",
        "no_hand_over",
        "no_cluster_barrier",
    ],
)
def test_what_is_missing_is_noticed(driver: Path, case: str) -> None:
    """A barrier between threads, the order of stores between blocks, the handing over of what was seen."""
    assert outcomes(driver, case).count("wrong") >= SEEDS // 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one_stays_away", r"deadlock: .*block \d: 63 threads at sync_block \(\S+:\d+\), 1 thread returned"),
        ("unbounded_wait", r"deadlock: .*block 0: 64 threads at load_acquire \(\S+:\d+\)"),
        ("bounded_wait", r"5 seconds passed: block, step 3 1 \(block \d, thread \d+\)"),
        ("leaves_early", r"shared memory of block 1, of which threads have returned"),
        ("arrives_twice", r"arrives at the cluster's barrier twice, line \d+"),
        ("diverging_warp", r"lanes of a warp meet at different operations: shuffle\w* at line \d+, shuffle\w* at"),
        ("writes_outside", r"block \d wrote outside its 4096 bytes of shared memory"),
        ("too_large", r"a cooperative grid of 200 blocks cannot be resident as a whole on 132 multiprocessors"),
    ],
)
def test_what_cannot_go_on_says_why(driver: Path, case: str, message: str) -> None:
    for line in outcomes(driver, case, 4):
        assert re.match(rf"CUDA emulation: \w+(<.*>)?: .*{message}", line), line


def test_a_seed_makes_one_schedule(driver: Path) -> None:
    orders = outcomes(driver, "order")
    assert orders == outcomes(driver, "order")
    assert len(set(orders)) == SEEDS
    for order in orders:
        assert sorted(map(int, order.split())) == list(range(1, 257))
