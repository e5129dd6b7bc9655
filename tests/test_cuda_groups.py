"""Groups of rows inside one call of the CUDA kernels: the tests of ``test_groups.py`` on the emulated device.

The step tier in float64, as the CPU; the persistent tiers, which differ in who draws the masks, in float32.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_groups as groups
import torch
from emulated_cuda import TIERS, emulated, use
from helpers import REGULARIZERS

from fusedreg.testing import LayerCase

pytestmark = emulated

REPRESENTATIVE = ("none", "everything", "everything_untied", "everything_layer_norm")


@pytest.fixture(autouse=True)
def emulated_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "FORWARD", torch.ops.fusedreg_emulated.lstm_layer_forward)
    monkeypatch.setattr(groups, "BACKWARD", torch.ops.fusedreg_emulated.lstm_layer_backward)


def check(tier: str, case: LayerCase) -> None:
    with use(tier):
        groups.check(case)


@pytest.mark.parametrize("name", groups.PER_SAMPLE)
def test_a_group_is_a_call_of_its_own(name: str) -> None:
    for ragged in (False, True):
        case = groups.make_case(name, dtype=torch.float64, ragged=ragged, resets=ragged, direction=int(ragged))
        check("step", case)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_tiers_and_types(tier: str, name: str) -> None:
    case = groups.make_case(name, steps=3, ragged=True, direction=1)
    check(tier, replace(case, dtype=torch.float32))
    check(tier, replace(case, dtype=torch.bfloat16, recompute=True))


@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize(("steps", "rows"), [(1, 2), (4, 1), (90, 1)], ids=str)
def test_sizes_of_a_group(name: str, steps: int, rows: int) -> None:
    """One step, whose rows need no other order; one row, as per-sample gradients ask; sums of several pieces."""
    case = groups.make_case(name, dtype=torch.float64, steps=steps, rows=rows * groups.GROUPS, hidden_size=6)
    check("step", case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_projections(name: str, dtype: torch.dtype) -> None:
    check("step", groups.make_case(name, dtype=dtype, ragged=True, proj_size=8))


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_sequence", "everything_batch_norm"])
def test_batch_norm_in_evaluation(name: str) -> None:
    check("step", groups.make_case(name, dtype=torch.float64, training=False, ragged=True))


@pytest.mark.parametrize("name", [name for name in groups.PER_SAMPLE if REGULARIZERS[name].changed()])
def test_first_step_continues_a_sequence(name: str) -> None:
    with use("step"):
        groups.test_first_step_continues_a_sequence(name)
