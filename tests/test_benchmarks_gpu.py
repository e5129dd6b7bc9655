"""The benchmark suite's side of a GPU, as far as it runs without one: data, ceilings, floors, targets, time limits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks need rich: pip install rich")

from benchmarks import ceilings, measure, results, run, tables, targets
from benchmarks.presets import GPU, GPU_QUICK, PRESETS, SWEEP, SWEEP_CASES, Comparison, select_cases
from benchmarks.registry import (
    ALL,
    CASES,
    COMPILED_ALL,
    EAGER_ALL,
    PLAIN,
    TIERS,
    TORCH,
    TORCHRL,
    TRITON_ALL,
    TRITON_PLAIN,
    Case,
    Variant,
)
from benchmarks.variants import Unavailable, chosen_backend, forced_tier, make_inputs, make_runnable

BY_NAME = {case.name: case for case in CASES}


def test_presets_for_a_gpu() -> None:
    full, quick, sweep = (PRESETS[name] for name in ("gpu", "gpu-quick", "gpu-sweep"))
    assert {preset.device for preset in (full, quick, sweep)} == {"cuda"}
    assert {preset.size for preset in (full, quick, sweep)} == {"full"}
    assert full.cases == CASES and set(full.dtypes) == {"float16", "bfloat16", "float32", "tf32"}
    assert all(one in GPU for one in GPU_QUICK)
    assert len({one.name for one in GPU}) == len(GPU)
    for comparison in (
        Comparison(ALL, TORCH, "inference"),
        Comparison(TRITON_ALL, TORCH, "training"),
        Comparison(TRITON_PLAIN, TORCHRL, "training"),
        Comparison(EAGER_ALL, ALL, "training"),
        Comparison(COMPILED_ALL, ALL, "training"),
    ):
        assert comparison in GPU
    assert {one.variant.tier for one in SWEEP} == {"", "cluster", "grid", "step"}


def test_the_sweep_spans_the_sizes() -> None:
    names = [case.name for case in SWEEP_CASES]
    assert len(set(names)) == len(names)
    for pick, low, high in (("hidden_size", 64, 4096), ("batch_size", 1, 512), ("steps", 1, 16384)):
        values = {getattr(case, pick) for case in SWEEP_CASES}
        assert (min(values), max(values)) == (low, high)
    line = select_cases("T128-B64-*, T1-*", SWEEP_CASES)
    assert {case.steps for case in line} == {128, 1}
    with pytest.raises(ValueError, match="unknown case 'flashrnn'"):
        select_cases("flashrnn", SWEEP_CASES)


def test_the_backend_is_the_variants_before_the_runs() -> None:
    assert chosen_backend(TRITON_ALL, "cuda", "cuda:0") == "triton"
    assert chosen_backend(ALL, "triton", "cuda:0") == "triton"
    assert chosen_backend(ALL, "", "cuda:0") == "cuda"


def test_what_is_missing_is_unavailable_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["rl"].sized("tiny")
    inputs = make_inputs(case, "cpu", torch.float32)
    monkeypatch.setitem(__import__("sys").modules, "torchrl", None)
    with pytest.raises(Unavailable, match="TorchRL's Triton LSTM cannot be used here"):
        make_runnable(TORCHRL, case, inputs, "training")
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="'cuda' cannot be used here"):
            make_runnable(TIERS[0], case, inputs, "training")
    assert TORCHRL.impossible(BY_NAME["speech"]) == "TorchRL's kernels run in one direction"


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pretended choice of tiers: what was set, in order."""
    asked: list[str] = []

    def set_tier(name: str) -> bool:
        asked.append(name)
        return name != "tower"

    monkeypatch.setattr(torch.ops.fusedreg, "_set_cuda_tier", set_tier, raising=False)
    return asked


def test_a_tier_is_forced_for_its_own_calls_only(tiers: list[str]) -> None:
    case = BY_NAME["small"].sized("tiny")
    variant = Variant("all, grid tier", "fusedreg", ALL.rates, backend="reference", tier="grid")
    runnable = make_runnable(variant, case, make_inputs(case, "cpu", torch.float32), "training")
    runnable.run("training")
    assert tiers == ["grid", "auto"]
    with pytest.raises(Unavailable, match=r"tier: .* does not fit"), forced_tier("grid"):
        raise RuntimeError("fusedreg::lstm_layer_forward: tier: grid does not fit")
    with pytest.raises(RuntimeError, match="out of memory"), forced_tier("grid"):
        raise RuntimeError("out of memory")
    assert tiers[-1] == "auto"
    with pytest.raises(Unavailable, match="no tier 'tower'"), forced_tier("tower"):
        pass


def test_precisions() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with ceilings.precision("tf32") as dtype:
        assert dtype is torch.float32
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    with ceilings.precision("float32") as dtype:
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    with ceilings.precision("bfloat16") as dtype:
        assert dtype is torch.bfloat16


