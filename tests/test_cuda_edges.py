"""Rows that end early or never begin, and NaN, in every tier of the CUDA kernels on the emulated device."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import TIERS, emulated, lstm_layer, use
from test_parity import case_of

from fusedreg.layer import LayerOptions, LayerParameters
from fusedreg.masks import layer_masks
from fusedreg.testing import implementation, make_arguments, relative_error, run_layer

pytestmark = emulated

LENGTHS = {
    "one row to the end": [6, 2, 2, 2, 2, 2, 2, 2, 0, 0],  # batch norm: steps of one row take the population's moments
    "one row alone": [4, 0, 0, 0, 0, 0, 0, 0],
    "no row at all": [0] * 8,
    "out of range": [-3, 9, 4, 1, 0, 6, 100, 5, 5, 5],  # on a device nobody looks, so kernels clamp
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("mode", ["lengths", "reverse"])
@pytest.mark.parametrize("name", ["batch_norm", "everything_untied_batch_norm", "everything_layer_norm", "everything"])
@pytest.mark.parametrize("tier", TIERS)
def test_lengths(tier: str, name: str, mode: str, lengths: list[int]) -> None:
    case = case_of(name, mode, steps=6, rows=len(lengths), hidden_size=21, resets=True)
    arguments = make_arguments(case, 3)._replace(lengths=torch.tensor(lengths))
    exact = run_layer(implementation("reference"), case, arguments.to(torch.float64))
    with use(tier):
        ours = run_layer(lstm_layer, case, arguments)
    for key, value in exact.items():
        assert ours[key].isfinite().all(), key
        assert (ours[key][value == 0] == 0).all(), f"{key} is not zero where the reference is"
        assert relative_error([(ours[key].double(), value)]) < 5e-6, key


@pytest.mark.parametrize("tier", TIERS)
def test_zoneout_selects(tier: str) -> None:
    """What is zoned out does not reach the state, not even as NaN times zero: one bad input spoils one candidate."""
    rows, hidden = 5, 33
    options = LayerOptions(zoneout_hidden=0.5, zoneout_cell=0.5)
    input = torch.randn(1, rows, 4)
    input[0, 2, 1] = float("nan")
    parameters = LayerParameters(torch.randn(4 * hidden, 4), torch.randn(4 * hidden, hidden))
    seed = torch.tensor(3)
    with use(tier):
        result = lstm_layer(input, None, None, parameters, options, lengths=None, reset=None, seed=seed, running=None)
    sizes = {"steps": 1, "rows": rows, "input_size": 4, "hidden_size": hidden, "output_size": hidden}
    drawn = layer_masks(seed, options, **sizes)
    for value, zone in ((result.final_hidden, drawn.zoneout_hidden), (result.final_cell, drawn.zoneout_cell)):
        assert zone is not None
        assert not value[torch.arange(rows) != 2].isnan().any()
        assert torch.equal(value[2].isnan(), ~zone[0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["everything_untied", "everything_batch_norm", "everything_layer_norm"])
@pytest.mark.parametrize("tier", TIERS)
def test_padding_may_hold_nan(tier: str, name: str, dtype: torch.dtype) -> None:
    """And resets there do nothing."""
    case = case_of(name, "lengths", steps=5, resets=True, dtype=dtype)
    arguments = make_arguments(case, 4)
    assert arguments.lengths is not None and arguments.reset is not None
    padding = torch.arange(case.steps)[:, None] >= arguments.lengths[None, :]
    assert padding.any()
    spoiled = arguments._replace(
        input=torch.where(padding.unsqueeze(-1), float("nan"), arguments.input), reset=arguments.reset | padding
    )
    with use(tier):
        expected = run_layer(lstm_layer, case, arguments)
        values = run_layer(lstm_layer, case, spoiled)
    for key, value in expected.items():
        assert torch.equal(values[key], value), key
