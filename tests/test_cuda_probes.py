"""The gradients of probes by the CUDA kernels, on the emulated device: every tier, within the budget, 0 in padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_cuda import TIERS, emulated, lstm_layer, use
from helpers import REGULARIZERS
from test_parity import case_of

from fusedreg.layer import REVERSE
from fusedreg.testing import assert_within_budget, make_arguments, one_thread, run_layer

pytestmark = emulated

REPRESENTATIVE = ("none", "everything", "everything_untied", "everything_batch_norm", "everything_layer_norm")


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regulariser_in_the_step_tier(name: str) -> None:
    with use("step"), one_thread():
        assert_within_budget(lstm_layer, case_of(name, "lengths", steps=4, probes=True, resets=True), seeds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", [*REPRESENTATIVE, "zoneout_candidate", "batch_norm_cell", "layer_norm_cell"])
def test_tiers_and_types(tier: str, name: str, dtype: torch.dtype) -> None:
    with use(tier), one_thread():
        assert_within_budget(lstm_layer, case_of(name, "reverse", steps=4, probes=True, dtype=dtype), seeds=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_with_a_projection(name: str, dtype: torch.dtype) -> None:
    with use("step"), one_thread():
        case = case_of(name, "recompute", steps=4, probes=True, dtype=dtype, proj_size=5, direction=REVERSE)
        assert_within_budget(lstm_layer, case, seeds=2)


@pytest.mark.parametrize("tier", TIERS)
def test_in_evaluation_and_in_padding(tier: str) -> None:
    case = case_of("everything_layer_norm", "lengths", steps=5, probes=True, training=False)
    arguments = make_arguments(case, 2)
    with use(tier), one_thread():
        assert_within_budget(lstm_layer, case, seeds=2)
        values = run_layer(lstm_layer, case, arguments)
    assert arguments.lengths is not None
    padding = torch.arange(case.steps)[:, None] >= arguments.lengths[None, :]
    for name in ("grad hidden_probe", "grad cell_probe"):
        assert (values[name][padding] == 0).all() and (values[name][~padding] != 0).any()


@pytest.mark.parametrize("tier", TIERS)
def test_nothing_else_changes(tier: str) -> None:
    case = case_of("everything", "reverse", steps=4, resets=True)
    probed = replace(case, probes=True)
    with use(tier):
        expected = run_layer(lstm_layer, case, make_arguments(case, 3))
        values = run_layer(lstm_layer, probed, make_arguments(probed, 3))
    assert values.keys() - expected.keys() == {"grad hidden_probe", "grad cell_probe"}
    for name, value in expected.items():
        assert torch.equal(values[name], value), name
