"""The CUDA kernels, on an emulated device, against the float64 reference: results and all gradients, every tier.

The same cases and the same budget as for the CPU in ``test_parity.py``. Masks are compared in ``test_cuda_masks.py``,
what may be read and written in ``test_cuda_memory_safety.py``.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated_cuda import TIERS, emulated, lstm_layer, use
from helpers import REGULARIZERS
from test_parity import MATRIX, REPRESENTATIVE, acts_in_evaluation, case_of

from fusedreg.backends.common import DTYPES
from fusedreg.layer import REVERSE
from fusedreg.testing import (
    LayerCase,
    assert_within_budget,
    implementation,
    make_arguments,
    one_thread,
    run_layer,
)

pytestmark = emulated

SEEDS = 4
PERSISTENT = [tier for tier in TIERS if tier != "step"]


def check(tier: str, case: LayerCase, seeds: int = SEEDS, schedule: int = 1) -> None:
    with use(tier, schedule=schedule), one_thread():
        assert_within_budget(lstm_layer, case, seeds=seeds)


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.id)
def test_step_tier(case: LayerCase) -> None:
    check("step", case)


# Every regulariser once in each persistent tier, forward and back again in reverse, and the modes for a few of them.
# The emulator takes its time over barriers, so sequences are short and seeds two.
CROSS = [(name, mode) for name in REGULARIZERS for mode in ("reverse", "recompute")]
CROSS += [(name, mode) for name, mode in REPRESENTATIVE if mode not in ("reverse", "recompute")]


@pytest.mark.parametrize(("name", "mode"), CROSS)
def test_persistent_tiers(name: str, mode: str) -> None:
    if mode == "evaluation" and name != "none" and not acts_in_evaluation(REGULARIZERS[name]):
        return
    for tier in PERSISTENT:
        check(tier, case_of(name, mode, steps=4, resets=mode == "reverse"), seeds=2)


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVE)
def test_other_types_in_the_step_tier(name: str, mode: str, dtype: torch.dtype) -> None:
    check("step", case_of(name, mode, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *itertools.product(("none", "everything", "everything_untied"), ("plain", "recompute")),
        *itertools.product(("everything_batch_norm", "everything_layer_norm"), ("lengths", "reverse")),
    ],
)
@pytest.mark.parametrize("tier", PERSISTENT)
def test_16_bits_in_the_persistent_tiers(tier: str, name: str, mode: str, dtype: torch.dtype) -> None:
    check(tier, case_of(name, mode, dtype=dtype, steps=5))


# 16-bit masks by rate alone: a mask's scale, rounded with what it scales, would be the largest error of all.
@pytest.mark.parametrize("name", ["input", "input_untied", "hidden", "hidden_untied", "weight", "weight_row"])
def test_masked_factors_are_not_rounded(name: str) -> None:
    for tier in TIERS:
        check(tier, case_of(name, "lengths", dtype=torch.bfloat16))


# Around a block's units (8, 16), a chunk of K (16 values in float32, 32 in 16 bits), a tile of rows (16), odd sizes.
SHAPES = [
    # steps, rows, input_size, hidden_size
    (1, 1, 1, 1),
    (2, 3, 5, 8),
    (3, 1, 3, 9),
    (3, 17, 4, 11),
    (4, 5, 9, 37),
    (3, 20, 2, 16),
    (2, 16, 7, 33),
    (3, 4, 12, 100),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "T{}B{}I{}H{}".format(*shape))
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["none", "everything_untied"])
def test_shapes(tier: str, name: str, shape: tuple[int, int, int, int]) -> None:
    steps, rows, inputs, hidden = shape
    changes = {"steps": steps, "rows": rows, "input_size": inputs, "hidden_size": hidden}
    if name != "none":
        changes |= {"ragged": True, "resets": True, "direction": REVERSE}
    check(tier, case_of(name, **changes), seeds=2)


@pytest.mark.parametrize("shape", [(3, 9, 17, 8), (2, 17, 8, 33), (2, 20, 5, 40)], ids=str)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_norm_shapes(tier: str, name: str, shape: tuple[int, int, int, int]) -> None:
    steps, rows, inputs, hidden = shape
    case = case_of(name, steps=steps, rows=rows, input_size=inputs, hidden_size=hidden, resets=True)
    check(tier, case, seeds=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": False},
        {"initial_state": False},
        {"return_cells": False},
        {"bias": False, "initial_state": False, "return_cells": False, "recompute": True},
        {"num_layers": 1},
        {"layer": 3, "num_layers": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["none", "everything", "everything_layer_norm"])
def test_optional_arguments(name: str, changes: dict[str, object]) -> None:
    for tier in TIERS:
        check(tier, case_of(name, **{"steps": 3, **changes}), seeds=2)


@pytest.mark.parametrize("tier", PERSISTENT)
def test_float32_products_follow_torch(tier: str) -> None:
    """TF32 has 10 bits: its error is far from float32's, and from none at all. torch is asked at each call."""
    case = LayerCase("none", steps=4, hidden_size=24)
    given = make_arguments(case, 0)
    exact = run_layer(implementation("reference"), case, given.to(torch.float64))["output"]

    def error() -> float:
        with use(tier):
            result = lstm_layer(*given[:4], case.options)
        return float((result.output.double() - exact).norm() / exact.norm())

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        narrow = error()
        torch.set_float32_matmul_precision("highest")
        full = error()
    finally:
        torch.set_float32_matmul_precision(before)
    assert full < 1e-6 < 2e-5 < narrow < 1e-3


# ---- What must be equal, not close -------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["everything", "everything_untied_batch_norm", "everything_layer_norm"])
def test_results_do_not_depend_on_the_order_of_threads(tier: str, name: str) -> None:
    case = case_of(name, "reverse", steps=4, resets=True, hidden_size=21)
    arguments = make_arguments(case, 5)
    with use(tier, schedule=1):
        expected = run_layer(lstm_layer, case, arguments)
    for schedule in (2, 3):
        with use(tier, schedule=schedule):
            for key, value in run_layer(lstm_layer, case, arguments).items():
                assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", list(REGULARIZERS))
def test_inference_equals_training_forward(name: str) -> None:
    """Nothing is saved under no_grad; what comes out must not depend on that."""
    for tier, mode in (("step", "lengths"), ("step", "evaluation"), ("grid", "resets")):
        case = case_of(name, mode, steps=4)
        arguments = make_arguments(case, 4)
        with use(tier):
            with_graph = run_layer(lstm_layer, case, arguments)
            with torch.no_grad():
                without = run_layer(lstm_layer, case, arguments, backward=False)
        for key, value in without.items():
            assert torch.equal(value, with_graph[key]), f"{tier}, {mode}: {key}"
