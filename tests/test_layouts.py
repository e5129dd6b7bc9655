"""Tensors that are not plain: subclasses and views work as in ``nn.LSTM``; layouts without strides are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fusedreg

BACKENDS = ["reference", pytest.param("cpu", marks=compiled)]
DENSE = torch.linspace(-1, 1, 30).view(5, 2, 3)


class Plain(Tensor):
    """A subclass that adds nothing."""


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor([DENSE[:, 0], DENSE[:3, 1]], layout=layout)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (DENSE.to_sparse, r"got layout torch\.sparse_coo; convert with \.to_dense\(\)"),
    "of another library": (DENSE.to_mkldnn, r"got layout torch\._mkldnn; convert with \.to_dense\(\)"),
    "nested": (lambda: nested(torch.strided), "got a nested tensor; pad with .* lengths="),
    "jagged": (lambda: nested(torch.jagged), "got a nested tensor; pad with .* lengths="),
}
USABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": lambda value: nn.Parameter(value.clone()),
    "buffer": lambda value: nn.Buffer(value.clone()),
    "subclass": lambda value: value.as_subclass(Plain),
    "wrapper": lambda value: TwoTensor(value.clone(), value.clone()),
    "negative view": lambda value: torch._neg_view(value),
    "imaginary part": lambda value: torch.complex(value, value).conj().imag,
    "expanded": lambda value: value[:, :1].expand(value.shape),
    "other strides": lambda value: value.transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", USABLE)
def test_what_nn_lstm_takes(name: str, backend: str) -> None:
    """As input, as state, and as a cell's: the type, the numbers and the gradients are those of ``nn.LSTM``."""
    torch.manual_seed(0)
    theirs, their_cell = nn.LSTM(3, 4), nn.LSTMCell(3, 4)
    ours, our_cell = (
        fusedreg.LSTM.from_torch(theirs, backend=backend),
        fusedreg.LSTMCell.from_torch(their_cell, backend=backend),
    )
    value, state = USABLE[name](DENSE), USABLE[name](torch.ones(1, 2, 4))
    for modules, arguments in (
        ((theirs, ours), (value,)),
        ((theirs, ours), (DENSE, (state, torch.ones(1, 2, 4)))),
        ((their_cell, our_cell), (value[0], (state[0], torch.ones(2, 4)))),
    ):
        outputs = []
        for module in modules:
            output = module(*arguments)[0]
            output.square().sum().backward()
            outputs.append(output)
        right, found = outputs
        assert type(found) is type(right)
        torch.testing.assert_close(found, right)
        for parameter, ours_ in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
            torch.testing.assert_close(ours_.grad, parameter.grad)
            parameter.grad = ours_.grad = None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_strides_is_refused(name: str, backend: str) -> None:
    make, words = REFUSED[name]
    module, cell = fusedreg.LSTM(3, 4, backend=backend), fusedreg.LSTMCell(3, 4, backend=backend)
    for call in (module, cell):
        with pytest.raises(ValueError, match=f"input: expected a dense tensor.*{words}"):
            call(make())
    if name != "sparse":
        return
    dense, state = torch.ones(1, 2, 4), torch.ones(1, 2, 4).to_sparse()
    for hx, place in (((state, dense), "h_0"), ((dense, state), "c_0")):
        with pytest.raises(RuntimeError, match=f"hx: {place}: expected a dense tensor.*{words}"):
            module(DENSE, hx)
        with pytest.raises(RuntimeError, match=f"hx: {place[0]}: expected a dense tensor.*{words}"):
            cell(DENSE[0], tuple(value[0] for value in hx))
    keywords: dict[str, Any] = {
        "lengths": torch.tensor([5, 3]).to_sparse(),
        "reset": torch.zeros(5, 2, dtype=torch.bool).to_sparse(),
    }
    for argument, value in keywords.items():
        with pytest.raises(ValueError, match=f"{argument}: expected a dense tensor.*{words}"):
            module(DENSE, **{argument: value})
    with pytest.raises(ValueError, match=f"reset: expected a dense tensor.*{words}"):
        cell(DENSE[0], reset=torch.zeros(2, dtype=torch.bool).to_sparse())


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.int64, r"input\.to\(torch\.float32\)$"),
        (torch.bool, r"input\.to\(torch\.float32\)$"),
        (torch.complex64, r"input\.to\(torch\.float32\)$"),
        (torch.float64, r"input\.to\(torch\.float32\) or module\.to\(torch\.float64\)$"),
    ],
    ids=str,
)
def test_the_remedy_for_a_type_is_one(dtype: torch.dtype, remedy: str) -> None:
    """No module can be made of integers."""
    with pytest.raises(ValueError, match=f"input: expected torch.float32.*got {dtype}; convert with {remedy}"):
        fusedreg.LSTM(3, 4)(DENSE.to(dtype))


def test_parameters_that_nothing_computes_in() -> None:
    parameters = [value.detach().to(torch.complex64) for value in nn.LSTM(3, 4).parameters()]
    with pytest.raises(ValueError, match=r"parameters of a real floating type, got torch\.complex64; .*module\.float"):
        fusedreg.functional.lstm(DENSE.to(torch.complex64), None, parameters)
