"""Clocks and pairs: two things are timed in alternation within one process, and compared pair by pair."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], None]


def time_once(work: Work, device: str, repeats: int = 1) -> float:
    """Seconds a call, over ``repeats`` calls in a row.

    On a GPU, events on the current stream bracket the calls: what is measured is the device's time from the first
    kernel to the last, with launches overlapped as they are in use.
    """
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begin) / repeats


def first_call(work: Work, device: str) -> float:
    """Seconds of the very first call on the wall clock, device included: compilation and caches are part of it."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Contestant:
    """Something to time: after :func:`prepare` it is warm, and a sample of ``repeats`` calls is long enough."""

    work: Work
    first_call: float
    repeats: int


def prepare(work: Work, device: str, sample_seconds: float) -> Contestant:
    """Run ``work`` until it is warm, and find how many calls make a sample of ``sample_seconds``."""
    first = first_call(work, device)
    estimate = time_once(work, device)
    repeats = max(1, min(1000, math.ceil(sample_seconds / max(estimate, 1e-7))))
    if repeats > 1:
        # The first estimate of a short call is mostly noise.
        estimate = time_once(work, device, repeats)
        repeats = max(1, min(1000, math.ceil(sample_seconds / max(estimate, 1e-7))))
    return Contestant(work, first, repeats)


def time_pair(first: Contestant, second: Contestant, device: str, swap: bool) -> tuple[float, float]:
    """One pair of samples, ``(first, second)`` in seconds a call; ``swap`` says which runs first."""
    if swap:
        later = time_once(second.work, device, second.repeats)
        return time_once(first.work, device, first.repeats), later
    earlier = time_once(first.work, device, first.repeats)
    return earlier, time_once(second.work, device, second.repeats)


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (by linear interpolation) of at least one value."""
    if not values:
        raise ValueError("spread() expected at least one value, got none")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)
