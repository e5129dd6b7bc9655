"""What every test runs under: memory that was allocated but not written holds NaN, and one printed random seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.utils.deterministic

pytest.register_assert_rewrite("peer_checks")

hypothesis.settings.register_profile(
    "fusedreg",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)


def poison_uninitialized_memory() -> None:
    """Fill what ``empty``, ``empty_like``, ``new_empty``, ``empty_strided`` and ``resize_`` return.

    Floating-point elements become NaN and integers their largest value. The fill is inside ATen's own
    allocating functions, so it covers allocations that a C++ operator makes through the dispatcher too.
    Without ``warn_only``, torch would also refuse CUDA functions that have no deterministic form.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed") is None:
        # Drawn here rather than by hypothesis, so that a run says how to repeat it even when it passes.
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    hypothesis.settings.load_profile("fusedreg")  # hypothesis's own plugin, next, loads the one asked for
    poison_uninitialized_memory()


def pytest_report_header(config: pytest.Config) -> str:
    return f"random options: --hypothesis-seed={config.getoption('hypothesis_seed')}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(pytest_report_header(config))


@pytest.fixture(autouse=True)
def uninitialized_memory_is_poisoned() -> Iterator[None]:
    """Each test starts with the fill switched on, and is told if it left it off for the next one."""
    poison_uninitialized_memory()
    yield
    assert torch.are_deterministic_algorithms_enabled(), "this test switched the fill of uninitialised memory off"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile starts with nothing compiled, and keeps nothing for the next test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
