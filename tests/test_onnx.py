"""ONNX export: both sides run, with other numbers of steps and rows than were exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor, nn

import fusedreg
import fusedreg.onnx
from fusedreg.encoding import NUMBER_OF_TENSORS, SAVE_NOTHING, encode_options

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    compiled,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the exporter's and its packages' own
]


class Program(nn.Module):
    """An LSTM with everything optional that a graph can have as an input."""

    def __init__(self, cells: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fusedreg.LSTM(3, 4, **options)
        self.cells = cells
        for name, buffer in self.lstm.named_buffers():  # as after some training
            if "var" in name:
                buffer.uniform_(0.5, 2.0)
            elif "mean" in name:
                buffer.normal_()
            else:
                buffer[1:4] = 3
        self.eval()

    def forward(
        self, input: Tensor, lengths: Tensor | None = None, reset: Tensor | None = None, h: Any = None, c: Any = None
    ) -> tuple[Tensor, ...]:
        state = None if h is None else (h, c)
        output, (h_n, c_n), *rest = self.lstm(input, state, lengths=lengths, reset=reset, return_cell_states=self.cells)
        return (output, h_n, c_n, *rest)


def arguments(program: Program, given: set[str], steps: int, rows: int, seed: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    dtype = program.lstm.weight_ih_l0.dtype
    states = program.lstm.num_layers * program.lstm.num_directions
    lengths = torch.randint(0, steps + 1, (rows,), generator=generator)
    lengths[0] = 0
    input = torch.randn(steps, rows, 3, generator=generator, dtype=dtype)  # type: ignore[arg-type]
    if "lengths" in given:
        input[torch.arange(steps)[:, None] >= lengths] = float("nan")
    return {
        "input": input,
        "lengths": lengths if "lengths" in given else None,
        "reset": torch.rand(steps, rows, generator=generator) < 0.3 if "reset" in given else None,
        "h": torch.randn(states, rows, program.lstm.proj_size or 4, generator=generator, dtype=dtype)  # type: ignore[arg-type]
        if "state" in given
        else None,
        "c": torch.randn(states, rows, 4, generator=generator, dtype=dtype) if "state" in given else None,  # type: ignore[arg-type]
    }


def export(program: Program, given: set[str], path: Path) -> Any:
    axes = {"input": {0: "T", 1: "B"}, "lengths": {0: "B"}, "reset": {0: "T", 1: "B"}, "h": {1: "B"}, "c": {1: "B"}}
    example = arguments(program, given, 5, 2, 0)
    exported: Any = torch.onnx.export(
        program,
        (),
        kwargs=example,
        dynamo=True,
        verbose=False,
        dynamic_shapes={name: axes[name] if value is not None else None for name, value in example.items()},
        custom_translation_table=fusedreg.onnx.translations(),
    )
    exported.save(str(path))
    return [node.op_type for node in exported.model.graph]


CASES: dict[str, tuple[set[str], dict[str, Any], dict[str, int]]] = {
    "plain": (set(), {"num_layers": 2, "bidirectional": True}, {"LSTM": 4}),
    "acts in training only": (set(), {"hidden_dropout": 0.3, "weight_dropout": 0.5, "bias": False}, {"LSTM": 1}),
    "lengths": ({"lengths", "state"}, {"bidirectional": True}, {"LSTM": 2}),
    "float64": ({"lengths"}, {"dtype": torch.float64, "zoneout_cell": 0.1}, {"Loop": 1}),
    "zoneout": (
        {"lengths", "state"},
        {"zoneout_cell": 0.2, "zoneout_hidden": 0.1, "cell_dropout": 0.3, "bidirectional": True},
        {"Loop": 2},
    ),
    "projection": ({"lengths", "state"}, {"proj_size": 3, "num_layers": 2, "bidirectional": True}, {"Loop": 4}),
    "projection and norm": (set(), {"proj_size": 2, "norm": fusedreg.LayerNorm(), "zoneout_hidden": 0.2}, {"Loop": 1}),
    "resets and cells": (
        {"reset", "lengths"},
        {"cells": True, "zoneout_output": "candidate", "zoneout_hidden": 0.2},
        {"Loop": 1},
    ),
    "layer norm": (set(), {"norm": fusedreg.LayerNorm(), "num_layers": 2}, {"Loop": 2}),
    "layer norm of the cell": (set(), {"norm": fusedreg.LayerNorm(input=False, recurrent=False)}, {"Loop": 1}),
    "batch norm": ({"lengths"}, {"norm": fusedreg.BatchNorm(max_steps=6), "bidirectional": True}, {"Loop": 2}),
    "batch norm, one set": (
        {"reset"},
        {"norm": fusedreg.BatchNorm(statistics="shared", input_statistics="sequence")},
        {"Loop": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_sides_compute_the_same(name: str, tmp_path: Path) -> None:
    given, options, nodes = CASES[name]
    program = Program(**options)
    found = export(program, given, tmp_path / "model.onnx")
    assert {kind: found.count(kind) for kind in ("LSTM", "Loop") if kind in found} == nodes
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for steps, rows in ((5, 2), (9, 4), (1, 1)):
        values = arguments(program, given, steps, rows, seed=steps)
        feed = {key: value.numpy() for key, value in values.items() if value is not None}
        with torch.no_grad():
            expected = program(**values)
        results = session.run(None, feed)
        for result, value in zip(results, expected, strict=True):
            tolerance = 1e-12 if value.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(torch.from_numpy(result), value, rtol=tolerance, atol=tolerance)


class Ensemble(nn.Module):
    """Two models over one input, by the operator itself: torch does not export a ``vmap`` of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        models = [fusedreg.LSTM(3, 4, **options).eval() for _ in range(2)]
        self.weights, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]
        self.encoded = encode_options(models[0].regularization.layer_options(0, 1, 0, training=False), SAVE_NOTHING)

    def forward(self, input: Tensor) -> Tensor:
        tensors = [input.expand(2, *input.shape), *(value.detach() for value in self.weights.values())]
        absent = [None] * (NUMBER_OF_TENSORS - len(tensors))
        return torch.ops.fusedreg.lstm_layer_forward(*tensors, *absent, *self.encoded)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("options", "kind"), [({}, "LSTM"), ({"zoneout_cell": 0.3}, "Loop")])
