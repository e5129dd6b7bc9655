"""What a GPU can do at most, measured by torch in the same run: copying, multiplying, launching. Each case's floor.

The floor of a case counts its two products at the matrix rate and each input read and each output written once at
the copy's rate, whichever takes longer; it knows nothing of the recurrence, whose steps wait for one another.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.registry import Case, Mode
from benchmarks.timing import prepare, time_once

# Several times the largest L2, and a product that fills any chip.
COPY_BYTES, MATRIX_SIZE, PAIRS, SAMPLE_SECONDS = 2**31, 8192, 5, 0.02
# "float32" is true float32 on every side, "tf32" allows TF32 on every side: torch's own defaults differ between
# cuDNN (allowed) and products (not).
PRECISIONS = {"tf32": ("high", True)}
TYPES = ("float16", "bfloat16", "tf32", "float32")


@contextlib.contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The torch type of a benchmark's dtype, and in the block what its float32 products may use."""
    products, cudnn = PRECISIONS.get(name, ("highest", False))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = cudnn
    try:
        yield torch.float32 if name in PRECISIONS else getattr(torch, name)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _seconds(work: Callable[[], Any], device: str) -> float:
    """The median time of a call."""
    contestant = prepare(work, device, SAMPLE_SECONDS)
    return statistics.median(time_once(work, device, contestant.repeats) for _ in range(PAIRS))


def measure(device: str, copy_bytes: int = COPY_BYTES, size: int = MATRIX_SIZE) -> dict[str, Any]:
    """GB/s of a copy (bytes read and written), TFLOP/s of a product by type, and µs of a launch.

    Products are of random values: zeros run faster on some chips.
    """
    matrix = {name: _product_rate(name, size, device) / 1e12 for name in TYPES}
    small = torch.zeros(32, device=device)
    found: dict[str, Any] = {
        "copy_gigabytes_per_second": _copy_rate(copy_bytes, device) / 1e9,
        "matrix_teraflops": matrix,
        "launch_microseconds": _seconds(lambda: small.add_(1), device) * 1e6,
    }
    if torch.device(device).type == "cuda":
        found["graph_launch_microseconds"] = _graph_launch(small) * 1e6
    return found


def _copy_rate(size: int, device: str) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    copy = torch.empty_like(source)
    return 2 * size / _seconds(lambda: copy.copy_(source), device)


def _product_rate(name: str, size: int, device: str) -> float:
    with precision(name) as dtype:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / _seconds(lambda: a @ b, device)


def _graph_launch(small: torch.Tensor, kernels: int = 100) -> float:
    """Seconds a kernel where a hundred of them are replayed as one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            small.add_(1)
    return _seconds(graph.replay, str(small.device)) / kernels


def bytes_moved(case: Case, mode: Mode, itemsize: int) -> float:
    """Each input read and each output written once, by a layer and direction: the least that memory sees."""
    total = 0.0
    for layer in range(case.num_layers):
        features = case.input_size if layer == 0 else case.hidden_size * case.directions
        values = case.steps * case.batch_size * (features + case.hidden_size)
        weights = 4 * case.hidden_size * (features + case.hidden_size)
        # The backward reads the inputs and the gradient of the output, and writes the input's and the weights'.
        total += values + weights if mode == "inference" else 3 * values + 3 * weights
    return total * case.directions * itemsize


def floor_seconds(case: Case, mode: Mode, dtype_name: str, ceilings: dict[str, Any]) -> float:
    """The least time of a case by the ceilings of the device."""
    itemsize = 2 if dtype_name in ("float16", "bfloat16") else 4
    arithmetic = case.flops(mode) / ceilings["matrix_teraflops"][dtype_name] / 1e12
    memory = bytes_moved(case, mode, itemsize) / ceilings["copy_gigabytes_per_second"] / 1e9
    return max(arithmetic, memory)
