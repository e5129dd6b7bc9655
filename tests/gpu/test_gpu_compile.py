"""Compiled whole for a GPU, in the mode that uses CUDA graphs, and packages compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_targets import DEVICE, Target
from test_gpu_behaviour import inputs, make, name_of
from torch import Tensor, nn

import fusedreg

pytestmark = [pytest.mark.device, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the compiler's own


@pytest.mark.parametrize("training", [True, False])
def test_cuda_graphs(backend: Target, training: bool) -> None:
    """``mode="reduce-overhead"``: recorded, then replayed with other inputs and other seeds; forward and backward."""
    import torch._dynamo

    torch._dynamo.reset()
    module, eager = make(backend, "everything"), make(backend, "everything")
    module.train(training)
    eager.train(training)
    whole = torch.compile(lambda x, seed: module(x, seed=seed)[0], fullgraph=True, mode="reduce-overhead")
    for number in range(5):  # two to warm up, one to record, the rest are replays
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn_like(inputs()).requires_grad_(training)
        seed = torch.tensor(number, device=DEVICE)
        ours, right = whole(x, seed), eager(x, seed=seed)[0]
        torch.testing.assert_close(ours, right)
        if training:
            found = torch.autograd.grad(ours.square().sum(), list(module.parameters()))
            expected = torch.autograd.grad(right.square().sum(), list(eager.parameters()))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_scaler(backend: Target) -> None:
    """float16 autocast on the device; the step whose gradients overflow is skipped."""
    module = make(backend, "layer_norm")
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for number in range(3):
        before = [value.detach().clone() for value in module.parameters()]
        with torch.autocast("cuda", torch.float16):
            loss = module(inputs(), seed=1)[0].float().square().mean()
        scaler.scale(loss * float("inf") if number == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(map(torch.equal, before, module.parameters())) == (number == 1)
    assert scaler.get_scale() == 512.0


class Model(nn.Module):
    def __init__(self, lstm: fusedreg.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        output: Tensor = self.lstm(input, lengths=lengths)[0]
        return output


def test_a_package_compiled_ahead_of_time(backend: Target, tmp_path: Path) -> None:
    """For the CUDA kernels, whose operators are in a built file; Triton's are Python functions."""
    if backend.backend != "cuda":
        pytest.skip("not run: Triton's operators need Python")
    torch.manual_seed(0)
    lstm = fusedreg.LSTM(24, 72, 2, zoneout_cell=0.2, backend=name_of(backend), device=DEVICE)
    model, steps, rows = Model(lstm.eval()), torch.export.Dim("steps", min=2), torch.export.Dim("rows", min=2)
    lengths = torch.full((20,), 7, device=DEVICE)
    program = torch.export.export(model, (inputs(), lengths), dynamic_shapes=({0: steps, 1: rows}, {0: rows}))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for shape in ((9, 5), (30, 33)):
        x, own = inputs(*shape), torch.full((shape[1],), 6, device=DEVICE)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x, own), model(x, own))
