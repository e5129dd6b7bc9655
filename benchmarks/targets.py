"""What the project is to reach, on a CPU and on a GPU, evaluated on the results of a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.results import Results, find, ratios


@dataclass(frozen=True)
class Target:
    """One thing a preset is to reach, and what it did reach. ``met`` is ``None`` where it was not measured."""

    name: str
    bound: float
    at_most: bool
    value: float | None
    detail: str

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def _target(
    name: str,
    bound: float,
    values: dict[str, float],
    reduce: Callable[[Iterable[float]], float],
    at_most: bool = True,
    every: bool = False,
) -> Target:
    if not values:
        return Target(name, bound, at_most, None, "not measured")
    worst = (max if at_most else min)(values, key=lambda key: values[key])
    detail = f"worst {worst}: {values[worst]:.2f}"
    if every:
        detail = "; ".join(f"{key}: {value:.2f}" for key, value in values.items())
    return Target(name, bound, at_most, reduce(values.values()), detail)


def cpu_targets(results: Results) -> list[Target]:
    """The project's targets for a CPU, evaluated on ``results``."""
    inference = ratios(results, "plain", "nn.LSTM", "inference")
    training = ratios(results, "plain", "nn.LSTM", "training")
    everything = ratios(results, "all", "nn.LSTM", "training")
    normalized = ratios(results, "all + batch norm", "nn.LSTM", "training")
    eager = ratios(results, "eager all", "all", "training")
    single = {case["name"] for case in results["cases"] if case["batch_size"] == 1}

    def only(values: dict[str, float], names: set[str]) -> dict[str, float]:
        return {name: value for name, value in values.items() if name.partition(",")[0] in names}

    alone = {f"{name}, inference": value for name, value in only(inference, single).items()}
    alone |= {f"{name}, forward + backward": value for name, value in only(training, single).items()}
    peaks, saved = {}, {}
    for case in results["cases"]:
        measured = {name: value for name, value in case["memory"].items() if value["status"] == "ok"}
        if {"plain", "nn.LSTM"} <= measured.keys() and measured["nn.LSTM"]["peak_bytes"] > 0:
            peaks[case["name"]] = measured["plain"]["peak_bytes"] / measured["nn.LSTM"]["peak_bytes"]
        if {"plain", "recompute"} <= measured.keys() and measured["plain"]["saved_bytes"] > 0:
            saved[case["name"]] = measured["recompute"]["saved_bytes"] / measured["plain"]["saved_bytes"]
    loop = {row["case"]: row["fraction"] for row in results["rates"]["loop"] if row["fraction"] is not None}
    median = statistics.median
    return [
        _target("plain / nn.LSTM, inference, median", 0.82, inference, median),
        _target("plain / nn.LSTM, inference, worst case", 1.0, inference, max),
        _target("plain / nn.LSTM, forward + backward, median", 0.80, training, median),
        _target("plain / nn.LSTM, forward + backward, worst case", 1.0, training, max),
        _target("plain / nn.LSTM, B = 1, worst case", 0.65, alone, max, every=True),
        _target("all / plain nn.LSTM, forward + backward, median", 0.88, everything, median),
        _target("all / plain nn.LSTM, forward + backward, worst case", 1.0, everything, max),
        _target("all + batch norm / plain nn.LSTM, forward + backward, median", 1.05, normalized, median),
        _target("eager loop / all, forward + backward, median", 1.8, eager, median, at_most=False),
        _target("eager loop / all, B = 1, worst case", 7.0, only(eager, single), min, at_most=False, every=True),
        _target("peak memory, plain / nn.LSTM, worst case", 1.0, peaks, max),
        _target("saved bytes, recompute / default, worst case", 0.5, saved, max),
        _target("the loop alone, forward, fraction of the FMA rate, worst case", 0.8, loop, min, False, every=True),
    ]


