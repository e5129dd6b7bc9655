"""The benchmark suite itself: its data, its baseline's numbers, its rules, and smoke runs that take seconds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusedreg

pytest.importorskip("rich", reason="the benchmarks need rich: pip install rich")

from benchmarks import character_model, checks, machine, measure, memory, report, results, run, tables, targets
from benchmarks.eager import EagerLSTM
from benchmarks.presets import PRESETS, QUICK, Comparison, select_cases
from benchmarks.registry import (
    ALL,
    ALL_NORM,
    CASES,
    EAGER_ALL,
    EAGER_ALL_NORM,
    EAGER_PLAIN,
    PLAIN,
    RECOMPUTE,
    SINGLE,
    TORCH,
    Case,
    Variant,
)
from benchmarks.timing import prepare, spread, time_pair
from benchmarks.variants import Unavailable, make_inputs, make_module, make_runnable

BY_NAME = {case.name: case for case in CASES}
VARIANTS = (TORCH, PLAIN, ALL, ALL_NORM, RECOMPUTE, EAGER_PLAIN, EAGER_ALL, EAGER_ALL_NORM, *SINGLE)


# The kernels where they are built, so that the whole path is run as it will be.
BACKEND = "cpu" if fusedreg.backends.availability("cpu") else "reference"


def tiny(name: str) -> Case:
    return BY_NAME[name].sized("tiny")


# The registry


def test_cases_are_the_promised_ones() -> None:
    promised = {
        "flashrnn": (1024, 16, 768, 1),
        "awd": (70, 80, 1152, 1),
        "zaremba-large": (35, 20, 1500, 2),
        "speech": (512, 32, 512, 1),
        "pmnist": (784, 128, 100, 1),
        "rl": (128, 256, 256, 1),
        "act": (1, 1, 256, 1),
        "bn-charptb": (100, 64, 1000, 1),
        "small": (100, 64, 256, 1),
        "large": (256, 64, 2048, 1),
    }
    assert len(BY_NAME) == len(CASES)
    for name, sizes in promised.items():
        case = BY_NAME[name]
        assert (case.steps, case.batch_size, case.hidden_size, case.num_layers) == sizes
        assert len(case.source) > 20
    assert BY_NAME["speech"].bidirectional
    assert BY_NAME["rl"].reset_rate > 0
    assert BY_NAME["awd"].input_size == 400


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_short_sizes_cut_steps_and_rows_only(case: Case) -> None:
    short = case.sized("short")
    assert short.steps <= case.steps
    assert short.batch_size <= case.batch_size
    assert replace(short, steps=case.steps, batch_size=case.batch_size) == case
    assert not (case.bidirectional and case.reset_rate), "resets have no meaning in two directions"


def test_flops_count_both_products() -> None:
    case = Case("x", "", steps=3, batch_size=5, input_size=7, hidden_size=11, num_layers=2, bidirectional=True)
    first, second = 2 * 3 * 5 * 44 * (7 + 11), 2 * 3 * 5 * 44 * (22 + 11)
    assert case.forward_flops == 2 * (first + second)
    assert case.flops("training") == 3 * case.flops("inference")


def test_quick_preset_has_the_columns_that_targets_need() -> None:
    names = {comparison.name for comparison in PRESETS["cpu"].comparisons}
    assert names == {comparison.name for comparison in QUICK}
    assert {"plain / nn.LSTM, inference", "plain / nn.LSTM, training", "eager all / all, training"} <= names
    for preset in PRESETS.values():
        assert len({comparison.name for comparison in preset.comparisons}) == len(preset.comparisons)
    rates = {rate for variant in SINGLE for rate in variant.rates}
    assert rates >= set(fusedreg.regularization.RATE_NAMES), "every regulariser has a column of its own"


def test_select_cases() -> None:
    assert select_cases(None) == list(CASES)
    assert [case.name for case in select_cases("act, small")] == ["act", "small"]
    with pytest.raises(ValueError, match=r"unknown case 'smal': expected some of flashrnn, awd"):
        select_cases("smal")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_runs(variant: Variant) -> None:
    case = replace(tiny("zaremba-large"), reset_rate=0.3)
    runnable = make_runnable(variant, case, make_inputs(case, "cpu", torch.float32), "training", backend="reference")
    assert checks.check_finite(runnable).passed
    runnable.module.eval()
    runnable.run("inference")


def test_impossible_variants_say_why() -> None:
    assert ALL_NORM.impossible(BY_NAME["act"]) == "batch norm needs two rows"
    assert SINGLE[0].impossible(BY_NAME["small"]) == "dropout between layers needs two layers"
    assert ALL.impossible(BY_NAME["act"]) is None


# The eager baseline


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_eager_is_nn_lstm_without_regularisers(layers: int, bidirectional: bool) -> None:
    torch.manual_seed(0)
    expected = nn.LSTM(5, 7, layers, bidirectional=bidirectional).double()
    eager = EagerLSTM(5, 7, layers, bidirectional=bidirectional).double()
    eager.load_state_dict(expected.state_dict())
    inputs = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(layers * (1 + bidirectional), 3, 7, dtype=torch.float64) for _ in range(2))
    ours, (hidden, cell) = eager(inputs, state)
    output, (last_hidden, last_cell) = expected(inputs, state)
    torch.testing.assert_close([ours, hidden, cell], [output, last_hidden, last_cell])
    grads = [
        torch.autograd.grad(one.square().sum(), [inputs, *module.parameters()])
        for one, module in ((ours, eager), (output, expected))
    ]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_eager_is_the_reference_without_masks(norm: Any, training: bool) -> None:
    torch.manual_seed(0)
    options = {"batch": fusedreg.BatchNorm(max_steps=6), "layer": fusedreg.LayerNorm(), None: None}[norm]
    # In evaluation zoneout is its expectation, which needs no mask.
    rates = {} if training else {"zoneout_hidden": 0.2, "zoneout_cell": 0.3}
    expected = fusedreg.LSTM(5, 7, 2, norm=options, backend="reference", **rates).double()
    eager = EagerLSTM(5, 7, 2, norm=norm, max_steps=6, **rates).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    inputs = torch.randn(6, 9, 5, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(6, 9) < 0.2
    expected(inputs.detach())  # moves the running statistics
    missing = eager.load_state_dict(expected.state_dict(), strict=False).missing_keys
    assert not missing
    for module in (expected, eager):
        module.train(training)
    ours, (hidden, cell) = eager(inputs, reset=reset)
    output, (last_hidden, last_cell) = expected(inputs, reset=reset)
    torch.testing.assert_close([ours, hidden, cell], [output, last_hidden, last_cell])
    parameters, names = dict(expected.named_parameters()), [name for name, _ in eager.named_parameters()]
    assert sorted(names) == sorted(parameters)
    wanted = torch.autograd.grad(output.square().sum(), [inputs, *(parameters[name] for name in names)])
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), [inputs, *eager.parameters()]), wanted)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(name), msg=name)


def test_eager_masks_have_their_rates() -> None:
    torch.manual_seed(0)
    lstm = EagerLSTM(3, 200, zoneout_hidden=0.3, output_dropout=0.4)
    output, _ = lstm(torch.randn(40, 50, 3))
    dropped = output == 0
    assert dropped.all(0).float().mean().item() == pytest.approx(0.4, abs=0.02)
    assert bool((dropped.all(0) == dropped[-1]).all()), "one mask a sequence"
    plain = EagerLSTM(3, 200, zoneout_hidden=0.3)
    output, _ = plain(torch.randn(40, 50, 3))
    assert (output[1:] == output[:-1]).float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(lstm.eval()(torch.ones(2, 1, 3))[0], lstm(torch.ones(2, 1, 3))[0])


@pytest.mark.compile
@pytest.mark.slow
def test_eager_step_compiles() -> None:
    case = replace(tiny("small"), reset_rate=0.3)
    compiled = make_runnable(
        Variant("compiled", "compiled", norm="batch"), case, make_inputs(case, "cpu", torch.float32), "training"
    )
    eager = make_runnable(
        Variant("eager", "eager", norm="batch"), case, make_inputs(case, "cpu", torch.float32), "training"
    )
    torch.testing.assert_close(compiled.output(), eager.output())


# Timing


def test_spread_and_pairs() -> None:
    assert spread([3.0, 1.0, 2.0]).median == 2.0
    assert (spread([1.0, 2.0, 3.0]).lower, spread([1.0, 2.0, 3.0]).upper) == (1.5, 2.5)
    assert spread([4.0]).upper == 4.0
    with pytest.raises(ValueError, match="expected at least one value"):
        spread([])
    order: list[str] = []
    one, two = (prepare(lambda name=name: order.append(name), "cpu", 0.0) for name in "ab")
    order.clear()
    time_pair(one, two, "cpu", swap=False)
    time_pair(one, two, "cpu", swap=True)
    assert order == ["a", "b", "b", "a"]


# Wrong numbers have no speed


def test_a_wrong_case_reports_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(variant: Variant, case: Case, *, backend: str = "auto") -> nn.Module:
        module = make_module(variant, case, backend=backend)
        if variant.name == "plain":
            with torch.no_grad():
                next(module.parameters()).mul_(1.001)
        return module

    monkeypatch.setattr("benchmarks.variants.make_module", broken)
    preset = replace(
        PRESETS["tiny"], comparisons=(Comparison(PLAIN, TORCH, "training"),), memory=False, backend="reference"
    )
    record = measure.measure_case(BY_NAME["small"], preset, "float32", lambda _: None)
    (row,) = record["comparisons"]
    assert row["status"] == "wrong"
    assert "differs from nn.LSTM in float64: output" in row["reason"]
    assert "ratio" not in row


def test_a_failing_variant_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(variant: Variant, *arguments: Any) -> checks.Check:
        if variant.name == "all":
            raise RuntimeError("planted")
        return checks.Check(True, "")

    monkeypatch.setattr("benchmarks.measure.check", failing)
    preset = replace(PRESETS["tiny"], memory=False, backend="reference")
    record = measure.measure_case(BY_NAME["small"], preset, "float32", lambda _: None)
    by_name = {(row["variant"], row["mode"]): row for row in record["comparisons"]}
    assert by_name["plain", "training"]["status"] == "ok"
    assert by_name["all", "training"]["status"] == "failed"
    assert by_name["eager all", "training"]["reason"] == "all: RuntimeError: planted"


def test_a_wide_regularised_layer_is_checked_narrower() -> None:
    assert [checks.cut_width(size, 256) for size in (80, 256, 383, 384, 400, 1500, 2048)] == [
        80,
        256,
        383,
        256,
        272,
        348,
        256,
    ]
    assert checks.cut_width(2048, None) == 2048
    case = Case("x", "", steps=2, batch_size=2, input_size=3, hidden_size=400)
    assert checks.check_layer(ALL, case, "cpu", torch.float32, "reference", 256).detail.endswith(", at I3 H272")


def test_no_fallback_is_timed() -> None:
    with pytest.raises(Unavailable, match="no backend 'cuda:7'"):
        make_module(PLAIN, tiny("small"), backend="cuda:7")


# The command line, its files and its tables


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[results.Results, Path]:
    folder = tmp_path_factory.mktemp("benchmarks")
    path = folder / "results.json"
    arguments = ["--preset", "tiny", "--backend", BACKEND, "--cases", "rl,act", "--no-memory"]
    assert run.main([*arguments, "--json", str(path)]) == 0
    return results.load(path), path


def test_results_file(found: tuple[results.Results, Path]) -> None:
    content, path = found
    assert json.loads(path.read_text()) == content
    for key in ("device", "cpu", "threads", "versions", "commit", "date", "instruction_set"):
        assert content["machine"][key]
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert [case["name"] for case in content["cases"]] == ["rl", "act"]
    row = results.find(content["cases"][0], "plain", "nn.LSTM", "training")
    assert row is not None
    assert row["pairs"] == len(row["samples_milliseconds"]) == len(row["against_samples_milliseconds"]) == 2
    assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
    impossible = results.find(content["cases"][1], "all + batch norm", "nn.LSTM", "training")
    assert impossible is not None
    assert (impossible["status"], impossible["reason"]) == ("impossible", "batch norm needs two rows")
    assert {target["met"] for target in content["targets"]} <= {True, False, None}


def test_damaged_results_are_refused(found: tuple[results.Results, Path], tmp_path: Path) -> None:
    content = copy.deepcopy(found[0])
    content["cases"][0]["comparisons"][0]["status"] = "wrong"
    with pytest.raises(ValueError, match="a speed without a passed check"):
        results.validate(content)
    with pytest.raises(ValueError, match="format None is not 1"):
        results.validate({})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        results.load(tmp_path / "bad.json")
    assert run.main(["--preset", "tiny", "--base", str(tmp_path / "missing.json")]) == 2


def test_targets_take_medians_and_worst_cases(found: tuple[results.Results, Path]) -> None:
    content = copy.deepcopy(found[0])
    for case, ratio in zip(content["cases"], (0.5, 0.9), strict=True):
        for row in case["comparisons"]:
            if row["status"] == "ok":
                row["ratio"] = ratio
        case["memory"] = {
            "nn.LSTM": {"status": "ok", "peak_bytes": 100, "saved_bytes": 100},
            "plain": {"status": "ok", "peak_bytes": 90, "saved_bytes": 100},
            "recompute": {"status": "ok", "peak_bytes": 90, "saved_bytes": 60},
        }
    found_targets = {target.name: target for target in targets.targets(content)}
    assert found_targets["plain / nn.LSTM, forward + backward, median"].value == 0.7
    assert found_targets["plain / nn.LSTM, forward + backward, median"].met is True
    assert found_targets["plain / nn.LSTM, B = 1, worst case"].met is False
    assert (
        found_targets["plain / nn.LSTM, B = 1, worst case"].detail
        == "act, inference: 0.90; act, forward + backward: 0.90"
    )
    assert found_targets["eager loop / all, B = 1, worst case"].value == 0.9
    assert found_targets["peak memory, plain / nn.LSTM, worst case"].value == 0.9
    assert found_targets["saved bytes, recompute / default, worst case"].met is False
    assert found_targets["the loop alone, forward, fraction of the FMA rate, worst case"].met in (None, True, False)


def test_changes_against_a_base(found: tuple[results.Results, Path]) -> None:
    base, content = copy.deepcopy(found[0]), copy.deepcopy(found[0])
    row = results.find(content["cases"][0], "plain", "nn.LSTM", "training")
    assert row is not None
    row["ratio"] *= 2
    row["ratio_quartiles"] = [1e6, 2e6]
    changes = results.changes(base, content)
    (moved,) = [change for change in changes if change.factor != 1.0]
    assert moved.factor == pytest.approx(2.0)
    assert moved.significant
    assert tables.change_table(changes).rows[0][-1] == "+100% *"


def test_tables_have_titles_verdicts_and_the_floor(found: tuple[results.Results, Path]) -> None:
    content = copy.deepcopy(found[0])
    case = content["cases"][0]
    row = results.find(case, "plain", "nn.LSTM", "training")
    assert row is not None
    assert tables.losing_lines({**content, "cases": []}) == []
    row |= {"ratio": 1.25, "ratio_quartiles": [1.2, 1.3], "milliseconds": 5.0, "against_milliseconds": 4.0}
    case |= {"fma_gflops": 100.0, "forward_gflop": 0.1}
    assert tables.shares(content, case, "training") == pytest.approx((0.75, 0.6))
    assert tables.share_table(content).rows[0][-2:] == ["75%", "60%"]
    expected = "slower: rl, plain, forward + backward: 1.25 [1.20, 1.30]; nn.LSTM is at 75% of the FMA rate"
    content["targets"] = targets.targets_record(content)
    text = report.markdown(content)
    assert expected in tables.losing_lines(content)
    assert f"- {expected}" in text
    verdicts = [row[3] for row in tables.target_table(content).rows]
    assert set(verdicts) <= {"met", "missed", "not measured"}
    assert f"({verdicts.count('met')} of {len(verdicts)} met)" in text
    for number, line in enumerate(lines := text.splitlines()):
        if line.startswith("|---"):
            above = [one for one in lines[: number - 1] if one]
            assert any(one.startswith("**") for one in above[-2:]), f"no title above: {lines[number - 1]}"


def test_plots_and_markdown(found: tuple[results.Results, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import plot_ratios

    paths = plot_ratios(found[0], tmp_path)
    assert len(paths) == 2
    assert all(path.stat().st_size > 1000 for path in paths)
    text = report.markdown(found[0])
    assert "| rl |" in text
    assert "impossible" in text
    document = tmp_path / "README.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--update", str(document), str(found[1])]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    assert document.read_text().startswith("before\n")
    assert "old" not in document.read_text()
    with pytest.raises(ValueError, match="add both lines"):
        report.insert("nothing", "text")


def test_memory_in_a_child_process() -> None:
    case = replace(tiny("small"), steps=64, batch_size=32, hidden_size=128)
    result = memory.measure(EAGER_PLAIN, case, "cpu", torch.float32)
    gates = 4 * case.steps * case.batch_size * 4 * case.hidden_size
    assert gates < result.saved < 4 * gates
    assert result.saved / 2 < result.peak < 20 * result.saved
    with pytest.raises(Unavailable, match="no backend 'none'"):
        memory.measure(PLAIN, case, "cpu", torch.float32, "none")


def test_rates_are_measured_or_absent() -> None:
    rates = machine.fma_rates(0.01)
    assert set(rates) == {"one_thread", "all_threads"}
    assert all(rate is None or rate > 0.1 for rate in rates.values())
    assert (machine.fma_rate(0.01) is None) == (rates["all_threads"] is None)


def test_the_loop_alone_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    loop = machine.loop_rates([(4, 32, 64)], pairs=2)
    assert torch.get_num_threads() == threads
    if BACKEND == "cpu":
        assert {row["threads"] for row in loop} == {1, threads}
        assert all(0 < row["fraction"] < 2 for row in loop)
        assert all(row["gflops"] > 0 and row["fma_gflops"] > 0 for row in loop)
    monkeypatch.setattr("benchmarks.machine._private_operator", lambda name: None)
    assert machine.loop_rates([(4, 32, 64)]) == []


def test_a_run_can_end_with_the_character_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(character_model, "main", lambda arguments: called.append(arguments) or 0)
    arguments = ["--preset", "tiny", "--backend", "reference", "--cases", "act", "--no-memory"]
    assert run.main([*arguments, "--character-model", "--json", str(tmp_path / "run.json")]) == 0
    assert called == [["--device", "cpu", "--backend", "reference", "--json", f"{tmp_path}/run-character_model.json"]]
    assert PRESETS["cpu"].character_model
