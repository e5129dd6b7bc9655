"""Projections (``proj_size``) in the CPU's kernels: the error budget, every instruction set, equal bits, ``nn.LSTM``.

Every case differentiates probes too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import INSTRUCTION_SETS, REGULARIZERS, compiled, use_instruction_set
from torch import nn

import fusedreg
from fusedreg.backends.common import DTYPES
from fusedreg.layer import REVERSE
from fusedreg.regularization import BatchNorm
from fusedreg.testing import (
    LayerCase,
    assert_within_budget,
    implementation,
    make_arguments,
    relative_error,
    run_layer,
)

pytestmark = compiled

MODES: list[dict[str, Any]] = [
    {"ragged": True},
    {"resets": True},
    {"direction": REVERSE, "ragged": True, "resets": True},
    {"recompute": True, "ragged": True},
    {"training": False},
    {"bias": False, "initial_state": False, "return_cells": False},
]


def case_of(name: str, **changes: Any) -> LayerCase:
    case = LayerCase(name, proj_size=4, probes=True, regularization=REGULARIZERS[name])
    if isinstance(case.regularization.norm, BatchNorm):
        case = replace(case, rows=12, hidden_size=10)
    return replace(case, **changes)


@pytest.mark.parametrize(
    ("name", "mode"),
    list(zip(REGULARIZERS, itertools.cycle(MODES), strict=False)),
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_regulariser(name: str, mode: dict[str, Any]) -> None:
    """Each in one of the modes; the random search goes everywhere."""
    agrees_in_float64(case_of(name, **mode), 1e-12 if REGULARIZERS[name].norm is None else 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda one: str(one)[6:])
@pytest.mark.parametrize("name", ["none", "everything", "everything_untied", "batch_norm", "layer_norm"])
def test_every_type(name: str, dtype: torch.dtype) -> None:
    assert_within_budget(implementation("cpu"), case_of(name, dtype=dtype, ragged=True, recompute=name == "everything"))


def agrees_in_float64(case: LayerCase, allowed: float) -> None:
    case = replace(case, dtype=torch.float64)
    arguments = make_arguments(case, 0)
    ours = run_layer(implementation("cpu"), case, arguments)
    for key, value in run_layer(implementation("reference"), case, arguments).items():
        assert relative_error([(ours[key], value)]) < allowed, key


# Around the widths of vectors and tiles, with too few rows to pack a weight for, and a projection that widens.
SHAPES = [
    # steps, rows, input_size, hidden_size, proj_size
    (1, 1, 1, 2, 1),
    (3, 2, 5, 8, 8),
    (6, 5, 16, 16, 8),
    (5, 6, 17, 33, 9),
    (4, 9, 3, 64, 32),
    (5, 8, 65, 70, 65),
    (5, 2, 7, 130, 127),
    (4, 7, 6, 5, 12),
    (7, 40, 5, 20, 3),
]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "T{}B{}I{}H{}P{}".format(*shape))
@pytest.mark.parametrize("name", ["none", "everything", "everything_untied", "everything_layer_norm"])
def test_shapes(name: str, shape: tuple[int, ...], instruction_set: str) -> None:
    sizes = dict(zip(("steps", "rows", "input_size", "hidden_size", "proj_size"), shape, strict=True))
    with use_instruction_set(instruction_set) as reason:
        if reason:
            pytest.skip(f"not run: {reason}")
        # A norm of one or two units amplifies rounding.
        agrees_in_float64(case_of(name, **sizes), 1e-12 if REGULARIZERS[name].norm is None else 1e-6)


@pytest.fixture
def thread_count_is_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("thread_count_is_restored")
@pytest.mark.parametrize("name", ["none", "everything_untied", "everything_batch_norm", "everything_layer_norm"])
@pytest.mark.parametrize("rows", [3, 37], ids=["units", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_bits_with_any_number_of_threads(name: str, rows: int, dtype: torch.dtype) -> None:
    """Few rows: units are divided among workers; many: rows are."""
    sizes = {"steps": 9, "rows": rows, "input_size": 50, "hidden_size": 150, "proj_size": 70}
    case = case_of(name, ragged=True, resets=True, dtype=dtype, **sizes)
    arguments = make_arguments(case, 0)
    torch.set_num_threads(1)
    expected = run_layer(implementation("cpu"), case, arguments)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for key, value in run_layer(implementation("cpu"), case, arguments).items():
            assert torch.equal(value.nan_to_num(7.25), expected[key].nan_to_num(7.25)), key


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize(("rows", "ragged"), [(1, False), (5, True)])
def test_nn_lstm(bidirectional: bool, rows: int, ragged: bool) -> None:
    """Two layers, results and every gradient, in float64."""
    theirs = nn.LSTM(6, 9, 2, bidirectional=bidirectional, proj_size=4, dtype=torch.float64)
    ours = fusedreg.LSTM.from_torch(theirs)
    ours.backend = "cpu"
    input = torch.randn(7, rows, 6, dtype=torch.float64, requires_grad=True)
    states = 4 if bidirectional else 2
    hx = tuple(torch.randn(states, rows, size, dtype=torch.float64, requires_grad=True) for size in (4, 9))
    lengths = torch.tensor([7, 3, 1, 7, 5]) if ragged else None

    def values(module: Any) -> list[torch.Tensor]:
        packed: Any = input
        if lengths is not None:
            packed = nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, (h_n, c_n) = module(packed, hx)
        output = output if lengths is None else output.data
        loss = output.pow(2).sum() + h_n.pow(3).sum() + c_n.sin().sum()
        return [output, h_n, c_n, *torch.autograd.grad(loss, [input, *hx, *module.parameters()])]

    for one, two in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
