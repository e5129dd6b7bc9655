"""The choice of a tier: asked on any machine, checked for what a launch would need and for the reasons it gives."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from emulated_cuda import DEVICE, emulated, lstm_layer, use
from helpers import compiled

from fusedreg import BatchNorm, LayerNorm, Regularization
from fusedreg.backends import cuda
from fusedreg.backends.cuda import DeviceLimits
from fusedreg.testing import assert_within_budget, one_thread
from fusedreg.testing.cases import LayerCase
from fusedreg.testing.cases import make_arguments as arguments_of

H200 = DeviceLimits(132, 227 * 1024, 9, 0)
A100 = DeviceLimits(108, 163 * 1024, 8, 0)
LAPTOP = DeviceLimits(20, 99 * 1024, 8, 9)
PERSISTENT = re.compile(
    r"(?P<tier>cluster|grid): (?P<blocks>\d+) blocks of (?P<units>\d+) units, "
    r"(?:all (?P<all>\d+) rows|(?P<tiles>\d+) tiles of (?P<rows>\d+) rows), "
    r"(?P<shared>\d+) KB of shared memory a block; "
    r"[\d.]+ us a step by arithmetic"
)


def reasons(
    limits: DeviceLimits,
    dtype: torch.dtype,
    rows: int,
    hidden_size: int,
    regularization: Regularization | None = None,
    proj_size: int = 0,
) -> list[str]:
    """Why the forward and the backward get their tiers."""
    text = cuda.plan(
        limits,
        dtype,
        steps=50,
        batch_size=rows,
        input_size=8,
        hidden_size=hidden_size,
        regularization=regularization or Regularization(),
        proj_size=proj_size,
    )
    forward, backward = text.splitlines()
    return [forward.removeprefix("forward: "), backward.removeprefix("backward: ")]


@compiled
@pytest.mark.parametrize("seed", range(4))
def test_what_is_chosen_fits_the_device(seed: int) -> None:
    """All units and rows have a block, every block a multiprocessor, and none more shared memory than there is."""
    generator = random.Random(seed)
    norms = (None, None, BatchNorm(statistics="shared"), LayerNorm())
    for _ in range(60):
        limits = generator.choice([H200, A100, LAPTOP])
        rows, hidden_size = generator.choice([1, 2, 15, 16, 17, 64, 100, 300]), generator.randint(1, 2500)
        regularization = Regularization(
            hidden_dropout=generator.choice([0.0, 0.2]),
            gate_masks=generator.choice(["tied", "untied"]),
            norm=generator.choice(norms),
        )
        dtype = generator.choice([torch.bfloat16, torch.float16, torch.float32])
        for reason in reasons(limits, dtype, rows, hidden_size, regularization):
            found = PERSISTENT.match(reason)
            if found is None:
                assert re.match(r"step: no cluster, since .+; no grid, since .+", reason), reason
                continue
            blocks, units = int(found["blocks"]), int(found["units"])
            tiles = int(found["tiles"] or 1)
            assert (blocks - 1) * units < hidden_size <= blocks * units
            assert int(found["shared"]) * 1024 <= limits.shared_bytes_per_block + 1023
            if found["all"]:
                assert int(found["all"]) == rows
            else:
                assert (tiles - 1) * int(found["rows"]) < rows <= tiles * int(found["rows"])
            if found["tier"] == "grid":
                assert blocks * tiles <= limits.multiprocessors
            else:
                assert blocks <= 8 and limits.major >= 9
            if isinstance(regularization.norm, BatchNorm):
                assert tiles == 1, "a column's statistics are its block's own"


@compiled
@pytest.mark.parametrize(
    ("limits", "dtype", "rows", "hidden_size", "start", "part"),
    [
        (H200, torch.bfloat16, 16, 256, "cluster: 8 blocks of 32 units", "(grid: "),
        (H200, torch.bfloat16, 16, 768, "grid: ", "a cluster has at most 16"),
        (
            H200,
            torch.bfloat16,
            16,
            512,
            "grid: ",
            "needs a cluster of 16 blocks, and the device is not known to hold one",
        ),
        (A100, torch.float16, 16, 256, "grid: ", "clusters need compute capability 9.0, and the device has 8.0"),
        (H200, torch.bfloat16, 16, 5000, "step: ", "units, and there are 132 multiprocessors"),
        (LAPTOP, torch.bfloat16, 64, 300, "grid: ", "clusters need compute capability 9.0"),
        (H200, torch.bfloat16, 4000, 2048, "step: ", "do not fit the 227 KB of shared memory of a block"),
        (H200, torch.float64, 4, 16, "step: ", "float64 has no kernel but that of this tier"),
    ],
)
def test_the_reason_says_why(
    limits: DeviceLimits, dtype: torch.dtype, rows: int, hidden_size: int, start: str, part: str
) -> None:
    for reason in reasons(limits, dtype, rows, hidden_size):
        assert reason.startswith(start) and part in reason, reason


@compiled
def test_a_projection_is_the_step_tiers() -> None:
    for reason in reasons(H200, torch.bfloat16, 16, 256, proj_size=64):
        assert reason == "step: a projection (H = 256 to P = 64) has no kernel but that of this tier"


@emulated
@pytest.mark.parametrize(
    ("name", "dtype", "precision", "largest"),
    [
        ("bfloat16, float16", torch.bfloat16, "highest", 512),
        ("TF32", torch.float32, "high", 448),
        ("float32", torch.float32, "highest", 384),
    ],
)
def test_the_largest_layers_of_a_cluster(name: str, dtype: torch.dtype, precision: str, largest: int) -> None:
    """As docs/cuda.md has them: that one runs, forward and backward, and the next one does not."""
    assert f"| {name} | 256 | {largest} |\n" in (Path(__file__).parents[1] / "docs" / "cuda.md").read_text()
    assert all("cluster: " in reason for reason in reasons(H200, dtype, 4, 256))

    def run(hidden_size: int) -> None:
        case = LayerCase("large", 1, 4, 1, hidden_size, dtype=dtype, return_cells=False)
        given = arguments_of(case, 0)
        given.parameters.weight_hh.requires_grad_()
        lstm_layer(*given[:4], case.options).output.float().sum().backward()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with use("cluster", H200):
            run(largest)
            with pytest.raises(RuntimeError, match='"cluster" was asked for and cannot run'):
                run(largest + 8)
    finally:
        torch.set_float32_matmul_precision(before)


SLICE = DeviceLimits(4, 227 * 1024, 9, 0)  # of a device that has clusters


@compiled
def test_a_slice_of_a_device_has_fewer_clusters() -> None:
    """Where no cluster of a layer's blocks is resident, another tier is taken."""
    for reason in reasons(SLICE, torch.bfloat16, 2, 128):
        assert reason.startswith("cluster: 4 blocks of 32 units"), reason
    for reason in reasons(SLICE, torch.bfloat16, 2, 160):
        assert reason.startswith("step: no cluster, since H = 160 needs a cluster of 5 blocks"), reason


