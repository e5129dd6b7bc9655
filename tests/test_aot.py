"""A package compiled ahead of time runs in a program without Python, where the built library is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor
from helpers import compiled
from torch import Tensor, nn

import fusedreg
from fusedreg.backends import cpu

TORCH = Path(torch.__file__).parent
PROGRAM = Path(__file__).parent / "native" / "aot_program.cpp"
CXX = os.environ.get("CXX", "g++")

pytestmark = [
    compiled,
    pytest.mark.slow,
    pytest.mark.compile,
    pytest.mark.build,
    pytest.mark.skipif(sys.platform != "linux", reason="not run: reads /proc/self/maps"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"not run: no {CXX}"),
]


class Model(nn.Module):
    """Two regularised layers, both directions, lengths, and what stands around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fusedreg.LSTM(
            3, 8, 2, bidirectional=True, zoneout_cell=0.2, norm=fusedreg.LayerNorm(), backend="cpu"
        )
        self.head = nn.Linear(16, 4)

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (hidden, cell) = self.lstm(input, lengths=lengths)
        return self.head(output), hidden, cell


def build(folder: Path) -> Path:
    """The C++ program, linked to libtorch alone."""
    include, library = TORCH / "include", TORCH / "lib"
    executable = folder / "aot_program"
    command = [CXX, "-std=c++20", "-O0", str(PROGRAM), f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    command += [
        f"-L{library}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
        f"-Wl,-rpath,{library}",
    ]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-o", str(executable)]
    subprocess.run(command, check=True, timeout=500)
    return executable


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_package_runs_without_python(tmp_path: Path) -> None:
    """Compiled at one length and number of rows, run at others; numbers as in Python."""
    model = Model().eval()
    steps, rows = torch.export.Dim("steps", min=2, max=100), torch.export.Dim("rows", min=2, max=64)
    example = (torch.randn(5, 2, 3), torch.tensor([5, 3]))
    program = torch.export.export(model, example, dynamic_shapes=({0: steps, 1: rows}, {0: rows}))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    results = tmp_path / "results"
    command = [str(build(tmp_path)), package, str(cpu.library_path()), str(results)]
    answer = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=100, env={"OMP_NUM_THREADS": "1"}
    )
    assert answer.stdout == "without Python\n"

    input = torch.arange(81, dtype=torch.float32).sin().reshape(9, 3, 3)
    with torch.no_grad():
        expected = model(input, torch.tensor([9, 0, 4]))
    found = torch.frombuffer(bytearray(results.read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(found, torch.cat([value.flatten() for value in expected]))
