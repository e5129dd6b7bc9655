"""Names, shapes and grouping of the parameters, and reading the sizes off them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedreg import LSTM
from fusedreg.parameters import Architecture, grouped, infer_architecture

SIZES = Architecture(4, 5, num_layers=2, bidirectional=True)


def named() -> dict[str, Tensor]:
    return dict(LSTM(4, 5, 2, bidirectional=True).named_parameters())


def test_sizes_are_read_off_the_parameters() -> None:
    architecture, parameters = infer_architecture(list(named().values()), 2, True, None)
    assert architecture == SIZES
    assert list(parameters) == list(named())
    assert [group.weight_ih.shape[1] for group in grouped(architecture, parameters)] == [4, 4, 10, 10]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_hh_l1": torch.zeros(20, 6)}, r"parameters: expected weight_hh_l1 of shape \(20, 5\), got \(20, 6\)"),
        ({"bias_ih_l0": torch.zeros(20).double()}, r"parameters: expected bias_ih_l0 of torch\.float32 on cpu"),
        (
            {"bias_ih_l0": torch.zeros(20, device="meta")},
            r"parameters: expected bias_ih_l0 .* got torch\.float32 on meta",
        ),
        ({"weight_ih_l0": torch.zeros(21, 4)}, r"parameters: expected weight_ih_l0 of shape \(4 \* hidden_size"),
    ],
)
def test_parameters_that_do_not_fit(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_architecture({**named(), **changed}, 2, True, None)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1_reverse"])
def test_missing_parameters(name: str) -> None:
    parameters = named()
    del parameters[name]
    with pytest.raises((ValueError, TypeError), match=rf"parameters: expected '?{name}"):
        infer_architecture(parameters, 2, True, None)