def call_targets(results: Results) -> list[Target]:
    """What a call of a tiny model may cost, evaluated on ``results``."""
    inference = ratios(results, "plain", "nn.LSTM", "inference")
    training = ratios(results, "plain", "nn.LSTM", "training")
    return [
        _target("plain / nn.LSTM, T = B = 1, H = 16, inference", 0.5, inference, max, every=True),
        _target("plain / nn.LSTM, T = B = 1, H = 16, forward + backward", 1.0, training, max, every=True),
    ]


def _of(
    results: Results, column: tuple[str, str, str], dtype: str, fits: Callable[[dict[str, Any]], bool]
) -> dict[str, float]:
    """The ratios of one comparison in one dtype, by case, where the case ``fits``."""
    found = {}
    for case in results["cases"]:
        row = find(case, *column)
        if case["dtype"] == dtype and fits(case) and row is not None and "ratio" in row:
            found[case["name"]] = row["ratio"]
    return found


def _milliseconds(results: Results, name: str, dtype: str, column: tuple[str, str, str]) -> dict[str, float]:
    """The time of one comparison's variant in one case, by the case's name."""
    for case in results["cases"]:
        row = find(case, *column)
        if (case["name"], case["dtype"]) == (name, dtype) and row is not None and "ratio" in row:
            return {name: row["milliseconds"]}
    return {}


def gpu_targets(results: Results) -> list[Target]:
    """The project's targets for an H200, evaluated on ``results``: the worst case of each."""
    training, plain = ("all", "nn.LSTM", "training"), ("all", "plain", "training")
    found = []
    for low, high, bound in ((1, 32, 0.3), (64, 128, 0.6), (129, 10**9, 1.0)):

        def fits(case: dict[str, Any], low: int = low, high: int = high) -> bool:
            return 256 <= case["hidden_size"] <= 1024 and low <= case["batch_size"] <= high

        rows = f"B {low} to {high}" if high < 10**9 else f"B from {low}"
        values = _of(results, training, "bfloat16", fits)
        found.append(_target(f"all / nn.LSTM, bfloat16, H 256 to 1024, {rows}", bound, values, max, every=True))
    everything = lambda case: True  # noqa: E731
    persistent = _of(results, training, "float16", lambda case: case["name"] == "flashrnn")
    normalized = _of(results, ("batch norm", "plain", "training"), "bfloat16", everything)
    eager = _of(results, ("eager all", "all", "training"), "bfloat16", everything)
    in_range = lambda case: 128 <= case["hidden_size"] <= 1024  # noqa: E731
    triton = _of(results, ("triton all", "nn.LSTM", "training"), "bfloat16", in_range)
    peer = _of(results, ("triton plain", "TorchRL's Triton LSTM", "training"), "bfloat16", everything)
    peer = {name: value for name, value in peer.items() if name == "rl"}
    forward = _milliseconds(results, "flashrnn", "bfloat16", ("all", "nn.LSTM", "inference"))
    both = _milliseconds(results, "flashrnn", "bfloat16", training)
    return [
        *found,
        _target("all / plain, forward + backward, bfloat16", 1.05, _of(results, plain, "bfloat16", everything), max),
        _target("all / nn.LSTM's persistent float16 kernel, flashrnn", 1.0, persistent, max),
        _target("batch norm of all terms / plain, bfloat16", 1.2, normalized, max),
        _target("eager loop / all, bfloat16", 30.0, eager, min, at_most=False),
        _target("flashrnn, all, bfloat16, forward, ms", 1.5, forward, max),
        _target("flashrnn, all, bfloat16, forward + backward, ms", 4.0, both, max),
        _target("triton all / nn.LSTM, bfloat16, H 128 to 1024", 1.0, triton, max, every=True),
        _target("triton plain / TorchRL's Triton LSTM, rl, bfloat16", 1.0, peer, max),
    ]


def targets(results: Results) -> list[Target]:
    """The targets of the preset, or of the device that ``results`` were measured on."""
    if results["preset"] == "cpu-calls":
        return call_targets(results)
    return cpu_targets(results) if results["machine"]["device_type"] == "cpu" else gpu_targets(results)


def targets_record(results: Results) -> list[dict[str, Any]]:
    """The targets as they stand in the file."""
    return [{**asdict(target), "met": target.met} for target in targets(results)]
