"""Every tier of the CUDA kernels and Triton against the float64 reference, within the error budget."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from gpu_targets import DEVICE, STAND_IN, Target
from test_parity import MATRIX, MODES, REPRESENTATIVE, SHAPES, case_of

import fusedreg
from fusedreg.layer import REVERSE
from fusedreg.regularization import BatchNorm
from fusedreg.testing import LayerCase, assert_within_budget, make_arguments, relative_error, run_layer
from fusedreg.testing.budget import implementation


def check(target: Target, case: LayerCase, seeds: int = 8) -> None:
    if target.backend == "triton" and case.dtype == torch.float64:
        pytest.skip("not run: Triton's kernels have no float64")
    with target.forced():
        assert_within_budget(target.layer, case, seeds=seeds)


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.id)
def test_float32(target: Target, case: LayerCase) -> None:
    check(target, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVE)
def test_other_types(target: Target, name: str, mode: str, dtype: torch.dtype) -> None:
    check(target, case_of(name, mode, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVE)
def test_probes(target: Target, name: str, mode: str, dtype: torch.dtype) -> None:
    check(target, case_of(name, mode, dtype=dtype, probes=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVE)
def test_projections(target: Target, name: str, mode: str, dtype: torch.dtype) -> None:
    """Which have no persistent kernel: those tiers say so, and are skipped with what they say."""
    check(target, case_of(name, mode, dtype=dtype, rows=9, hidden_size=37, proj_size=19, probes=True))


@pytest.mark.parametrize("name", ["everything", "everything_untied", "everything_layer_norm"])
def test_groups_of_rows_draw_masks_of_their_own(target: Target, name: str) -> None:
    """Seeds and first steps by group, as the reference draws them; weights are the first group's."""
    case = case_of(name, "reverse", rows=12, hidden_size=40, resets=True)
    arguments = make_arguments(case, 2)._replace(seed=torch.tensor([[5, 0], [-(2**60) + 1, 3], [2**33, 11]]))
    exact = run_layer(implementation("reference"), case, arguments.to(torch.float64))
    with target.forced():
        values = run_layer(target.layer, case, arguments)
    for key, value in exact.items():
        assert torch.equal(values[key] == 0, value == 0), key
        assert relative_error([(values[key].double(), value)]) < 2e-5, key


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "T{}B{}I{}H{}".format(*shape))
@pytest.mark.parametrize("name", ["none", "everything", "everything_untied"])
def test_shapes(target: Target, name: str, shape: tuple[int, int, int, int]) -> None:
    steps, rows, inputs, hidden = shape
    changes = {"steps": steps, "rows": rows, "input_size": inputs, "hidden_size": hidden}
    if name != "none":
        changes |= {"ragged": True, "resets": True}
    if name == "everything_untied":
        changes |= {"direction": REVERSE}
    check(target, case_of(name, **changes))


# Around what the tiers are cut up by: 8, 16 and 32 units a block, 16 rows a tile, clusters' and grids' capacities.
WIDE = [
    # steps, rows, hidden_size
    (4, 16, 64),
    (4, 17, 100),
    (3, 15, 128),
    (4, 33, 256),
    (3, 8, 264),
    (3, 64, 384),
    (3, 16, 512),
    (3, 100, 520),
    (3, 16, 768),
    (3, 2, 1000),
    (3, 64, 1024),
    (3, 130, 1024),
    (3, 20, 1500),
    (2, 16, 2048),
    (2, 300, 256),
    (2, 1, 3000),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["none", "everything", "everything_untied"])
@pytest.mark.parametrize("shape", WIDE, ids=lambda shape: "T{}B{}H{}".format(*shape))
def test_wide(target: Target, shape: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
    """At widths where the reference draws the masks of millions of weights, the weight mask is left out."""
    steps, rows, hidden = shape
    case = case_of(name, steps=steps, rows=rows, input_size=24, hidden_size=hidden, dtype=dtype)
    if hidden > 300:
        case = replace(case, regularization=replace(case.regularization, weight_dropout=0.0))
    if name != "none":
        case = replace(case, ragged=True, resets=True)
    check(target, case, seeds=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "everything_batch_norm", "everything_tied_layer_norm"])
