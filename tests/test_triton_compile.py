"""Triton's kernels compiled to machine code without a GPU, by the calls that launch them: every kernel, a few layers.

``-s`` shows registers, spilled bytes, shared memory and seconds. ``make kernels`` does the same for every
configuration of the tables, and writes docs/triton_kernels.csv.
"""

from __future__ import annotations

import csv
import functools
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import triton_compile
from triton_cases import FEW, MANY

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="not run: Triton's launchers need a C compiler, cc"),
]

TARGETS = ("80", "90", "gfx942")
# Of one call, forward and backward, in seconds of one core: what docs/triton.md states.
FIRST_CALL = 30.0
_FOLDER = Path(__file__).resolve().parent


@functools.cache
def compiled(target: str) -> Sequence[dict[str, Any]]:
    """The lines that the process prints: one a kernel, the last with the number of launches."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(_FOLDER.parent), str(_FOLDER)])
    command = [sys.executable, str(_FOLDER / "triton_pretended.py"), target, *FEW]
    process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def kernels(target: str) -> list[dict[str, Any]]:
    return [line for line in compiled(target) if "name" in line]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_launches(target: str) -> None:
    for one in kernels(target):
        print(
            f"{target:6} {one['case']:55} {one['name']:24} {one['registers']:3} registers "
            f"{one['spilled_bytes']:4} spilled {one['shared_bytes']:6} shared {one['seconds']:5.1f} s"
        )
    assert {one["case"] for one in kernels(target)} == set(FEW)
    assert compiled(target)[-1]["launches"] > 20


@pytest.mark.parametrize("target", TARGETS)
def test_resources(target: str) -> None:
    for one in kernels(target):
        assert one["spilled_bytes"] <= 64, one
        assert one["shared_bytes"] <= triton_compile.SHARED_BYTES[target], one
        assert one["cooperative"] == ("persistent" in one["name"]), one
        assert one["fused"], one


@pytest.mark.parametrize("target", TARGETS)
def test_programs_that_wait_for_each_other_see_what_was_written(target: str) -> None:
    assert not [(one["name"], fault) for one in kernels(target) for fault in one["unordered"]]


def test_a_missing_order_is_found() -> None:
    from triton_pretended import unordered

    lines = ["st.global.b32", "bar.sync 0;", "atom.global.gpu.release.add.u32"]
    lines += ["ld.global.gpu.acquire.b32", "bar.sync 0;", "ld.global.b32"]
    assert not unordered("\n".join(lines))
    for barrier in (1, 4):
        assert unordered("\n".join(lines[:barrier] + lines[barrier + 1 :]))
    for word, other in ((".gpu.release", ""), (".gpu.acquire", ""), ("ld.global.b32", "ld.global.nc.b32")):
        assert unordered("\n".join(lines).replace(word, other))


@pytest.mark.parametrize("target", TARGETS)
def test_other_sizes_rates_layers_and_addresses_compile_nothing(target: str) -> None:
    assert not [one for one in kernels(target) if one["again"]]


@pytest.mark.parametrize("target", TARGETS)
def test_a_first_call_takes_no_longer_than_stated(target: str) -> None:
    for case in FEW:
        assert sum(one["seconds"] for one in kernels(target) if one["case"] == case) < FIRST_CALL


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_among_them(target: str) -> None:
    import triton

    package = importlib.import_module("fusedreg.backends.triton")
    written = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and isinstance(value, triton.runtime.KernelInterface):
                written.add((value.fn.__module__, name))
    assert written == {(one["module"], one["name"]) for one in kernels(target)}


def test_the_table_of_the_many_is_of_these_kernels() -> None:
    """docs/triton_kernels.csv is made by hand, in twenty minutes: here it is read."""
    with triton_compile.TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} <= set(MANY)
    kinds = {(f"fusedreg.backends.triton.{row['module']}", row["name"]) for row in rows}
    assert kinds == {(one["module"], one["name"]) for one in kernels("90")}
    for row in rows:
        assert int(row["shared_bytes"]) <= triton_compile.SHARED_BYTES[row["target"]]
