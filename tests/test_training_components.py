"""Which part of a model a parameter is: decided by the module that holds it, each parameter once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedreg
from fusedreg.training import classify
from fusedreg.training.components import uses_of_weights

SHAPES: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False},
    {"proj_size": 2, "num_layers": 2},
]


def found(model: nn.Module) -> dict[str, str]:
    return {name: one.component for one in classify(model) for name in one.names}


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [fusedreg.LSTM, nn.LSTM])
def test_every_parameter_of_an_lstm(kind: Any, options: dict[str, Any]) -> None:
    lstm = kind(3, 4, **options)
    components = found(lstm)
    assert set(components) == set(dict(lstm.named_parameters()))
    for layer in range(lstm.num_layers):
        for ending in (f"_l{layer}", f"_l{layer}_reverse")[: 2 if lstm.bidirectional else 1]:
            assert components["weight_ih" + ending] == "kernel"
            assert components["weight_hh" + ending] == "recurrent"
            if lstm.bias:
                assert components["bias_ih" + ending] == components["bias_hh" + ending] == "bias"
            if lstm.proj_size:
                assert components["weight_hr" + ending] == "recurrent"


@pytest.mark.parametrize("norm", [fusedreg.LayerNorm(), fusedreg.BatchNorm(max_steps=3)], ids=str)
def test_norms(norm: Any) -> None:
    components = found(fusedreg.LSTM(3, 4, norm=norm))
    norms = {name for name, component in components.items() if component == "norm"}
    assert norms == {name for name in components if name.startswith("norm_")} != set()


@pytest.mark.parametrize("bias", [False, True])
def test_cells(bias: bool) -> None:
    ours, theirs = fusedreg.LSTMCell(3, 4, bias=bias, norm=fusedreg.LayerNorm()), nn.LSTMCell(3, 4, bias=bias)
    components = found(ours)
    assert {name: components[name] for name in found(theirs)} == found(theirs)
    expected = {"weight_ih": "kernel", "weight_hh": "recurrent"} | (
        {"bias_ih": "bias", "bias_hh": "bias"} if bias else {}
    )
    assert found(theirs) == expected
    assert {component for name, component in components.items() if name not in expected} == {"norm"}


def test_names_do_not_decide() -> None:
    """A module of the user's own may call anything weight_hh_l0."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_hh_l0 = nn.Parameter(torch.zeros(8, 2))
            self.bias = nn.Parameter(torch.zeros(8))

    class Derived(nn.LSTM):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.weight_extra = nn.Parameter(torch.zeros(2))

    assert set(found(Own()).values()) == {"other"}
    components = found(Derived())
    assert components["weight_extra"] == "other"
    assert components["weight_hh_l0"] == "recurrent"


def test_other_layers() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 3),
            "norm": nn.LayerNorm(3),
            "cell": nn.LSTMCell(3, 4),
            "conv": nn.Conv1d(4, 4, 1),
            "head": nn.Linear(4, 5),
            "plain": nn.LayerNorm(3, elementwise_affine=False),
            "without": nn.Linear(4, 5, bias=False),
        }
    )
    assert found(model) == {
        "table.weight": "embedding",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "cell.weight_ih": "kernel",
        "cell.weight_hh": "recurrent",
        "cell.bias_ih": "bias",
        "cell.bias_hh": "bias",
        "conv.weight": "other",
        "conv.bias": "bias",
        "head.weight": "other",
        "head.bias": "bias",
        "without.weight": "other",
    }


def test_a_shared_parameter_comes_once() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "a": nn.LSTM(4, 4), "b": fusedreg.LSTM(4, 4)})
    model["head"] = nn.Linear(4, 5)
    model["head"].weight = model["table"].weight
    model["again"] = model["a"]
    model["b"].weight_hh_l0 = model["a"].weight_ih_l0  # a kernel there, recurrent here
    classified = classify(model)
    assert [id(one.parameter) for one in classified] == [id(parameter) for parameter in model.parameters()]
    model["c"] = fusedreg.LSTM(4, 4)
    model["c"].weight_ih_l0 = model["a"].weight_hh_l0  # recurrent there, a kernel here
    components = found(model)
    assert components["head.weight"] == components["table.weight"] == "embedding"
    assert components["a.weight_ih_l0"] == components["b.weight_hh_l0"] == "recurrent"
    assert components["a.weight_hh_l0"] == components["c.weight_ih_l0"] == "recurrent"
    (table,) = (one for one in classified if one.component == "embedding")
    assert table.names == ("table.weight", "head.weight")
    assert components["again.bias_ih_l0"] == "bias"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_what_is_behind_a_parametrised_weight() -> None:
    lstm = fusedreg.LSTM(3, 4)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    parametrizations.spectral_norm(lstm, "weight_ih_l0")
    components = found(lstm)
    assert components["parametrizations.weight_hh_l0.original0"] == "recurrent"
    assert components["parametrizations.weight_hh_l0.original1"] == "recurrent"
    assert components["parametrizations.weight_ih_l0.original"] == "kernel"
    assert set(components.values()) == {"kernel", "recurrent", "bias"}

    old = nn.LSTM(3, 4)
    nn.utils.weight_norm(old, "weight_hh_l0")
    prune.random_unstructured(old, "weight_ih_l0", 0.5)
    components = found(old)
    assert components["weight_hh_l0_g"] == components["weight_hh_l0_v"] == "recurrent"
    assert components["weight_ih_l0_orig"] == "kernel"


def test_weights_as_they_are_used() -> None:
    """Once each; a parametrised one as its module computes it, differentiable in what is behind."""
    lstm = nn.LSTM(3, 4)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    model = nn.Sequential(lstm, lstm, nn.Linear(4, 2))
    used = list(uses_of_weights(model))
    assert sorted(component for component, _ in used) == ["bias", "bias", "bias", "kernel", "other", "recurrent"]
    (recurrent,) = (weight for component, weight in used if component == "recurrent")
    assert torch.equal(recurrent, lstm.weight_hh_l0)
    kept = parametrize.type_before_parametrizations(lstm) is nn.LSTM and list(lstm.parametrizations.parameters())
    assert all(gradient is not None for gradient in torch.autograd.grad(recurrent.sum(), kept))


def test_bad_model() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list; pass the module"):
        classify([nn.Parameter(torch.zeros(1))])  # type: ignore[arg-type]
