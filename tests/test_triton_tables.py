"""Which kernels the tables give a call, and that docs/triton_kernels.csv has all of them: nothing is compiled here."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import triton_compile
import triton_support  # noqa: F401  # before the kernels
from test_triton_backward import case_of
from triton_cases import MANY

from fusedreg.backends.triton import configurations
from fusedreg.backends.triton.backward_configuration import backward_configuration
from fusedreg.backends.triton.layout import Layer, make_layer
from fusedreg.encoding import SAVE_GATES, encode_options
from fusedreg.testing import make_arguments

DEVICES = {"80": configurations.Device(108, 163 * 1024), "90": configurations.Device(132, 227 * 1024)}
TYPES = ((torch.bfloat16, "highest"), (torch.float32, "highest"), (torch.float32, "high"))
NORMS = ("everything", "everything_batch_norm", "everything_layer_norm")
HIDDEN = (1, 8, 16, 17, 32, 33, 64, 100, 136, 200, 256, 300, 384, 512, 650, 768, 1000, 1024, 1064, 1150, 1280, 1500)
HIDDEN += (2048, 2500, 3000, 4096, 4224, 5000, 8192)
ROWS = (1, 16, 17, 32, 33, 64, 100, 128, 256, 512, 1024)


@pytest.fixture(autouse=True)
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def plain(name: str, dtype: torch.dtype) -> Layer:
    """A small layer, whose sizes are then changed."""
    case = case_of(name, dtype=dtype)
    given = [None if value is None else value.to("meta") for value in make_arguments(case, 0).tensors()]
    return make_layer((*given, *encode_options(case.options, SAVE_GATES)))


def resized(layer: Layer, hidden_size: int, rows: int, projected_size: int) -> Layer:
    sizes = {"hidden_size": hidden_size, "projected_size": projected_size or hidden_size}
    flags = layer.flags._replace(projected=int(projected_size > 0), **sizes)
    return layer._replace(flags=flags, sizes=layer.sizes._replace(rows=rows))


def tiles(layer: Layer, persistent: bool | None) -> set[tuple[Any, ...]]:
    """What forward and backward get: which kernel, its rows and units, whether weights are held, how columns are split,
    and how products are made.
    """
    return {
        (end, block.persistent, block.rows, block.units, block.resident, block.split, block.precision)
        for end, block in (
            ("forward", configurations.forward_configuration(layer, persistent=persistent).block),
            ("backward", backward_configuration(layer, activated=True, persistent=persistent).block),
        )
    }


def compiled(cases: Iterable[str]) -> set[tuple[Any, ...]]:
    """What the cases of triton_cases.py are compiled with."""
    found = set()
    for case in cases:
        name, dtype, hidden_size, rows, kind, precision = case.split(":")
        name, *features = name.split("+")
        torch.set_float32_matmul_precision(precision)
        projected = int(hidden_size) // 4 if "proj" in features else 0
        layer = resized(plain(name, getattr(torch, dtype)), int(hidden_size), int(rows), projected)
        found |= tiles(layer, kind == "persistent")
    return found


@pytest.mark.parametrize("target", DEVICES)
def test_every_tile_that_a_call_may_get_is_compiled(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "device_limits", lambda device: DEVICES[target])
    with triton_compile.TABLE.open(newline="") as file:
        cases = {row["case"] for row in csv.DictReader(file) if row["target"] == target}
    assert cases == set(MANY)
    known = compiled(cases)
    for name, (dtype, precision) in itertools.product(NORMS, TYPES):
        torch.set_float32_matmul_precision(precision)
        for masks in (name, name.replace("everything", "everything_untied")):
            small = plain(name, dtype)
            small = small._replace(flags=small.flags._replace(hidden_dropout=2 if "untied" in masks else 1))
            for hidden_size, rows, projected in itertools.product(HIDDEN, ROWS, (False, True)):
                layer = resized(small, hidden_size, rows, max(1, hidden_size // 4) if projected else 0)
                assert tiles(layer, None) <= known, (masks, dtype, precision, hidden_size, rows, projected)


@pytest.mark.parametrize(("precision", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_products_follow_torchs_setting(precision: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "device_limits", lambda device: DEVICES["90"])
    torch.set_float32_matmul_precision(precision)
    layer = plain("everything", torch.float32)
    assert configurations.forward_configuration(layer).block.precision == expected
    assert backward_configuration(layer, activated=True).block.precision == expected
    for dtype in (torch.bfloat16, torch.float16):
        assert configurations.forward_configuration(plain("everything", dtype)).block.precision == "ieee"
