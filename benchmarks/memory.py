"""Peak memory of a forward and backward pass, and the bytes that the forward keeps for the backward.

On a CPU each measurement has a fresh process, forked from a clean server that has imported torch and done nothing
else. One training step of the very case is run and dropped first, and what it freed is handed back to the system, so
that code pages, thread stacks and the workspaces that a library keeps for good are on nobody's account (beside a case
of one row they would be most of it). The peak is the resident set's high-water mark (reset just before) over the
resident set just before, the median over a few steps where they are short. On a GPU it is the allocator's own count.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import ALL, PLAIN, RECOMPUTE, TORCH, Case, Variant
from benchmarks.variants import Unavailable, make_inputs, make_runnable

REPEATS, REPEAT_SECONDS = 5, 0.3
MEASURED: tuple[Variant, ...] = (TORCH, PLAIN, ALL, RECOMPUTE)


@dataclass(frozen=True)
class Memory:
    """Bytes: the peak of a training step over what was there before, and what its graph keeps besides parameters."""

    peak: int
    saved: int


def saved_bytes(variant: Variant, case: Case, device: str, dtype: torch.dtype, backend: str = "") -> int:
    """Bytes that autograd saves in the forward, each storage once; inputs and parameters, alive anyway, excluded.

    Only what autograd itself holds is seen, so between libraries it is peaks that compare.
    """
    inputs = make_inputs(case, device, dtype)
    runnable = make_runnable(variant, case, inputs, "training", backend=backend)
    own = {tensor.untyped_storage().data_ptr() for tensor in (inputs.values, *runnable.module.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = runnable.output()
    total = sum(kept.values())
    del output
    return total


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: what is kept would hide a part of the peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cpu_peak(variant: Variant, case: Case, dtype: torch.dtype, backend: str) -> int:
    """The peak in this process: to be called in one that has done nothing yet."""
    runnable = make_runnable(variant, case, make_inputs(case, "cpu", dtype), "training", backend=backend)
    try:
        # Code pages, thread stacks and the libraries' own set-up are not the model's memory: touch them first.
        runnable.run("training")
        peaks: list[int] = []
        begin = time.perf_counter()
        while len(peaks) < REPEATS and (not peaks or time.perf_counter() - begin < REPEAT_SECONDS):
            _trim()
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            runnable.run("training")
            peaks.append(max(0, _status("VmHWM") - before))
        return int(statistics.median_low(peaks))
    except OSError:
        # No /proc, or a read-only one: the high-water mark since the start of the process will do.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        runnable.run("training")
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _child(
    connection: Connection, variant: Variant, case: Case, dtype: torch.dtype, backend: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    try:
        peak = _cpu_peak(variant, case, dtype, backend)
        connection.send(Memory(peak, saved_bytes(variant, case, "cpu", dtype, backend)))
    except Unavailable as error:
        connection.send(error)
    finally:
        connection.close()


def _context() -> Any:
    """Processes forked from a server that has only imported torch, where the system can; else fresh ones."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["benchmarks.variants"])
    return context


def _cuda_memory(variant: Variant, case: Case, dtype: torch.dtype, device: str, backend: str) -> Memory:
    runnable = make_runnable(variant, case, make_inputs(case, device, dtype), "training", backend=backend)
    runnable.run("training")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runnable.run("training")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del runnable
    return Memory(peak, saved_bytes(variant, case, device, dtype, backend))


def measure(variant: Variant, case: Case, device: str, dtype: torch.dtype, backend: str = "") -> Memory:
    """Peak and saved bytes of ``variant`` on ``case``.

    Raises :class:`Unavailable` where the variant cannot be built, ``RuntimeError`` where the child process died.
    """
    if torch.device(device).type == "cuda":
        return _cuda_memory(variant, case, dtype, device, backend)
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, variant, case, dtype, backend, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"measuring the memory of {variant.name} ended with code {process.exitcode}") from None
    process.join()
    if isinstance(result, Unavailable):
        raise result
    assert isinstance(result, Memory)
    return result
