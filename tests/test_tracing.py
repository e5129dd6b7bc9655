"""``torch.jit.trace``: what it records is the operator, for inference, and needs no Python; it is not to be trained."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from helpers import compiled

import fusedreg

pytestmark = [compiled, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")]


def traced(module: torch.nn.Module, input: torch.Tensor) -> Any:
    """Traced, checked by torch against a second trace, saved and loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.jit.trace(module, (input,), strict=True)
        file = io.BytesIO()
        torch.jit.save(program, file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True},
        {"norm": fusedreg.LayerNorm(), "zoneout_cell": 0.3},
    ],
    ids=["plain", "layers", "layer norm"],
)
def test_another_length_and_batch(options: Any) -> None:
    torch.manual_seed(0)
    module = fusedreg.LSTM(3, 4, **options).eval()
    program = traced(module, torch.randn(5, 2, 3))
    input = torch.randn(7, 4, 3)
    output, state = program(input)
    expected = module(input)
    torch.testing.assert_close(output, expected.output)
    torch.testing.assert_close(state, expected.state)


def test_a_trace_is_not_trained() -> None:
    program = traced(fusedreg.LSTM(3, 4).eval(), torch.randn(5, 2, 3))
    output, _ = program(torch.randn(5, 2, 3))
    with pytest.raises(RuntimeError, match=r"expected options that save for the backward, got save = 0"):
        output.sum().backward()
