"""Checks that need a compiler or an exporter: one program for all types, since tracing is what takes the time."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedreg
from benchmarks.support.checks import TOLERANCES, close, values
from benchmarks.support.places import Place


class Several(nn.Module):
    """An LSTM for each type, side by side."""

    def __init__(self, place: Place, types: Sequence[torch.dtype], **options: Any) -> None:
        super().__init__()
        self.lstms = nn.ModuleList(place.module(dtype=dtype, **options) for dtype in types)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [lstm(input)[0] for lstm, input in zip(self.lstms, inputs, strict=True)]


class SeveralSeeded(Several):
    """The same in training, under one seed."""

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [lstm(input, seed=3)[0] for lstm, input in zip(self.lstms, inputs, strict=True)]


def compiling(place: Place, types: Sequence[torch.dtype]) -> None:
    """One graph for two lengths, forward and backward."""
    import torch._dynamo

    unrolled = place.backend == "reference"  # a length, a graph
    model = SeveralSeeded(place, types, zoneout_cell=0.2, hidden_dropout=0.3)
    leaves = list(model.parameters())
    torch._dynamo.reset()
    compiler = "eager" if unrolled else "aot_eager"
    whole = torch.compile(model, backend=compiler, fullgraph=True, dynamic=not unrolled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (2,) if unrolled else (5, 6):
            inputs = [values(place, dtype, steps, 2, 3) for dtype in types]
            results = whole(*inputs), model(*inputs)
            for found, right in zip(*results, strict=True):
                close([found], [right], TOLERANCES[right.dtype])
            losses = [torch.stack([one.double().square().sum() for one in result]).sum() for result in results]
            gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
            for found, right in zip(*gradients, strict=True):
                close([found], [right], TOLERANCES[right.dtype])
    torch._dynamo.reset()


def exporting(place: Place, types: Sequence[torch.dtype]) -> None:
    """torch.export in evaluation, with a dynamic length where the loop is not unrolled."""
    model = Several(place, types, zoneout_cell=0.2).eval()
    unrolled = place.backend == "reference"
    axes: Any = {} if unrolled else {0: torch.export.Dim("steps", min=2, max=50)}
    inputs = tuple(values(place, dtype, 4, 2, 3) for dtype in types)
    program = torch.export.export(model, inputs, dynamic_shapes={"inputs": tuple(axes for _ in types)})
    longer = [values(place, dtype, 4 if unrolled else 6, 2, 3) for dtype in types]
    for dtype, found, right in zip(types, program.module()(*longer), model(*longer), strict=True):
        close([found], [right], TOLERANCES[dtype])


def onnx(place: Place, types: Sequence[torch.dtype]) -> None:
    """ONNX in evaluation, run by onnxruntime."""
    import onnxruntime

    import fusedreg.onnx

    model = Several(place, types, zoneout_cell=0.2).eval()
    inputs = tuple(values(place, dtype, 4, 2, 3) for dtype in types)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder, "model.onnx"))
        exported: Any = torch.onnx.export(
            model, inputs, dynamo=True, verbose=False, custom_translation_table=fusedreg.onnx.translations()
        )
        exported.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        results = session.run(None, dict(zip(names, (one.numpy() for one in inputs), strict=True)))
    for dtype, found, right in zip(types, results, model(*inputs), strict=True):
        close([torch.from_numpy(found)], [right], TOLERANCES[dtype])


def refusals(place: Place, types: Sequence[torch.dtype]) -> None:
    """TorchScript and dynamic quantisation raise, and the errors name the remedy; the last of them goes on."""
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

    model = nn.Sequential(place.module(dtype=types[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.jit.script(model)
        except RuntimeError as error:
            if "to_torch()" not in str(error):
                raise
        quantize_dynamic(model, {fusedreg.LSTM: default_dynamic_qconfig})
