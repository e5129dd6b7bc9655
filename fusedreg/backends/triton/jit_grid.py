"""How the programs of a persistent kernel wait for each other: a counter of arrivals in memory.

All of them run at once, which a cooperative launch guarantees. A program counts itself in when everything that it
wrote for the others stands in memory, and waits until as many arrivals were counted as the step needs. Release and
acquire at the device's scope order what was written before an arrival before what is read after the wait; the barrier
of the program's own threads on either side makes that hold for all of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

# Counters of different groups stand in different lines of the cache.
COUNTER_STRIDE: tl.constexpr = tl.constexpr(32)


@triton.jit
def arrive(arrivals):
    """Count this program in, once all its threads' writes stand."""
    tl.debug_barrier()
    tl.atomic_add(arrivals, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(arrivals, target):
    """Return when ``target`` arrivals were counted. The counter only grows, so nobody who is late misses it."""
    while tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()
