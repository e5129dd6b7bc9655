"""Measures one case: checks the numbers, then times every comparison of a preset pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import memory
from benchmarks.ceilings import precision
from benchmarks.checks import Check, check, check_finite
from benchmarks.machine import fma_rate
from benchmarks.presets import Comparison, Preset
from benchmarks.registry import TRITON_PLAIN, Case, Mode, Variant
from benchmarks.timing import Contestant, prepare, spread, time_pair
from benchmarks.variants import Runnable, Unavailable, make_inputs, make_runnable

FMA_SECONDS = 0.02
Report = Callable[[str], None]


@dataclass
class Entry:
    """A variant in one mode: ready to be timed, or the status and reason why it is not."""

    status: str = "ok"
    reason: str = ""
    contestant: Contestant | None = None


@dataclass
class Samples:
    """The pairs of one comparison, in seconds a call."""

    comparison: Comparison
    variant: list[float] = field(default_factory=list)
    against: list[float] = field(default_factory=list)


class CaseMeasurement:
    """The state of measuring one case: what was built, checked, and timed so far."""

    def __init__(self, case: Case, preset: Preset, dtype: torch.dtype, report: Report) -> None:
        self.case, self.preset, self.dtype, self.report = case, preset, dtype, report
        self.inputs = make_inputs(case, preset.device, dtype)
        self.checks: dict[str, Check] = {}
        self.entries: dict[tuple[str, Mode], Entry] = {}
        self.fma_rates: list[float] = []
        # Where the run's own time goes.
        self.seconds = {"checks": 0.0, "preparation": 0.0, "pairs": 0.0}

    def _checked(self, variant: Variant) -> Check:
        if variant.name not in self.checks:
            self.report(f"checking {variant.name}")
            begin = time.perf_counter()
            preset = self.preset
            self.checks[variant.name] = check(
                variant, self.case, preset.device, self.dtype, preset.backend, preset.check_width
            )
            self.seconds["checks"] += time.perf_counter() - begin
        return self.checks[variant.name]

    def entry(self, variant: Variant, mode: Mode) -> Entry:
        """Build, check and warm up ``variant`` in ``mode``, once."""
        key = (variant.name, mode)
        if key in self.entries:
            return self.entries[key]
        self.entries[key] = entry = self._make_entry(variant, mode)
        return entry

    def _make_entry(self, variant: Variant, mode: Mode) -> Entry:
        reason = variant.impossible(self.case)
        if reason is not None:
            return Entry("impossible", reason)
        try:
            runnable = make_runnable(variant, self.case, self.inputs, mode, backend=self.preset.backend)
            checked = self._checked(variant)
            if not checked.passed:
                return Entry("wrong", checked.detail)
            self.report(f"warming up {variant.name}, {mode}")
            contestant = prepare(_work(runnable, mode), self.preset.device, self.preset.sample_seconds)
            if mode == "training" and variant.implementation == "fusedreg":
                finite = check_finite(runnable)
                if not finite.passed:
                    return Entry("wrong", finite.detail)
        except Unavailable as error:
            return Entry("unavailable", str(error))
        except Exception as error:  # one broken variant must not hide the other results; the exit status tells
            return Entry("failed", f"{type(error).__name__}: {error}")
        return Entry(contestant=contestant)

    def time(self) -> list[Samples]:
        """Rounds over all comparisons until the preset's seconds are spent; who goes first alternates."""
        start = time.perf_counter()
        samples = [Samples(comparison) for comparison in self.preset.comparisons]
        for one in samples:
            for variant in (one.comparison.variant, one.comparison.against):
                self.entry(variant, one.comparison.mode)
        begin = time.perf_counter()
        self.seconds["preparation"] = begin - start - self.seconds["checks"]
        for number in range(self.preset.maximum_rounds):
            if number >= self.preset.minimum_rounds and time.perf_counter() - begin >= self.preset.seconds:
                break
            rate = fma_rate(FMA_SECONDS) if torch.device(self.preset.device).type == "cpu" else None
            if rate is not None:
                self.fma_rates.append(rate)
            for one in samples:
                mode = one.comparison.mode
                ours = self.entry(one.comparison.variant, mode).contestant
                other = self.entry(one.comparison.against, mode).contestant
                if ours is None or other is None:
                    continue
                self.report(f"round {number + 1}: {one.comparison.name}")
                first, second = time_pair(ours, other, self.preset.device, swap=number % 2 == 0)
                one.variant.append(first)
                one.against.append(second)
        self.seconds["pairs"] = time.perf_counter() - begin
        return samples

    def row(self, samples: Samples) -> dict[str, Any]:
        """What the results file says of one comparison."""
        comparison = samples.comparison
        entry = self.entry(comparison.variant, comparison.mode)
        other = self.entry(comparison.against, comparison.mode)
        row: dict[str, Any] = {
            "variant": comparison.variant.name,
            "against": comparison.against.name,
            "mode": comparison.mode,
            "status": entry.status,
            "reason": entry.reason,
        }
        if entry.status == "ok" and other.status != "ok":
            row |= {"status": other.status, "reason": f"{comparison.against.name}: {other.reason}"}
        if not samples.variant:
            return row
        assert entry.contestant is not None
        assert other.contestant is not None
        ratio = spread([one / two for one, two in zip(samples.variant, samples.against, strict=True)])
        seconds, against = spread(samples.variant), spread(samples.against)
        return row | {
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.lower, ratio.upper],
            "milliseconds": seconds.median * 1e3,
            "against_milliseconds": against.median * 1e3,
            "gflops": self.case.flops(comparison.mode) / seconds.median / 1e9,
            "first_call_milliseconds": entry.contestant.first_call * 1e3,
            "against_first_call_milliseconds": other.contestant.first_call * 1e3,
            "pairs": len(samples.variant),
            "samples_milliseconds": [round(one * 1e3, 5) for one in samples.variant],
            "against_samples_milliseconds": [round(one * 1e3, 5) for one in samples.against],
        }