@pytest.fixture(scope="module")
def device_rates() -> dict[str, Any]:
    return ceilings.measure("cpu", copy_bytes=2**16, size=32)


def test_ceilings_are_measured(device_rates: dict[str, Any]) -> None:
    assert set(device_rates["matrix_teraflops"]) == set(ceilings.TYPES)
    assert all(rate > 0 for rate in device_rates["matrix_teraflops"].values())
    assert device_rates["copy_gigabytes_per_second"] > 0
    assert device_rates["launch_microseconds"] > 0


def test_floors() -> None:
    rates = {"matrix_teraflops": {"bfloat16": 1.0}, "copy_gigabytes_per_second": 1.0}
    case = Case("x", "", steps=10, batch_size=100, input_size=50, hidden_size=50)
    # 8 T B H (I + H) operations against 2 bytes for each of T B (I + H) values and 4 H (I + H) weights.
    assert ceilings.bytes_moved(case, "inference", 2) == 2 * (10 * 100 * 100 + 4 * 50 * 100)
    assert ceilings.floor_seconds(case, "inference", "bfloat16", rates) == pytest.approx(240_000 / 1e9)
    rates["copy_gigabytes_per_second"] = 1e9
    assert ceilings.floor_seconds(case, "training", "bfloat16", rates) == pytest.approx(3 * 4e7 / 1e12)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> results.Results:
    """A run on the CPU, dressed up as a GPU's."""
    path = tmp_path_factory.mktemp("gpu") / "results.json"
    arguments = ["--preset", "tiny", "--backend", "reference", "--cases", "rl,small", "--no-memory"]
    assert run.main([*arguments, "--json", str(path)]) == 0
    content = results.load(path)
    content["machine"]["device_type"] = "cuda"
    content["rates"] = {
        "fma": {"one_thread": None, "all_threads": None},
        "loop": [],
        "device": ceilings.measure("cpu", copy_bytes=2**16, size=32),
    }
    return content


def test_the_floor_table(found: results.Results) -> None:
    table = tables.floor_table(found)
    assert [row[0] for row in table.rows] == ["rl, float32", "small, float32"]
    assert all(float(cell) > 0 for row in table.rows for cell in row[1:])
    assert "TFLOP/s" in table.note
    from benchmarks.report import markdown

    assert "Time over the floor" in markdown(found)


def test_gpu_targets(found: results.Results) -> None:
    content = copy.deepcopy(found)
    content["cases"] = [content["cases"][1]]
    case = content["cases"][0]
    case |= {"name": "flashrnn", "dtype": "bfloat16", "hidden_size": 768, "batch_size": 16}
    for row in case["comparisons"]:
        row |= {"ratio": 0.25, "milliseconds": 3.5}
    case["comparisons"].append(
        {**results.find(case, "all", "nn.LSTM", "training"), "mode": "inference", "milliseconds": 1.75}  # type: ignore[dict-item]
    )
    verdicts = {target.name: (target.value, target.met) for target in targets.targets(content)}
    assert verdicts["all / nn.LSTM, bfloat16, H 256 to 1024, B 1 to 32"] == (0.25, True)
    assert verdicts["all / nn.LSTM, bfloat16, H 256 to 1024, B 64 to 128"] == (None, None)
    assert verdicts["flashrnn, all, bfloat16, forward, ms"] == (1.75, False)
    assert verdicts["flashrnn, all, bfloat16, forward + backward, ms"] == (3.5, True)
    assert verdicts["eager loop / all, bfloat16"] == (0.25, False)
    assert verdicts["all / nn.LSTM's persistent float16 kernel, flashrnn"] == (None, None)
    assert verdicts["triton all / nn.LSTM, bfloat16, H 128 to 1024"] == (None, None)


def test_a_limit_of_time_leaves_cases_out_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 50))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(clock)))
    path = tmp_path / "run.json"
    arguments = ["--preset", "tiny", "--backend", "reference", "--cases", "act,small,rl", "--no-memory", "--minutes"]
    assert run.main([*arguments, "1.5", "--json", str(path)]) == 0
    content = results.load(path)
    assert [case["name"] for case in content["cases"]] == ["act"]
    assert content["left_out"] == ["small, float32", "rl, float32"]


def test_dtypes_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run._dtypes("float16, tf32", PRESETS["gpu"]) == ("float16", "tf32")
    assert run._dtypes(None, PRESETS["gpu-sweep"]) == ("bfloat16",)
    assert run.main(["--preset", "tiny", "--dtypes", "float8"]) == 2
    assert "unknown dtype 'float8'" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: there is a CUDA device")
def test_a_gpu_preset_without_a_gpu_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--preset", "gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out


def test_16_bit_cases_are_checked_and_timed() -> None:
    preset = replace(
        PRESETS["tiny"], backend="reference", memory=False, comparisons=(Comparison(PLAIN, TORCH, "training"),)
    )
    record = measure.measure_case(BY_NAME["small"], preset, "bfloat16", lambda _: None)
    assert record["comparisons"][0]["status"] == "ok"