@emulated
@pytest.mark.parametrize("hidden_size", [40, 128, 160])
def test_a_slice_of_a_device_runs_what_is_chosen_for_it(hidden_size: int) -> None:
    """The emulated device holds as many clusters as it has multiprocessors for, and refuses others at launch."""
    case = LayerCase("slice", steps=2, rows=2, hidden_size=hidden_size)
    with use("auto", SLICE), one_thread():
        assert_within_budget(lstm_layer, case, seeds=1)
    if hidden_size > 128:
        given = arguments_of(case, 0)
        with use("cluster", SLICE), pytest.raises(RuntimeError, match="cluster of 5 blocks, and the device holds none"):
            lstm_layer(*given[:4], case.options)


@compiled
def test_rows_are_shared_out_where_multiprocessors_are_left() -> None:
    """Small layers with many rows: several groups of blocks, each with a tile; batch norm keeps them together."""
    for reason in reasons(A100, torch.bfloat16, 256, 128):
        assert re.match(r"grid: \d+ blocks of \d+ units, \d+ tiles of \d+ rows", reason), reason
    normalised = Regularization(norm=BatchNorm(statistics="shared"))
    for reason in reasons(H200, torch.bfloat16, 64, 128, normalised):
        assert "all 64 rows" in reason


@emulated
@pytest.mark.parametrize(
    ("tier", "device", "dtype", "hidden_size", "message"),
    [
        ("cluster", (132, 227 * 1024, 8, 0), torch.float32, 8, "clusters need compute capability 9.0"),
        ("cluster", DEVICE, torch.float32, 600, "needs 19 blocks of 32 units, and a cluster has at most 16"),
        ("grid", (3, 227 * 1024, 9, 0), torch.float32, 64, "needs 4 blocks of 16 units, and there are 3 multiproc"),
        ("grid", (16, 20 * 1024, 9, 0), torch.float32, 16, "do not fit the 20 KB of shared memory of a block"),
        ("grid", DEVICE, torch.float64, 8, "float64 has no kernel but that of the step tier"),
        ("cluster", (16, 227 * 1024, 9, 0), torch.bfloat16, 520, "needs 17 blocks of 32 units, and a cluster has at"),
    ],
)
def test_a_tier_that_is_asked_for_runs_or_says_why_not(
    tier: str, device: tuple[int, int, int, int], dtype: torch.dtype, hidden_size: int, message: str
) -> None:
    case = LayerCase("refused", steps=2, rows=3, hidden_size=hidden_size, dtype=dtype)
    given = arguments_of(case, 0)
    with use(tier, device), pytest.raises(RuntimeError, match=f'tier: "{tier}" was asked for and cannot run') as caught:
        lstm_layer(
            given.input, given.initial_hidden, given.initial_cell, given.parameters, case.options, seed=given.seed
        )
    assert message in str(caught.value) and 'use "auto" or "step"' in str(caught.value)
