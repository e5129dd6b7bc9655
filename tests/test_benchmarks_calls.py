"""The benchmark of tiny calls: what is measured, and what it is to reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import run, targets
from benchmarks.presets import PRESETS
from benchmarks.registry import PLAIN, TORCH
from benchmarks.variants import make_inputs, make_runnable

PRESET = PRESETS["cpu-calls"]


def test_with_states_and_without_and_both_ways() -> None:
    assert PRESET.threads == 1
    assert [one.name for one in PRESET.comparisons] == ["plain / nn.LSTM, inference", "plain / nn.LSTM, training"]
    for case, with_states in zip(PRESET.cases, (False, True), strict=True):
        assert (case.steps, case.batch_size, case.input_size, case.hidden_size) == (1, 1, 16, 16)
        inputs = make_inputs(case, "cpu", torch.float32)
        outputs = [
            make_runnable(variant, case, inputs, "inference", backend="reference").output()
            for variant in (PLAIN, TORCH)
        ]
        torch.testing.assert_close(*outputs)
        bare = make_runnable(TORCH, case, replace(inputs, state=None), "inference").output()
        assert torch.equal(bare, outputs[1]) != with_states
        exact = inputs.double()
        assert exact.values.dtype == torch.float64
        assert (exact.state is not None) == with_states


def test_the_presets_threads_are_set_unless_others_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(run, "measure", lambda *given, **named: (_ for _ in ()).throw(KeyboardInterrupt))
    for arguments in ([], ["--threads", "3"]):
        with pytest.raises(KeyboardInterrupt):
            run.main(["--preset", "cpu-calls", *arguments])
    assert asked == [1, 3]


def test_targets() -> None:
    def case(name: str, inference: float, training: float) -> dict[str, Any]:
        rows = [("inference", inference), ("training", training)]
        each = {"variant": "plain", "against": "nn.LSTM", "status": "ok"}
        return {
            "name": name,
            "dtype": "float32",
            "comparisons": [{**each, "mode": mode, "ratio": ratio} for mode, ratio in rows],
        }

    found: Any = {"preset": "cpu-calls", "cases": [case("tiny", 0.4, 0.6), case("tiny-states", 0.51, 0.7)]}
    inference, training = targets.targets(found)
    assert (inference.value, inference.met) == (0.51, False)
    assert (training.value, training.met) == (0.7, True)
