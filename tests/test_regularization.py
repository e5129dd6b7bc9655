"""The option classes: defaults, checks with their messages, and the expansion to one layer's own numbers."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from fusedreg.layer import LayerOptions
from fusedreg.regularization import RATE_NAMES, BatchNorm, LayerNorm, Regularization


def test_defaults_switch_everything_off() -> None:
    regularization = Regularization()
    assert all(getattr(regularization, name) == 0.0 for name in RATE_NAMES)
    assert regularization.norm is None
    assert regularization.changed() == {}
    assert not regularization.layer_options(0, 1, 0, training=True).draws


def test_rate_names_are_those_of_the_layer_in_the_same_order() -> None:
    options = LayerOptions(**{name: (position + 1) / 16 for position, name in enumerate(RATE_NAMES)})
    assert options.rates == tuple((position + 1) / 16 for position in range(9))


@pytest.mark.parametrize("name", RATE_NAMES)
@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (1.0, ValueError, "1.0"),
        (-0.1, ValueError, "-0.1"),
        (math.nan, ValueError, "nan"),
        (math.inf, ValueError, "inf"),
        (2, ValueError, "2"),
        ("0.5", TypeError, "'0.5'"),
        (None, TypeError, "None"),
        (True, TypeError, "True"),
        ([0.1, 1.5], ValueError, "1.5"),
        ([0.1, "a"], TypeError, "'a'"),
        (b"1", TypeError, "b'1'"),
        ({0.1}, TypeError, "0.1"),
    ],
    ids=repr,
)
def test_bad_rates(name: str, value: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error) as caught:
        Regularization(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    assert "expected" in message
    assert got in message
    assert ";" in message


@pytest.mark.parametrize("name", RATE_NAMES)
def test_an_empty_sequence_of_rates(name: str) -> None:
    if name == "dropout":
        Regularization(dropout=()).check_layers(1)
        return
    with pytest.raises(ValueError, match=f"{name}: expected a number or one number a layer, got an empty sequence"):
        Regularization(**{name: ()})


@pytest.mark.parametrize("value", [0, 0.25, np.float32(0.25), np.float64(0.25)], ids=repr)
def test_numbers_become_floats(value: Any) -> None:
    rate = Regularization(zoneout_cell=value).zoneout_cell
    assert type(rate) is float
    assert rate == float(value)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("gate_masks", ("tied", "untied")),
        ("update_mask", ("step", "sequence")),
        ("weight_mask", ("element", "row")),
        ("zoneout_output", ("state", "candidate")),
    ],
)
def test_choices(name: str, accepted: tuple[str, str]) -> None:
    for value in accepted:
        assert getattr(Regularization(**{name: value}), name) == value
    for value in ("other", "", None, 1):
        with pytest.raises(ValueError, match=f"{name}: expected '{accepted[0]}' or '{accepted[1]}', got {value!r}"):
            Regularization(**{name: value})


def test_norm_must_be_one_of_the_two() -> None:
    for norm in ("batch", BatchNorm, 1):
        with pytest.raises(TypeError, match=r"norm: expected a fusedreg\.BatchNorm, a fusedreg\.LayerNorm or None"):
            Regularization(norm=norm)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "max_steps: expected a positive int with statistics='per_step', got None"),
        ({"max_steps": 0}, ValueError, "max_steps: expected a positive int, got 0"),
        ({"max_steps": 2.5}, TypeError, "max_steps: expected a positive int, got 2.5 of type float"),
        ({"max_steps": True}, TypeError, "max_steps: expected a positive int, got True"),
        ({"max_steps": 3, "statistics": "shared"}, ValueError, "max_steps: expected None with statistics='shared'"),
        ({"max_steps": 3, "statistics": "both"}, ValueError, "statistics: expected 'per_step' or 'shared', got 'both'"),
        ({"max_steps": 3, "input_statistics": 1}, ValueError, "input_statistics: expected 'step' or 'sequence', got 1"),
        ({"max_steps": 3, "momentum": 1.5}, ValueError, r"momentum: expected a number in \[0, 1\] or None, got 1.5"),
        ({"max_steps": 3, "momentum": math.nan}, ValueError, "momentum: expected"),
        ({"max_steps": 3, "momentum": "x"}, TypeError, "momentum: expected a number, got 'x' of type str"),
        ({"max_steps": 3, "eps": 0.0}, ValueError, "eps: expected a positive finite number, got 0.0"),
        ({"max_steps": 3, "eps": math.inf}, ValueError, "eps: expected a positive finite number, got inf"),
        ({"max_steps": 3, "eps": None}, TypeError, "eps: expected a number, got None"),
        ({"max_steps": 3, "weight_init": math.nan}, ValueError, "weight_init: expected a finite number, got nan"),
        ({"max_steps": 3, "cell": 1}, TypeError, "cell: expected True or False, got 1 of type int"),
        (
            {"max_steps": 3, "input": False, "recurrent": False, "cell": False},
            ValueError,
            "BatchNorm: expected at least one of input, recurrent and cell to be True",
        ),
    ],
)
def test_bad_batch_norms(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNorm(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps: expected a positive finite number, got -1.0"),
        ({"input": None}, TypeError, "input: expected True or False, got None"),
        ({"input": False, "recurrent": False, "cell": False}, ValueError, "LayerNorm: expected at least one"),
    ],
)
def test_bad_layer_norms(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LayerNorm(**arguments)


def test_batch_norm_accepts_what_it_documents() -> None:
    assert BatchNorm(statistics="shared").max_steps is None
    assert BatchNorm(max_steps=5, momentum=None).momentum is None
    assert BatchNorm(max_steps=5, momentum=1).momentum == 1.0


def test_rates_by_layer() -> None:
    rates = Regularization(zoneout_cell=[0.1, 0.2, 0.3], hidden_dropout=0.25, dropout=[0.4, 0.5, 0.6])
    rates.check_layers(3)
    layers = [rates.layer_options(layer, 3, 0, training=True) for layer in range(3)]
    assert [options.zoneout_cell for options in layers] == [0.1, 0.2, 0.3]
    assert [options.hidden_dropout for options in layers] == [0.25] * 3
    assert [options.dropout for options in layers] == [0.4, 0.5, 0.0]
    assert [options.layer for options in layers] == [0, 1, 2]

    shorter = Regularization(dropout=[0.4, 0.5])
    shorter.check_layers(3)
    assert [shorter.layer_options(layer, 3, 0, training=True).dropout for layer in range(3)] == [0.4, 0.5, 0.0]


@pytest.mark.parametrize("name", RATE_NAMES)
def test_sequences_of_the_wrong_length(name: str) -> None:
    regularization = Regularization(**{name: [0.1, 0.1]})
    with pytest.raises(ValueError, match=f"{name}: expected one number, or 4.* for num_layers=4, got 2"):
        regularization.check_layers(4)
    with pytest.raises(ValueError, match=f"{name}: expected one number, or 1.* for num_layers=1, got 2"):
        regularization.check_layers(1)


def test_layer_options_pass_everything_on() -> None:
    regularization = Regularization(
        gate_masks="untied",
        update_mask="sequence",
        weight_mask="row",
        zoneout_output="candidate",
        norm=LayerNorm(),
        output_dropout=0.5,
    )
    options = regularization.layer_options(1, 2, 1, training=False, recompute=True, return_cells=True)
    assert options == LayerOptions(
        layer=1,
        direction=1,
        training=False,
        output_dropout=0.5,
        gate_masks="untied",
        update_mask="sequence",
        weight_mask="row",
        zoneout_output="candidate",
        norm=LayerNorm(),
        recompute=True,
        return_cells=True,
    )
    assert not options.draws
    assert dataclasses.replace(options, training=True).draws


def test_every_option_reaches_the_layer() -> None:
    names = {field.name for field in dataclasses.fields(Regularization)}
    assert names == {field.name for field in dataclasses.fields(LayerOptions)} - {
        "layer",
        "direction",
        "training",
        "recompute",
        "return_cells",
    }


def test_values_are_frozen_hashable_and_copied_as_themselves() -> None:
    rates = [0.1, 0.2]
    regularization = Regularization(zoneout_cell=rates, norm=BatchNorm(3))
    rates[0] = 0.9
    assert regularization.zoneout_cell == (0.1, 0.2)
    assert regularization == Regularization(zoneout_cell=(0.1, 0.2), norm=BatchNorm(3))
    assert hash(regularization) == hash(Regularization(zoneout_cell=(0.1, 0.2), norm=BatchNorm(3)))
    assert copy.deepcopy(regularization) is regularization
    assert copy.copy(regularization) is regularization
    assert pickle.loads(pickle.dumps(regularization)) == regularization
    with pytest.raises(dataclasses.FrozenInstanceError):
        regularization.dropout = 0.5  # type: ignore[misc]
    assert regularization.changed() == {"zoneout_cell": (0.1, 0.2), "norm": BatchNorm(3)}
