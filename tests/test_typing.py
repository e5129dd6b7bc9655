"""A user's program under mypy's strict checks: the public names are typed, and a wrong use is found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parent.parent

RIGHT = """
from __future__ import annotations

import torch
from torch import Tensor, nn

import fusedreg


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = fusedreg.Regularization(zoneout_cell=(0.1, 0.2), norm=fusedreg.LayerNorm())
        self.lstm = fusedreg.LSTM(3, 4, 2, batch_first=True, regularization=options)
        self.cell = fusedreg.LSTMCell(3, 4, hidden_dropout=0.1)
        self.head = nn.Linear(4, 5)

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        result = self.lstm.forward(input, lengths=lengths, seed=3)
        hidden: Tensor = result.state[0]
        output, (h_n, c_n) = self.lstm(input)
        return torch.stack([hidden.sum(), h_n.sum(), self.head(output).sum()])


model = Tagger()
done: fusedreg.Replacements = fusedreg.replace_lstms(nn.Sequential(nn.LSTM(3, 4)), {"zoneout_cell": 0.1})
names: list[str] = list(done.replaced)
plain: nn.LSTM = fusedreg.LSTM.from_torch(nn.LSTM(3, 4)).to_torch()
drawn: Tensor = fusedreg.seeds.draw_seed("cpu")
text: str = fusedreg.backends.explain("cpu")
"""
WRONG = """
import fusedreg

fusedreg.LSTM("3", 4)
fusedreg.LSTM(3, 4, gate_masks="both")
fusedreg.LSTM(3, 4, norm=0.1)
fusedreg.LSTM(3, 4).forward([1.0])
fusedreg.Regularization(zoneout_cell="much")
"""


@pytest.mark.slow
def test_a_users_program(tmp_path: Path) -> None:
    """With the project's own options, so that what `make lint` has remembered of torch serves here."""
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    ran = subprocess.run(
        [*command, str(tmp_path / "right.py"), str(tmp_path / "wrong.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = [tuple(match) for match in re.findall(r"(right|wrong)\.py:(\d+): error", ran.stdout)]
    assert found == [("wrong", str(line)) for line in range(4, 9)], ran.stdout + ran.stderr