def test_an_ensemble_is_a_node_a_model(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    ensemble, path = Ensemble(**options), tmp_path / "model.onnx"
    exported: Any = torch.onnx.export(
        ensemble,
        (torch.randn(5, 2, 3),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: "T", 1: "B"},),
        custom_translation_table=fusedreg.onnx.translations(),
    )
    exported.save(str(path))
    assert [node.op_type for node in exported.model.graph].count(kind) == 2
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    input = torch.randn(7, 3, 3)
    (result,) = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), ensemble(input), rtol=1e-5, atol=1e-5)


def refusal(error: BaseException) -> str:
    """What all errors of the chain say: torch.onnx wraps ours."""
    said = ""
    link: BaseException | None = error
    while link is not None:
        said += str(link)
        link = link.__cause__
    return said


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError) as training:
        export(Program(zoneout_cell=0.3).train(), set(), tmp_path / "model.onnx")
    assert "expected a model in evaluation mode" in refusal(training.value)
    with pytest.raises(torch.onnx.OnnxExporterError) as narrow:
        export(Program(dtype=torch.bfloat16), set(), tmp_path / "model.onnx")
    assert "expected float32 or float64, got BFLOAT16" in refusal(narrow.value)


def test_nothing_is_reported_when_the_loop_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """onnxscript reports what it does not understand on the way, and goes on."""
    import importlib

    from fusedreg.onnx import functions

    importlib.reload(functions)
    assert caplog.messages == []
