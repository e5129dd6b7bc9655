"""What ``fusedreg.inspect`` makes of cells: it watches LSTMs over sequences, and refuses a cell by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedreg
from fusedreg import inspect
from fusedreg.inspect.weights import weights_by_key

LOOKS: dict[str, Callable[..., Any]] = {
    "States": inspect.States,
    "GradientFlow": inspect.GradientFlow,
    "NonFinite": inspect.NonFinite,
    "spectra": inspect.spectra,
    "weight_histograms": inspect.weight_histograms,
    "weight_maps": inspect.weight_maps,
    "not_finite_gradients": inspect.not_finite_gradients,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("cell", [fusedreg.LSTMCell, nn.LSTMCell], ids=["ours", "torchs"])
def test_a_cell_is_refused_by_name(look: str, cell: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"encoder": fusedreg.LSTM(3, 4), "decoder": cell(3, 4)})
    with pytest.raises(ValueError, match=r"got a cell at decoder, .*fusedreg\.LSTM, .*skip=\['decoder'\]"):
        LOOKS[look](model)
    LOOKS[look](model, skip=["decoder"])
    with pytest.raises(ValueError, match=r"got a cell at the model itself"):
        LOOKS[look](cell(3, 4))


def test_a_trackers_norms_include_cells() -> None:
    model = nn.ModuleDict({"encoder": fusedreg.LSTM(3, 4), "decoder": fusedreg.LSTMCell(3, 4)})
    kept = sum(value.square().sum() for values in weights_by_key(model).values() for value in values)
    everything = sum(parameter.square().sum() for parameter in model.parameters())
    torch.testing.assert_close(kept, everything)
