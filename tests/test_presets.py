"""Presets: the papers' numbers, and models that can be made of them."""

from __future__ import annotations

import pytest
import torch

import fusedreg
from fusedreg import Regularization
from fusedreg.presets import Presets

MADE = {
    "awd_lstm": (Regularization.awd_lstm(), 3),
    "awd_lstm, one layer": (Regularization.awd_lstm(1), 1),
    "gal": (Regularization.gal(), 2),
    "zaremba": (Regularization.zaremba(), 2),
    "zoneout_char_lm": (Regularization.zoneout_char_lm(), 1),
    "zoneout_text8": (Regularization.zoneout_text8(), 1),
    "zoneout_permuted_mnist": (Regularization.zoneout_permuted_mnist(), 1),
    "zoneout_permuted_mnist, batch norm": (Regularization.zoneout_permuted_mnist(batch_norm=True, max_steps=6), 1),
    "recurrent_batch_norm": (Regularization.recurrent_batch_norm(6), 1),
    "input_batch_norm": (Regularization.input_batch_norm(), 1),
    "layer_norm": (Regularization.layer_norm(), 1),
}


@pytest.mark.parametrize("name", MADE)
def test_a_model_can_be_made_of_it(name: str) -> None:
    regularization, layers = MADE[name]
    assert type(regularization) is Regularization
    lstm = fusedreg.LSTM(3, 4, layers, regularization=regularization)
    lstm(torch.randn(6, 5, 3))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in lstm.parameters())


def test_the_papers_numbers() -> None:
    assert Regularization.awd_lstm().changed() == {
        "input_dropout": (0.4, 0.0, 0.0),
        "output_dropout": (0.25, 0.25, 0.4),
        "weight_dropout": 0.5,
    }
    assert Regularization.awd_lstm(1).changed() == {
        "input_dropout": (0.4,),
        "output_dropout": (0.4,),
        "weight_dropout": 0.5,
    }
    assert Regularization.gal().changed() == {
        "input_dropout": 0.5,
        "hidden_dropout": 0.3,
        "output_dropout": (0.0, 0.5),
        "gate_masks": "untied",
    }
    assert (Regularization.zaremba().dropout, Regularization.zaremba("large").dropout) == (0.5, 0.65)
    assert Regularization.zoneout_char_lm().changed() == {"zoneout_hidden": 0.05, "zoneout_cell": 0.5}
    assert Regularization.zoneout_permuted_mnist().changed() == {"zoneout_hidden": 0.15, "zoneout_cell": 0.15}
    assert Regularization.recurrent_batch_norm(100).norm == fusedreg.BatchNorm(max_steps=100, weight_init=0.1)
    laurent = Regularization.input_batch_norm().norm
    assert isinstance(laurent, fusedreg.BatchNorm)
    assert (laurent.input, laurent.recurrent, laurent.cell) == (True, False, False)
    assert laurent.input_statistics == "sequence"
    assert Regularization.layer_norm().norm == fusedreg.LayerNorm()


def test_each_names_its_paper() -> None:
    for name, preset in vars(Presets).items():
        if not name.startswith("_"):
            assert "arXiv:" in preset.__func__.__doc__, name
            assert any(made.split(",")[0] == name for made in MADE), name


def test_sizes() -> None:
    with pytest.raises(ValueError, match="size: expected 'medium' or 'large', got 'small'"):
        Regularization.zaremba("small")
