"""Running statistics against ``torch.nn.BatchNorm1d``, step by step."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from helpers import compiled
from torch import Tensor

import fusedreg
from fusedreg.layer import BatchStatistics, LayerOptions
from fusedreg.parameters import Architecture
from fusedreg.regularization import BatchNorm
from fusedreg.running_statistics import (
    COUNT,
    buffer_shapes,
    initial_buffers,
    layer_buffers,
    read_running,
    reset_buffers,
    running_index,
    update_running,
)

HIDDEN = 3


def make_buffers(norm: BatchNorm, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return layer_buffers(initial_buffers(Architecture(2, HIDDEN, norm=norm), dtype=dtype), 0, 0)


def statistics_of(values: Tensor, counts: list[int]) -> Tensor:
    """Mean and biased variance of the first ``counts[s]`` rows of ``values (T, B, N)`` at each step."""
    result = torch.zeros(values.shape[0], 2, values.shape[2], dtype=values.dtype)
    for s, count in enumerate(counts):
        if count:
            result[s, 0] = values[s, :count].mean(0)
            result[s, 1] = values[s, :count].var(0, unbiased=False)
    return result


def batch_of(seed: int, steps: int, rows: int, counts: list[int]) -> tuple[BatchStatistics, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"input": 4 * HIDDEN, "recurrent": 4 * HIDDEN, "cell": HIDDEN}
    values = {
        term: torch.randn(steps, rows, size, generator=generator, dtype=torch.float64) for term, size in sizes.items()
    }
    return BatchStatistics(*(statistics_of(values[term], counts) for term in sizes)), values


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
def test_full_batches_are_batch_norm_1d_at_each_step(momentum: float | None) -> None:
    steps, rows = 4, 5
    norm = BatchNorm(steps, momentum=momentum)
    buffers = make_buffers(norm)
    modules = [torch.nn.BatchNorm1d(4 * HIDDEN, momentum=momentum).double() for _ in range(steps)]
    for call in range(3):
        statistics, values = batch_of(call, steps, rows, [rows] * steps)
        update_running(buffers, statistics, norm, steps=steps, rows=rows, lengths=None)
        for s, module in enumerate(modules):
            module(values["recurrent"][s])
    for s, module in enumerate(modules):
        torch.testing.assert_close(buffers["running_recurrent_mean"][s], module.running_mean)
        torch.testing.assert_close(buffers["running_recurrent_var"][s], module.running_var)
    assert buffers[COUNT].tolist() == [3] * steps


@pytest.mark.parametrize("momentum", [0.1, None])
def test_ragged_batches_update_the_steps_that_have_two_rows(momentum: float | None) -> None:
    norm = BatchNorm(6, momentum=momentum)
    buffers = make_buffers(norm)
    modules = [torch.nn.BatchNorm1d(HIDDEN, momentum=momentum).double() for _ in range(6)]
    for call, lengths in enumerate([[5, 2, 2, 0], [3, 3, 1, 1], [0, 0, 4, 0]]):
        counts = [sum(length > s for length in lengths) for s in range(5)]
        statistics, values = batch_of(call, 5, 4, counts)
        update_running(buffers, statistics, norm, steps=5, rows=4, lengths=torch.tensor(lengths))
        for s, count in enumerate(counts):
            if count >= 2:
                modules[s](values["cell"][s, :count])
    assert buffers[COUNT].tolist() == [2, 2, 1, 0, 0, 0]
    for s, module in enumerate(modules):
        torch.testing.assert_close(buffers["running_cell_mean"][s], module.running_mean)
        torch.testing.assert_close(buffers["running_cell_var"][s], module.running_var)


def test_a_step_without_an_update_ignores_what_its_statistics_hold() -> None:
    norm = BatchNorm(3)
    buffers = make_buffers(norm)
    statistics, _ = batch_of(0, 3, 4, [4, 1, 0])
    for value in statistics:
        assert value is not None
        value[1:] = float("nan")
    update_running(buffers, statistics, norm, steps=3, rows=4, lengths=torch.tensor([2, 1, 1, 1]))
    assert all(bool(torch.isfinite(value).all()) for value in buffers.values())
    assert torch.equal(buffers["running_cell_var"][1:], torch.ones(2, HIDDEN, dtype=torch.float64))


def test_steps_past_max_steps_change_nothing() -> None:
    norm, longer = BatchNorm(2), BatchNorm(5)
    buffers, all_steps = make_buffers(norm), make_buffers(longer)
    statistics, _ = batch_of(0, 5, 4, [4] * 5)
    update_running(buffers, statistics, norm, steps=5, rows=4, lengths=None)
    update_running(all_steps, statistics, longer, steps=5, rows=4, lengths=None)
    for name, value in buffers.items():
        torch.testing.assert_close(value, all_steps[name][:2])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_statistics_take_the_mean_over_the_steps(momentum: float | None) -> None:
    norm = BatchNorm(statistics="shared", momentum=momentum)
    buffers = make_buffers(norm)
    assert buffers["running_recurrent_mean"].shape == (1, 4 * HIDDEN)
    mean, var = torch.zeros(4 * HIDDEN).double(), torch.ones(4 * HIDDEN).double()
    for call in range(3):
        counts = [4, 3, 2, 1, 0]
        statistics, values = batch_of(call, 5, 4, counts)
        update_running(buffers, statistics, norm, steps=5, rows=4, lengths=torch.tensor([1, 4, 2, 3]))
        used = [values["recurrent"][s, :count] for s, count in enumerate(counts) if count >= 2]
        weight = momentum if momentum is not None else 1.0 / (call + 1)
        mean = (1 - weight) * mean + weight * torch.stack([v.mean(0) for v in used]).mean(0)
        var = (1 - weight) * var + weight * torch.stack([v.var(0) for v in used]).mean(0)
    torch.testing.assert_close(buffers["running_recurrent_mean"][0], mean)
    torch.testing.assert_close(buffers["running_recurrent_var"][0], var)
    assert buffers[COUNT].tolist() == [3]


@pytest.mark.parametrize("statistics", ["per_step", "shared"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_sequence_statistics_are_one_batch_norm_1d_over_all_steps(statistics: str, momentum: float | None) -> None:
    max_steps = 3 if statistics == "per_step" else None
    norm = BatchNorm(max_steps, statistics=statistics, input_statistics="sequence", momentum=momentum)  # type: ignore[arg-type]
    buffers = make_buffers(norm)
    assert buffers["running_input_mean"].shape == (1, 4 * HIDDEN)
    module = torch.nn.BatchNorm1d(4 * HIDDEN, momentum=momentum).double()
    lengths = [3, 1, 2]
    counts = [3, 2, 1]
    for call in range(2):
        per_step, values = batch_of(call, 3, 3, counts)
        pooled = torch.cat([values["input"][s, :count] for s, count in enumerate(counts)])
        module(pooled)
        own = torch.stack((pooled.mean(0), pooled.var(0, unbiased=False))).unsqueeze(0)
        update_running(
            buffers, per_step._replace(input=own), norm, steps=3, rows=3, lengths=torch.tensor(lengths)
        )  # fmt: skip
    torch.testing.assert_close(buffers["running_input_mean"][0], module.running_mean)
    torch.testing.assert_close(buffers["running_input_var"][0], module.running_var)


def test_running_index_takes_the_largest_earlier_step_that_was_updated() -> None:
    index = running_index(torch.tensor([0, 3, 0, 1, 0]), 8)
    assert index.tolist() == [-1, 1, 1, 3, 3, 3, 3, 3]
    assert running_index(torch.tensor([0, 0]), 3).tolist() == [-1, -1, -1]
    assert running_index(torch.tensor([2]), 3).tolist() == [0, 0, 0]
    assert running_index(torch.tensor([1, 1, 1]), 2).tolist() == [0, 1]


def test_shapes_follow_the_terms_that_are_on() -> None:
    assert buffer_shapes(BatchNorm(7, recurrent=False, cell=False), 2) == {
        "running_input_mean": (7, 8),
        "running_input_var": (7, 8),
        COUNT: (7,),
    }
    assert buffer_shapes(BatchNorm(statistics="shared", input=False), 2) == {
        "running_recurrent_mean": (1, 8),
        "running_recurrent_var": (1, 8),
        "running_cell_mean": (1, 2),
        "running_cell_var": (1, 2),
        COUNT: (1,),
    }


def test_buffers_of_a_module_are_kept_by_layer_and_direction() -> None:
    architecture = Architecture(2, HIDDEN, num_layers=2, bidirectional=True, norm=BatchNorm(4))
    buffers = initial_buffers(architecture, dtype=torch.float32)
    assert len(buffers) == 4 * 7
    assert buffers["running_cell_var_l1_reverse"].dtype == torch.float32
    assert buffers["num_batches_tracked_l0"].dtype == torch.int64
    own = layer_buffers(buffers, 1, 1)
    assert set(own) == set(buffer_shapes(BatchNorm(4), HIDDEN))
    assert own["running_cell_var"] is buffers["running_cell_var_l1_reverse"]
    assert set(layer_buffers(buffers, 1, 0)) == set(own)
    assert layer_buffers(buffers, 1, 0)["running_cell_var"] is buffers["running_cell_var_l1"]
    assert initial_buffers(Architecture(2, HIDDEN)) == {}
    own["running_cell_mean"].fill_(5)
    reset_buffers(buffers)
    for name, value in buffers.items():
        assert bool((value == (1 if "_var" in name else 0)).all()), name


def test_reading_copies_in_training_and_widens_16_bit_buffers() -> None:
    norm = BatchNorm(4)
    buffers = make_buffers(norm, torch.bfloat16)
    buffers[COUNT][0] = 1
    training = LayerOptions(norm=norm)
    assert read_running(buffers, training, 6, torch.bfloat16, lengths=None) is None
    running = read_running(buffers, training, 6, torch.bfloat16, lengths=torch.tensor([1, 6]))
    assert running is not None
    assert running.cell_mean is not None
    assert running.cell_mean.dtype == torch.float32
    assert running.index.tolist() == running.input_index.tolist() == [0] * 6

    wide = make_buffers(norm, torch.float64)
    running = read_running(wide, training, 6, torch.float64, lengths=torch.tensor([1, 6]))
    assert running is not None
    assert running.cell_mean is not None
    wide["running_cell_mean"].fill_(9)
    assert float(running.cell_mean.max()) == 0.0
    assert read_running(wide, LayerOptions(), 6, torch.float64, lengths=None) is None
    evaluation = read_running(wide, LayerOptions(training=False, norm=norm), 6, torch.float64, lengths=None)
    assert evaluation is not None
    assert evaluation.cell_mean is wide["running_cell_mean"]


def test_sequence_wise_input_reads_its_one_row() -> None:
    norm = BatchNorm(4, input_statistics="sequence", cell=False)
    buffers = make_buffers(norm)
    options = LayerOptions(training=False, norm=norm)
    buffers[COUNT][:] = torch.tensor([2, 2, 0, 0])
    running = read_running(buffers, options, 5, torch.float64, lengths=None)
    assert running is not None
    assert running.cell_mean is None
    assert running.input_index.tolist() == [0] * 5
    assert running.index.tolist() == [0, 1, 1, 1, 1]


def test_16_bit_buffers_mix_in_the_statistics_dtype() -> None:
    norm = BatchNorm(2, momentum=0.5)
    buffers = make_buffers(norm, torch.bfloat16)
    statistics, values = batch_of(0, 2, 4, [4, 4])
    narrow = BatchStatistics(*(None if value is None else value.float() for value in statistics))
    update_running(buffers, narrow, norm, steps=2, rows=4, lengths=None)
    expected = (0.5 * values["cell"].mean(1)).to(torch.bfloat16)
    torch.testing.assert_close(buffers["running_cell_mean"], expected)


@compiled
@pytest.mark.parametrize("input_statistics", ["sequence", "step"])
def test_statistics_of_many_values_lose_no_digits(input_statistics: Literal["sequence", "step"]) -> None:
    """A hundred thousand of a pooled sequence, ten thousand rows of a step: float32 sums that do not lose digits."""
    steps, rows = (784, 128) if input_statistics == "sequence" else (2, 10_000)
    norm = BatchNorm(statistics="shared", input_statistics=input_statistics, recurrent=False, cell=False, momentum=1.0)
    torch.manual_seed(0)
    lstm, x = fusedreg.LSTM(4, 16, bias=False, norm=norm), torch.randn(steps, rows, 4) + 3
    with torch.no_grad():
        lstm(x)
        terms = x.double() @ lstm.weight_ih_l0.double().T
    pooled = terms.reshape(1, -1, 64) if input_statistics == "sequence" else terms
    for name, exact in (("mean", pooled.mean(1).mean(0)), ("var", pooled.var(1).mean(0))):
        found = lstm.get_buffer(f"running_input_{name}_l0").flatten().double()
        error = float((found - exact).norm() / exact.norm())
        assert error <= 4 * torch.finfo(torch.float32).eps, name
