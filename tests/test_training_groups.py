"""Parameter groups: every parameter in exactly one, with its component's decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedreg
from fusedreg.training import AWDLSTM, parameter_groups


def models() -> dict[str, nn.Module]:
    tied = AWDLSTM(7, 3, 4)
    several = nn.ModuleList([nn.LSTM(3, 4, bidirectional=True), fusedreg.LSTM(8, 4, proj_size=2), nn.LSTMCell(2, 2)])
    frozen = fusedreg.LSTM(3, 4, norm=fusedreg.LayerNorm())
    frozen.weight_ih_l0.requires_grad_(False)
    wrapped = nn.LSTM(3, 4)
    nn.utils.parametrizations.weight_norm(wrapped, "weight_hh_l0")
    return {"tied": tied, "several": several, "frozen": frozen, "wrapped": wrapped, "none": nn.Linear(2, 3)}


@pytest.mark.parametrize("name", models())
def test_every_parameter_once(name: str) -> None:
    model = models()[name]
    groups = parameter_groups(model, {"kernel": 1e-4, "recurrent": 1e-5, "bias": 0})
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted({id(parameter) for parameter in model.parameters()})
    torch.optim.AdamW(groups, lr=1e-3)


def test_decays_and_rates() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "head": nn.Linear(4, 2)})
    groups = parameter_groups(model, {"kernel": 1e-4, "recurrent": 1e-5}, learning_rate={"recurrent": 0.5})
    by_component = {group["component"]: group for group in groups}
    assert {name: group["weight_decay"] for name, group in by_component.items()} == {
        "kernel": 1e-4,
        "recurrent": 1e-5,
        "bias": 0.0,
        "other": 0.0,
    }
    assert [name for name, group in by_component.items() if "lr" in group] == ["recurrent"]
    assert {group["weight_decay"] for group in parameter_groups(model, 0.1)} == {0.1}


def test_decoupled_decay_shrinks_what_it_names() -> None:
    """AdamW without gradients: w ← (1 - lr · decay) w, and only there."""
    lstm = fusedreg.LSTM(3, 4)
    before = {name: parameter.detach().clone() for name, parameter in lstm.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(lstm, {"recurrent": 0.5}), lr=0.1)
    for parameter in lstm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in lstm.named_parameters():
        factor = 1 - 0.1 * 0.5 if name == "weight_hh_l0" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_bad_arguments() -> None:
    lstm = nn.LSTM(3, 4)
    with pytest.raises(ValueError, match=r"weight_decay: expected components out of kernel, .*, got 'weights'"):
        parameter_groups(lstm, {"weights": 1.0})
    with pytest.raises(ValueError, match=r"weight_decay\['kernel'\]: expected a non-negative finite number, got -1"):
        parameter_groups(lstm, {"kernel": -1.0})
    with pytest.raises(TypeError, match=r"weight_decay\['kernel'\]: expected a number, got '1'"):
        parameter_groups(lstm, {"kernel": "1"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="model: expected a torch"):
        parameter_groups(lstm.parameters(), 0.1)  # type: ignore[arg-type]
