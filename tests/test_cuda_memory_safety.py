"""What the CUDA kernels may read, write and return: the tests of ``test_memory_safety.py`` and ``test_registration.py``
on the emulated device, and what is different on a device: no value is read by the host, so kernels clamp.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_memory_safety as safety
import test_registration as registration
import torch
from emulated_cuda import emulated, lstm_layer, use

from fusedreg.layer import RunningStatistics
from fusedreg.testing import make_arguments, run_layer

pytestmark = emulated

OPERATORS = torch.ops.fusedreg_emulated


def calls_of(test: Callable[..., None], **fixed: Any) -> list[Any]:
    """The calls that a test's own marks ask for, but for the arguments in ``fixed``, as parameters of another test."""
    axes: list[list[dict[str, Any]]] = [[fixed]]
    for mark in (mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"):
        names = [mark.args[0]] if isinstance(mark.args[0], str) else list(mark.args[0])
        if names[0] in fixed:
            continue
        rows = [row.values if hasattr(row, "values") and not isinstance(row, dict) else row for row in mark.args[1]]
        axes.append([dict(zip(names, [row] if len(names) == 1 else row, strict=True)) for row in rows])
    calls = [dict(itertools.chain.from_iterable(part.items() for part in parts)) for parts in itertools.product(*axes)]
    return [pytest.param(test, call, id=f"{test.__name__}-{place}") for place, call in enumerate(calls)]


def backend_tests(module: Any) -> list[Callable[..., None]]:
    """The module's tests that are run for each backend."""
    found = []
    for name, test in vars(module).items():
        if name.startswith("test_") and "backend" in inspect.signature(test).parameters:
            found.append(test)
    return found


SHARED = [call for test in backend_tests(safety) for call in calls_of(test, backend="emulated")]


@pytest.fixture(params=["step", "grid"])
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Layers run on the step tier, or wherever there is one on a grid kernel: all that a device of 8.0 chooses from."""
    with use("step") if request.param == "step" else use("auto", device=(16, 163 * 1024, 8, 0)):
        yield request.param


@pytest.mark.parametrize(("test", "arguments"), SHARED)
def test_memory_safety(
    test: Callable[..., None], arguments: dict[str, Any], tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safety, "implementation", lambda name: lstm_layer)
    test(**arguments)


REGISTERED = [
    registration.test_what_is_not_needed_is_empty,
    registration.test_the_two_bias_gradients_are_two_tensors,
    registration.test_parameters_of_a_norm_that_is_off_have_a_gradient_of_zero,
    registration.test_bad_tensors_of_the_forward,
    registration.test_bad_tensors_of_the_backward,
    registration.test_saved_tensors_must_be_there,
    registration.test_statistics_of_another_norm_are_refused,
    registration.test_other_bad_arguments,
    registration.test_a_forward_that_kept_nothing_has_no_backward,
    registration.test_needed_has_a_flag_for_each_result,
    registration.test_any_strides_of_any_argument,
    registration.test_expanded_and_transposed_inputs_and_gradients,
    registration.test_fakes_are_what_comes,
]


def seen_by_the_host(call: Any) -> bool:
    """First steps in a seed's table are not: there they are taken modulo 2**32."""
    return "first steps" not in call.values[1].get("message", "")


REGISTERED_CALLS = [call for test in REGISTERED for call in calls_of(test) if seen_by_the_host(call)]


@pytest.mark.parametrize(("test", "arguments"), REGISTERED_CALLS)
def test_registration(test: Callable[..., None], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "forward", OPERATORS.lstm_layer_forward.default)
    monkeypatch.setattr(registration, "backward", OPERATORS.lstm_layer_backward.default)
    with use("step"):
        test(**arguments)


@pytest.mark.parametrize("name", ["lstm_layer_forward", "lstm_layer_backward"])
def test_schemas_are_those_of_the_cpu(name: str) -> None:
    emulated_schema = str(getattr(OPERATORS, name).default._schema)
    assert emulated_schema.replace("fusedreg_emulated::", "fusedreg::") == str(
        getattr(torch.ops.fusedreg, name).default._schema
    )


# ---- Values that only the device sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_sequence"])
def test_indices_are_clamped(name: str, training: bool, tier: str) -> None:
    """Row numbers of the running statistics: beyond the last row they are the last, below -1 they are -1."""
    case = safety.case_of(name, rows=9, training=training, resets=False)
    arguments = make_arguments(case, 0)
    assert arguments.running is not None and arguments.running.recurrent_mean is not None
    rows = arguments.running.recurrent_mean.shape[0]
    input_rows = arguments.running.input_mean.shape[0]  # type: ignore[union-attr]

    def values(index: list[int], input_index: list[int]) -> dict[str, torch.Tensor]:
        running = arguments.running._replace(index=torch.tensor(index), input_index=torch.tensor(input_index))  # type: ignore[union-attr]
        assert isinstance(running, RunningStatistics)
        return run_layer(lstm_layer, case, arguments._replace(running=running))

    wild = [-1, 10**12, -(2**63), 0, rows, 1, -2]
    tame = [-1, rows - 1, -1, 0, rows - 1, 1, -1]
    assert len(wild) == case.steps
    safety.same(values(wild, wild), values(tame, [min(row, input_rows - 1) for row in tame]))


def test_without_running_statistics_a_population_is_standard() -> None:
    case = safety.case_of("batch_norm", rows=9, training=False)
    arguments = make_arguments(case, 0)
    assert arguments.running is not None
    nothing = torch.full((case.steps,), -1)
    with use("step"):
        without = run_layer(lstm_layer, case, arguments._replace(running=None))
        unread = arguments.running._replace(index=nothing, input_index=nothing)
        safety.same(without, run_layer(lstm_layer, case, arguments._replace(running=unread)))


def test_statistics_come_in_pairs() -> None:
    arguments = registration.forward_arguments(registration.BATCH_NORM) | {"running_cell_var": None}
    with pytest.raises(RuntimeError, match="running_cell_var: expected a tensor"):
        OPERATORS.lstm_layer_forward(*arguments.values())


def test_a_tier_that_cannot_run_says_why() -> None:
    case = safety.case_of("none", dtype=torch.float64)
    arguments = make_arguments(case, 0)
    with use("grid"), pytest.raises(RuntimeError, match='tier: "grid" was asked for and cannot run: float64'):
        run_layer(lstm_layer, case, arguments)
    assert not OPERATORS._set_tier("fastest")


def test_a_device_is_four_numbers() -> None:
    with pytest.raises(RuntimeError, match=r"_set_device: expected multiprocessors, .* got 3 numbers"):
        OPERATORS._set_device([1, 2, 3])
