"""The reference's batch norm where it is easily got wrong, and its statistics over ranks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_reference import HIDDEN, INPUTS, ROWS, STEPS, gradients, make_parameters, make_running, normal
from torch import Tensor

from fusedreg.layer import LayerOptions, LayerParameters, LayerResult
from fusedreg.reference import lstm_layer, sum_over_ranks
from fusedreg.regularization import BatchNorm
from fusedreg.running_statistics import read_running, update_running


def test_a_step_with_one_row_takes_the_population_as_constants() -> None:
    norm = BatchNorm(STEPS, input=False, cell=False)
    parameters, running = make_parameters(norm), make_running(norm)
    x = normal(STEPS, ROWS, INPUTS)
    lengths = torch.tensor([STEPS, 2, 2, 1])
    training = lstm_layer(x, None, None, parameters, LayerOptions(norm=norm), lengths=lengths, running=running)
    # From step 2 on the first row is alone: the same as evaluating it from the state it had.
    assert training.statistics is not None
    evaluation = LayerOptions(norm=norm, training=False, return_cells=True)
    start = lstm_layer(
        x, None, None, parameters, LayerOptions(norm=norm, return_cells=True), lengths=lengths, running=running
    )  # fmt: skip
    assert start.cells is not None
    assert running is not None
    later = running._replace(index=running.index[2:], input_index=running.input_index[2:])
    rest = lstm_layer(
        x[2:, :1], start.output[1, :1], start.cells[1, :1], parameters, evaluation, running=later
    )  # fmt: skip
    torch.testing.assert_close(training.output[2:, :1], rest.output)
    left = gradients((training.output[2:, :1],), [parameters.weight_hh])
    right = gradients((rest.output,), [parameters.weight_hh])
    torch.testing.assert_close(left, right)
    assert training.statistics.recurrent is not None
    assert running.recurrent_mean is not None
    torch.testing.assert_close(training.statistics.recurrent[3, 0], running.recurrent_mean[running.index[3]])


def test_without_counts_the_population_has_mean_0_and_variance_1() -> None:
    norm = BatchNorm(STEPS)
    parameters, x = make_parameters(norm), normal(STEPS, ROWS, INPUTS)
    running = make_running(norm)
    assert running is not None
    unknown = running._replace(index=torch.full((STEPS,), -1), input_index=torch.full((STEPS,), -1))
    options = LayerOptions(norm=norm, training=False)
    own = lstm_layer(x, None, None, parameters, options, running=unknown)
    none = lstm_layer(x, None, None, parameters, options)
    torch.testing.assert_close(own.output, none.output)
    ones = torch.ones(1, HIDDEN).double()
    same = running._replace(
        index=torch.zeros(STEPS).long(),
        input_index=torch.zeros(STEPS).long(),
        **{f"{name}_mean": torch.zeros(1, size).double() for name, size in SIZES.items()},
        **{f"{name}_var": ones.new_ones(1, size) for name, size in SIZES.items()},
    )
    torch.testing.assert_close(lstm_layer(x, None, None, parameters, options, running=same).output, none.output)


SIZES = {"input": 4 * HIDDEN, "recurrent": 4 * HIDDEN, "cell": HIDDEN}


def test_nan_in_rows_of_the_population_that_are_not_read_does_no_harm() -> None:
    norm = BatchNorm(3, input_statistics="sequence")
    parameters, running = make_parameters(norm), make_running(norm)
    assert running is not None
    assert running.cell_mean is not None
    x = normal(STEPS, ROWS, INPUTS).requires_grad_()
    fresh = running._replace(index=torch.full((STEPS,), -1))
    clean = lstm_layer(x, None, None, parameters, LayerOptions(norm=norm, training=False), running=fresh)
    running.cell_mean[:] = float("nan")
    result = lstm_layer(x, None, None, parameters, LayerOptions(norm=norm, training=False), running=fresh)
    assert torch.equal(result.output, clean.output)


def test_zero_variance_is_finite_in_value_and_gradient() -> None:
    norm = BatchNorm(STEPS)
    parameters = make_parameters(norm)
    x = normal(STEPS, 1, INPUTS).expand(-1, ROWS, -1).clone().requires_grad_()
    result = lstm_layer(x, None, None, parameters, LayerOptions(norm=norm))
    assert result.statistics is not None
    assert result.statistics.input is not None
    assert float(result.statistics.input[:, 1].max()) < 1e-20
    for gradient in gradients((result.output,), [x, *(value for value in parameters if value is not None)]):
        assert bool(torch.isfinite(gradient).all())


def test_a_batch_in_which_no_row_has_a_step() -> None:
    for pooled in ("step", "sequence"):
        norm = BatchNorm(STEPS, input_statistics=pooled)  # type: ignore[arg-type]
        parameters, h0 = make_parameters(norm), normal(2, HIDDEN)
        x = torch.full((STEPS, 2, INPUTS), float("nan")).double().requires_grad_()
        result = lstm_layer(
            x, h0, None, parameters, LayerOptions(norm=norm), lengths=torch.zeros(2, dtype=torch.int64)
        )  # fmt: skip
        assert torch.equal(result.final_hidden, h0)
        assert bool((result.output == 0).all())
        assert result.statistics is not None
        assert all(bool((value == 0).all()) for value in result.statistics if value is not None)
        for gradient in gradients((result.output,), [x, parameters.weight_ih, parameters.weight_hh]):
            assert bool((gradient == 0).all())


def test_padding_moves_no_statistic() -> None:
    norm = BatchNorm(STEPS)
    parameters = make_parameters(norm)
    lengths = torch.tensor([6, 3, 5, 2])
    x = normal(STEPS, ROWS, INPUTS)
    padding = (torch.arange(STEPS).unsqueeze(1) >= lengths).unsqueeze(-1)
    results = [
        lstm_layer(torch.where(padding, fill, x), None, None, parameters, LayerOptions(norm=norm), lengths=lengths)
        for fill in (0.0, 1e6, float("nan"))
    ]
    for result in results[1:]:
        assert torch.equal(result.output, results[0].output)
        assert result.statistics is not None
        assert results[0].statistics is not None
        for own, expected in zip(result.statistics, results[0].statistics, strict=True):
            assert own is not None
            assert expected is not None
            assert torch.equal(own, expected)


def test_evaluation_with_a_batch_s_own_statistics_is_training_on_it() -> None:
    norm = BatchNorm(STEPS, momentum=1.0)
    parameters, x = make_parameters(norm), normal(STEPS, 64, INPUTS)
    buffers = {
        f"running_{name}_{kind}": torch.ones(STEPS, size).double()
        for name, size in SIZES.items()
        for kind in ("mean", "var")
    }
    buffers["num_batches_tracked"] = torch.zeros(STEPS, dtype=torch.int64)
    training = lstm_layer(x, None, None, parameters, LayerOptions(norm=norm))
    assert training.statistics is not None
    update_running(buffers, training.statistics, norm, steps=STEPS, rows=64, lengths=None)
    for name in SIZES:  # the buffers hold the unbiased variance, the batch was normalised with the biased one
        buffers[f"running_{name}_var"] *= 63 / 64
    options = LayerOptions(norm=norm, training=False)
    running = read_running(buffers, options, STEPS, x.dtype, lengths=None)
    evaluation = lstm_layer(x, None, None, parameters, options, running=running)
    torch.testing.assert_close(evaluation.output, training.output)


class Ranks:
    """``all_reduce`` among threads, in place of a process group: each waits for the others and adds them up."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.values: dict[int, Tensor] = {}

    def all_reduce(self, value: Tensor, group: Any = None) -> None:
        assert group is self
        rank = int(threading.current_thread().name)
        self.values[rank] = value
        self.barrier.wait()
        total = torch.stack([self.values[r].clone() for r in range(self.size)]).sum(0)
        self.barrier.wait()
        value.copy_(total)
        self.barrier.wait()

    def run(self, function: Any) -> list[Any]:
        results: dict[int, Any] = {}

        def work(rank: int) -> None:
            try:
                results[rank] = function(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results.values():
            if isinstance(result, BaseException):
                raise result
        return [results[rank] for rank in range(self.size)]


@pytest.mark.parametrize("pooled", ["step", "sequence"])
@pytest.mark.parametrize("direction", [0, 1])
def test_statistics_over_ranks_are_those_of_the_whole_batch(
    pooled: Any, direction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(2)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    together = BatchNorm(4, input_statistics=pooled, process_group=ranks)
    alone = BatchNorm(4, input_statistics=pooled)
    x, lengths = normal(STEPS, 6, INPUTS), torch.tensor([6, 2, 3, 4, 1, 4])
    whole_parameters = make_parameters(alone)

    def buffers() -> dict[str, Tensor]:
        rows = {"input": 1 if pooled == "sequence" else 4, "recurrent": 4, "cell": 4}
        made = {
            f"running_{name}_{kind}": torch.ones(rows[name], SIZES[name]).double()
            for name in SIZES
            for kind in ("mean", "var")
        }
        return {**made, "num_batches_tracked": torch.zeros(4, dtype=torch.int64)}

    def call(norm: BatchNorm, rows: slice, parameters: LayerParameters) -> tuple[LayerResult, list[Tensor], Any]:
        own = buffers()
        options = LayerOptions(norm=norm, direction=direction)
        running = read_running(own, options, STEPS, x.dtype, lengths=lengths[rows])
        result = lstm_layer(
            x[:, rows], None, None, parameters, options, lengths=lengths[rows], running=running
        )  # fmt: skip
        wanted = [value for value in parameters if value is not None]
        weights = normal(STEPS, 6, HIDDEN, seed=9)[:, rows]
        found = list(torch.autograd.grad((result.output * weights).sum(), wanted))
        assert result.statistics is not None
        update_running(own, result.statistics, norm, steps=STEPS, rows=rows.stop - rows.start, lengths=lengths[rows])
        return result, found, own

    whole, whole_gradients, whole_buffers = call(alone, slice(0, 6), whole_parameters)
    parts = ranks.run(
        lambda rank: call(together, slice(0, 2) if rank == 0 else slice(2, 6), make_parameters(together))
    )  # fmt: skip
    torch.testing.assert_close(torch.cat([part[0].output for part in parts], 1), whole.output)
    for position, gradient in enumerate(whole_gradients):
        torch.testing.assert_close(sum(part[1][position] for part in parts), gradient)
    for part in parts:
        for name, value in whole_buffers.items():
            torch.testing.assert_close(part[2][name], value)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_a_real_process_group() -> None:
    group_store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=group_store, rank=0, world_size=1)
    try:
        value = normal(3).requires_grad_()
        assert torch.autograd.gradcheck(lambda v: sum_over_ranks(v, torch.distributed.group.WORLD), value)
        norm = BatchNorm(STEPS, process_group=torch.distributed.group.WORLD)
        parameters, x = make_parameters(norm), normal(STEPS, ROWS, INPUTS)
        result = lstm_layer(x, None, None, parameters, LayerOptions(norm=norm))
        expected = lstm_layer(x, None, None, parameters, LayerOptions(norm=BatchNorm(STEPS)))
        torch.testing.assert_close(result.output, expected.output)
    finally:
        torch.distributed.destroy_process_group()
