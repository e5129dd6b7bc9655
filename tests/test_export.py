"""Exported programs as files: with both directions, lengths, states and dynamic sizes; the result's type survives."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor, nn

import fusedreg

pytestmark = [compiled, pytest.mark.compile, pytest.mark.usefixtures("fresh_compiler")]


class Tagger(nn.Module):
    """Both directions over ragged rows, batch first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fusedreg.LSTM(
            3, 4, bidirectional=True, batch_first=True, zoneout_cell=0.2, norm=fusedreg.LayerNorm()
        )

    def forward(self, input: Tensor, lengths: Tensor, hidden: Tensor, cell: Tensor) -> Any:
        return self.lstm(input, (hidden, cell), lengths=lengths, return_cell_states=True)


def arguments(rows: int, steps: int) -> tuple[Tensor, ...]:
    lengths = torch.arange(rows) % (steps + 1)
    return torch.randn(rows, steps, 3), lengths, torch.randn(2, rows, 4), torch.randn(2, rows, 4)


def test_a_saved_program_gives_what_the_module_gives() -> None:
    model = Tagger().eval()
    rows, steps = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("steps", min=2, max=99)
    program = torch.export.export(
        model, arguments(3, 5), dynamic_shapes=({0: rows, 1: steps}, {0: rows}, {1: rows}, {1: rows})
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    given = arguments(4, 7)
    found, expected = loaded(*given), model(*given)
    assert type(found) is type(expected) is fusedreg.LSTMResultWithCells
    for name in expected._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_a_saved_cell() -> None:
    cell = fusedreg.LSTMCell(3, 4, output_dropout=0.5).eval()
    given = (torch.randn(2, 3), (torch.zeros(2, 4), torch.zeros(2, 4)))
    file = io.BytesIO()
    torch.export.save(torch.export.export(cell, given, {"return_output": True}), file)
    file.seek(0)
    found = torch.export.load(file).module()(*given, return_output=True)
    assert type(found) is fusedreg.LSTMResult
    torch.testing.assert_close(found.output, cell(*given, return_output=True).output)