@pytest.mark.parametrize("shape", [(4, 16, 128), (3, 33, 256), (3, 64, 520), (3, 16, 1024)], ids=str)
def test_wide_norms(target: Target, shape: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
    steps, rows, hidden = shape
    case = case_of(name, steps=steps, rows=rows, input_size=24, hidden_size=hidden, dtype=dtype)
    regularization = replace(case.regularization, weight_dropout=0.0)
    check(target, replace(case, regularization=regularization, ragged=True), seeds=2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["none", "everything_batch_norm", "everything_layer_norm"])
def test_everything_at_once(target: Target, name: str, recompute: bool) -> None:
    check(target, case_of(name, "reverse", resets=True, recompute=recompute, steps=11))


@pytest.mark.parametrize("name", ["none", "everything_tied_layer_norm"])
def test_long_sequences(target: Target, name: str) -> None:
    """Hundreds of steps: an exchange that is read too early shows up late."""
    check(target, case_of(name, steps=300, rows=4, hidden_size=72, dtype=torch.bfloat16), seeds=2)


@pytest.mark.device
@pytest.mark.parametrize("tier", ["cluster", "grid", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_every_tier_runs_what_it_is_there_for(tier: str, dtype: torch.dtype) -> None:
    """So that the skips above cannot hide a tier that never runs."""
    reason = Target("", "cuda").unavailable()
    if reason is not None:
        pytest.skip(f"not run: {reason}")
    if tier == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("not run: clusters need compute capability 9.0")
    module = fusedreg.LSTM(64, 128, zoneout_cell=0.2, backend="cuda", device=DEVICE, dtype=dtype)
    assert torch.ops.fusedreg._set_cuda_tier(tier)
    try:
        output, _ = module(torch.randn(5, 16, 64, device=DEVICE, dtype=dtype))
        output.sum().backward()
    finally:
        torch.ops.fusedreg._set_cuda_tier("auto")
    assert output.isfinite().all()


@pytest.mark.device
def test_tf32_is_taken_where_torch_allows_it_and_only_there(target: Target) -> None:
    case = case_of("none", steps=6, rows=32, input_size=128, hidden_size=256)
    arguments = make_arguments(case, 0)
    exact = run_layer(implementation("reference"), case, arguments.to(torch.float64))["output"]

    def error() -> float:
        output = target.layer(*arguments[:4], case.options, lengths=None, reset=None, seed=None, running=None).output
        return relative_error([(output.detach(), exact)])

    before = torch.get_float32_matmul_precision()
    with target.forced():
        try:
            torch.set_float32_matmul_precision("highest")
            true = error()
            torch.set_float32_matmul_precision("high")
            allowed = error()
        finally:
            torch.set_float32_matmul_precision(before)
    assert true < 2e-6
    assert 2e-6 < allowed < 1e-3


@pytest.mark.parametrize("name", ["everything", "everything_untied", "everything_batch_norm", "layer_norm"])
def test_repeated_runs_are_bitwise_equal(target: Target, name: str) -> None:
    case = case_of(name, "lengths", rows=20, hidden_size=72, steps=9)
    arguments = make_arguments(case, 1)
    with target.forced():
        first = run_layer(target.layer, case, arguments)
        for _ in range(1 if STAND_IN else 10):
            again = run_layer(target.layer, case, arguments)
            for key, value in first.items():
                assert torch.equal(value, again[key]), key


@pytest.mark.parametrize(("name", "mode"), list(itertools.product(["everything", "batch_norm"], MODES)))
def test_inference_equals_training_forward(target: Target, name: str, mode: str) -> None:
    """Nothing is saved under no_grad; what comes out must not depend on that."""
    case = case_of(name, mode)
    arguments = make_arguments(case, 4)
    with target.forced():
        with_graph = run_layer(target.layer, case, arguments)
        with torch.no_grad():
            without = run_layer(target.layer, case, arguments, backward=False)
    for key, value in without.items():
        assert torch.equal(value, with_graph[key]), key


def test_batch_norm_needs_no_more_than_its_own_rows(target: Target) -> None:
    """A batch wider than a tile: its statistics are still over all rows."""
    case = replace(case_of("batch_norm", steps=3, hidden_size=40), rows=150)
    assert isinstance(case.regularization.norm, BatchNorm)
    check(target, case, seeds=2)
