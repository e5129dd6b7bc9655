"""Every Triton kernel compiled to machine code without a GPU, by the calls that launch it.

``-s`` shows a table of registers, spilled bytes, shared memory and seconds. On one core of a server processor the
whole takes a minute and a half.
"""

from __future__ import annotations

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

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="not run: Triton's launchers need a C compiler, cc"),
]

CASES = {
    90: (
        "everything:bfloat16:256:16:persistent:highest",
        "everything_untied:float32:40:10:step:high",
        "everything_tied_layer_norm:float32:48:12:persistent:highest",
    ),
    80: (
        "everything_batch_norm:float16:64:12:persistent:highest",
        "batch_norm:bfloat16:64:12:step:highest",
        "layer_norm:float16:64:12:step:highest",
    ),
}
_FOLDER = Path(__file__).resolve().parent


@functools.cache
def compiled(capability: int) -> Sequence[dict[str, Any]]:
    """The lines that the process prints: one a kernel, the last with the number of launches."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(_FOLDER.parent), str(_FOLDER)])
    command = [sys.executable, str(_FOLDER / "triton_pretended.py"), str(capability), *CASES[capability]]
    process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def kernels(capability: int) -> list[dict[str, Any]]:
    return [line for line in compiled(capability) if "name" in line]


@pytest.mark.parametrize("capability", CASES)
def test_compiles_and_launches(capability: int) -> None:
    for one in kernels(capability):
        print(
            f"sm_{capability} {one['case']:55} {one['name']:24} {one['registers']:3} registers "
            f"{one['spilled_bytes']:4} spilled {one['shared_bytes']:6} shared {one['seconds']:5.1f} s"
        )
    assert {one["case"] for one in kernels(capability)} == set(CASES[capability])
    assert compiled(capability)[-1]["launches"] > 20


@pytest.mark.parametrize("capability", CASES)
def test_resources(capability: int) -> None:
    limits = {80: 163 * 1024, 90: 227 * 1024}
    for one in kernels(capability):
        assert one["spilled_bytes"] <= 64, one
        assert one["shared_bytes"] <= limits[capability], one
        assert one["cooperative"] == ("persistent" in one["name"]), one


@pytest.mark.parametrize("capability", CASES)
def test_other_sizes_rates_and_layers_compile_nothing(capability: int) -> None:
    assert not [one for one in kernels(capability) if one["again"]]


def test_every_kernel_is_among_them() -> None:
    import triton

    package = importlib.import_module("fusedreg.backends.triton")
    written = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and isinstance(value, triton.runtime.KernelInterface):
                written.add((value.fn.__module__, name))
    assert written == {(one["module"], one["name"]) for capability in CASES for one in kernels(capability)}
