"""``from_torch`` and ``to_torch``: what goes along, what is copied, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bias": False},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"bidirectional": True, "proj_size": 3},
    {"num_layers": 2, "dropout": 0.5, "dtype": torch.float64},
]
INPUT = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))


def ids(value: Any) -> str:
    return (
        ",".join(f"{key}={item}" for key, item in value.items()) or "plain" if isinstance(value, dict) else repr(value)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("training", [True, False])
def test_conversion_both_ways(options: dict[str, Any], training: bool) -> None:
    """Hyperparameters, mode, types and requires_grad go along; weights are copies; no random number is drawn."""
    theirs = nn.LSTM(4, 5, **options).train(training)
    theirs.weight_ih_l0.requires_grad_(False)
    generator = torch.get_rng_state()
    ours = fusedreg.LSTM.from_torch(theirs)
    back = ours.to_torch()
    assert torch.equal(torch.get_rng_state(), generator)
    assert repr(ours) == repr(theirs) == repr(back)
    for module in (ours, back):
        assert module.training == training
        for (name, value), (expected_name, expected) in zip(
            module.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert name == expected_name
            assert torch.equal(value, expected)
            assert value.data_ptr() != expected.data_ptr()
            assert (value.requires_grad, value.dtype) == (expected.requires_grad, expected.dtype)


def test_from_torch_with_regularisers() -> None:
    theirs = nn.LSTM(4, 5, 2, dropout=0.2)
    ours = fusedreg.LSTM.from_torch(theirs, zoneout_cell=0.5, norm=BatchNorm(max_steps=3), recompute=True)
    assert (ours.dropout, ours.regularization.zoneout_cell, ours.recompute) == (0.2, 0.5, True)
    assert ours.running_cell_var_l1.eq(1).all()
    assert ours.norm_cell_weight_l1.eq(0.1).all()
    chosen = Regularization(dropout=[0.4], zoneout_cell=0.5)
    assert fusedreg.LSTM.from_torch(theirs, regularization=chosen).regularization == chosen
    given = fusedreg.LSTM.from_torch(theirs, regularization=Regularization(zoneout_cell=0.5))
    assert given.regularization == Regularization(dropout=0.2, zoneout_cell=0.5)
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.LSTM, got GRU"):
        fusedreg.LSTM.from_torch(nn.GRU(4, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"zoneout_hidden": 0.1}, {"cell_dropout": [0.0, 0.2]}, {"norm": LayerNorm()}], ids=ids
)
def test_to_torch_refuses_what_nn_lstm_cannot_compute(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"to_torch: expected {next(iter(options))} to be off, got"):
        fusedreg.LSTM(4, 5, 2, **options).to_torch()


def test_to_torch_leaves_training_only_regularisers_behind() -> None:
    module = fusedreg.LSTM(4, 5, 3, hidden_dropout=0.3, weight_dropout=0.1, dropout=[0.2, 0.2])
    theirs = module.to_torch()
    assert theirs.dropout == 0.2
    torch.testing.assert_close(theirs.eval()(INPUT)[0], module.eval()(INPUT)[0])
    with pytest.raises(ValueError, match="one dropout for all layers"):
        fusedreg.LSTM(4, 5, 3, dropout=[0.2, 0.3]).to_torch()


@pytest.mark.parametrize("convert", [fusedreg.LSTM.from_torch, fusedreg.LSTM.to_torch])
def test_parametrised_weights_are_refused_by_name(convert: Any) -> None:
    module: nn.Module = nn.LSTM(4, 5) if convert is not fusedreg.LSTM.to_torch else fusedreg.LSTM(4, 5)
    parametrize.register_parametrization(module, "weight_hh_l0", nn.Identity())
    with pytest.raises(ValueError, match=r"weight_hh_l0.*remove_parametrizations"):
        convert(module)