def _work(runnable: Runnable, mode: Mode) -> Callable[[], None]:
    return lambda: runnable.run(mode)


def measure_memory(case: Case, preset: Preset, dtype: torch.dtype, report: Report) -> dict[str, Any]:
    """Peak and saved bytes of the variants in :data:`benchmarks.memory.MEASURED` that can be built."""
    found: dict[str, Any] = {}
    cuda = torch.device(preset.device).type == "cuda"
    for variant in (*memory.MEASURED, TRITON_PLAIN) if cuda else memory.MEASURED:
        report(f"memory of {variant.name}")
        try:
            result = memory.measure(variant, case, preset.device, dtype, preset.backend)
        except Unavailable as error:
            found[variant.name] = {"status": "unavailable", "reason": str(error)}
        except RuntimeError as error:
            found[variant.name] = {"status": "failed", "reason": str(error)}
        else:
            found[variant.name] = {"status": "ok", "peak_bytes": result.peak, "saved_bytes": result.saved}
    return found


def measure_case(case: Case, preset: Preset, dtype_name: str, report: Report) -> dict[str, Any]:
    """One case in one dtype, as it stands in the results file. ``report`` is told what is being done."""
    with precision(dtype_name) as dtype:
        return _measure_case(case.sized(preset.size), preset, dtype_name, dtype, report)


def _measure_case(case: Case, preset: Preset, dtype_name: str, dtype: torch.dtype, report: Report) -> dict[str, Any]:
    measurement = CaseMeasurement(case, preset, dtype, report)
    rows = [measurement.row(samples) for samples in measurement.time()]
    record: dict[str, Any] = {
        "name": case.name,
        "source": case.source,
        "dtype": dtype_name,
        "steps": case.steps,
        "batch_size": case.batch_size,
        "input_size": case.input_size,
        "hidden_size": case.hidden_size,
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
        "reset_rate": case.reset_rate,
        "initial_state": case.initial_state,
        "forward_gflop": case.forward_flops / 1e9,
        "fma_gflops": statistics.median(measurement.fma_rates) if measurement.fma_rates else None,
        "checks": {
            name: {"passed": result.passed, "detail": result.detail} for name, result in measurement.checks.items()
        },
        "comparisons": rows,
    }
    spent = dict(measurement.seconds)
    del measurement
    if torch.device(preset.device).type == "cuda":
        torch.cuda.empty_cache()
    begin = time.perf_counter()
    record["memory"] = measure_memory(case, preset, dtype, report) if preset.memory else {}
    spent["memory"] = time.perf_counter() - begin
    record["seconds"] = {name: round(value, 2) for name, value in spent.items()}
    return record
