"""Threads: many callers at once, more of them than cores, limits, nested regions, forked workers, and equal bits."""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import REGULARIZERS, compiled
from torch import Tensor

from fusedreg.testing import LayerCase, implementation, make_arguments, run_layer

pytestmark = compiled

NAMES = ["none", "everything", "everything_untied", "everything_batch_norm", "everything_layer_norm"]
# Large enough that a kernel wants several workers, and of sizes that do not divide among them.
LARGE = LayerCase("large", steps=9, rows=37, input_size=50, hidden_size=150, ragged=True, resets=True)
SMALL = LayerCase("small", steps=9, rows=5, input_size=7, hidden_size=13, ragged=True, resets=True)


@pytest.fixture(autouse=True)
def deadlocks_end_the_run() -> Iterator[None]:
    """A barrier that waits for a worker who never comes must fail with a traceback, not hang for ever."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def thread_count_is_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def digest(values: dict[str, Tensor]) -> str:
    """One hash of every bit of every tensor."""
    sums = hashlib.sha256()
    for name in sorted(values):
        sums.update(name.encode())
        sums.update(values[name].contiguous().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def run(case: LayerCase, seed: int = 0) -> str:
    return digest(run_layer(implementation("cpu"), case, make_arguments(case, seed)))


def named(case: LayerCase, name: str, **changes: object) -> LayerCase:
    return replace(case, regularization=REGULARIZERS[name], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [SMALL, LARGE], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_same_bits_with_any_number_of_threads(name: str, case: LayerCase, dtype: torch.dtype) -> None:
    digests = set()
    for threads in (1, 2, 3, 7, 2, 1):
        torch.set_num_threads(threads)
        digests.add(run(named(case, name, dtype=dtype)))
    assert len(digests) == 1


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_run_after_run(name: str) -> None:
    for recompute in (False, True):
        case = named(LARGE, name, recompute=recompute)
        assert len({run(case) for _ in range(4)}) == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_python_threads_at_once(threads: int) -> None:
    """Eight callers, more than there are cores here, each with a team of its own and other options."""
    torch.set_num_threads(threads)
    cases = [named(case, name) for case in (SMALL, LARGE) for name in NAMES[:4]]
    expected = [run(case, seed) for seed, case in enumerate(cases)]
    start = threading.Barrier(len(cases))

    def caller(seed: int) -> list[str]:
        torch.set_num_threads(threads)  # torch's count is the calling thread's own
        start.wait()
        return [run(cases[seed], seed) for _ in range(4)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for seed, digests in enumerate(pool.map(caller, range(len(cases)))):
            assert digests == [expected[seed]] * 4, cases[seed].regularization


def test_backward_in_another_thread() -> None:
    case = named(LARGE, "everything")
    arguments = make_arguments(case, 0)
    weight = arguments.parameters.weight_hh.clone().requires_grad_()

    def loss() -> Tensor:
        parameters = arguments.parameters._replace(weight_hh=weight)
        result = implementation("cpu")(
            arguments.input,
            arguments.initial_hidden,
            arguments.initial_cell,
            parameters,
            case.options,
            lengths=arguments.lengths,
            reset=arguments.reset,
            seed=arguments.seed,
        )
        return (result.output * arguments.gradients["output"]).sum()

    here = torch.autograd.grad(loss(), weight)[0]
    graph = loss()
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: torch.autograd.grad(graph, weight)[0]).result()
    assert torch.equal(here, there)


def test_one_graph_pulled_by_two_threads() -> None:
    """Two backwards at the same time over the same saved tensors."""
    case = named(LARGE, "everything_batch_norm")
    arguments = make_arguments(case, 0)
    weight = arguments.parameters.weight_hh.clone().requires_grad_()
    parameters = arguments.parameters._replace(weight_hh=weight)
    result = implementation("cpu")(
        arguments.input,
        arguments.initial_hidden,
        arguments.initial_cell,
        parameters,
        case.options,
        lengths=arguments.lengths,
        reset=arguments.reset,
        seed=arguments.seed,
        running=arguments.running,
    )
    loss = (result.output * arguments.gradients["output"]).sum()
    expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]

    def pull(_: int) -> Tensor:
        return torch.autograd.grad(loss, weight, retain_graph=True)[0]

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one, expected) for one in pool.map(pull, range(12)))


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_threads import LARGE, NAMES, named, run
torch.set_num_threads(int(sys.argv[2]))
print(*[run(named(LARGE, name)) for name in NAMES])
"""


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 8),
        ({"OMP_THREAD_LIMIT": "1"}, 4),  # the team is smaller than what is asked for
        ({"OMP_THREAD_LIMIT": "2"}, 4),
        ({"OMP_DYNAMIC": "true"}, 4),
        ({"OMP_NUM_THREADS": "1"}, 2),
        ({"OMP_WAIT_POLICY": "active"}, 3),
        ({"OMP_MAX_ACTIVE_LEVELS": "0"}, 2),
    ],
    ids=lambda value: "-".join(f"{one}={two}" for one, two in value.items()) if isinstance(value, dict) else None,
)
def test_thread_limits(environment: dict[str, str], threads: int) -> None:
    """The runtime may give fewer workers than were asked for; a process of its own for each limit."""
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(here), str(threads)],
        env={**os.environ, **environment},
        cwd=here.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [run(named(LARGE, name)) for name in NAMES]


def openmp_runtime() -> str | None:
    """The GNU OpenMP library that torch loaded, or nothing (another runtime, another system)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "gomp" in line}
    return next(iter(sorted(paths)), None)


def test_inside_a_parallel_region() -> None:
    """Called by every thread of somebody else's region, where the runtime gives a team of one or of more."""
    path = openmp_runtime()
    if path is None:
        pytest.skip("not run: needs GNU OpenMP, whose entry point this test calls, and /proc to find it")
    cases = [named(case, name) for case in (SMALL, LARGE) for name in ("none", "everything_batch_norm")]
    expected = [run(case) for case in cases]
    entered: list[int] = []
    got: list[list[str]] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: object) -> None:
        entered.append(threading.get_ident())
        got.append([run(case) for case in cases])

    runtime = ctypes.CDLL(path)
    runtime.GOMP_parallel(body, None, 3, 0)
    assert entered and len(got) == len(entered), "an exception in the region, printed above"
    assert all(digests == expected for digests in got)


class Digests(torch.utils.data.Dataset[str]):
    """Runs the layer in whichever process asks."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, seed: int) -> str:
        return run(named(LARGE, NAMES[seed % len(NAMES)]), seed)


def test_forked_data_loader_workers() -> None:
    """The parent has already run kernels on several threads, none of which live on in a fork."""
    if not hasattr(os, "fork"):
        pytest.skip("not run: this system has no fork")
    torch.set_num_threads(3)
    expected = [Digests()[seed] for seed in range(8)]
    loader = torch.utils.data.DataLoader(
        Digests(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    assert list(loader) == expected
    assert [Digests()[seed] for seed in range(8)] == expected
