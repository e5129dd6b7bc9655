"""The reference under torch's transforms: fake tensors (no synchronisation), compile, vmap, func.grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_reference import CASES, HIDDEN, INPUTS, ROWS, STEPS, make_parameters, make_reset, make_running, normal
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fusedreg.layer import LayerOptions, LayerParameters
from fusedreg.parameters import Architecture
from fusedreg.reference import lstm_layer
from fusedreg.regularization import BatchNorm
from fusedreg.running_statistics import initial_buffers, layer_buffers, read_running, update_running

LENGTHS = torch.tensor([4, 6, 0, 1])


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("case", ["everything", "everything_untied_layer_norm", "everything_batch_norm"])
def test_nothing_waits_for_the_device(case: str, direction: int) -> None:
    """A fake tensor has no value: whatever asked for one would raise."""
    options = LayerOptions(direction=direction, return_cells=True, **CASES[case])
    parameters, running = make_parameters(options.norm), make_running(options.norm)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            return None if value is None else mode.from_tensor(value)

        result = lstm_layer(
            fake(normal(STEPS, ROWS, INPUTS)),
            None,
            None,
            LayerParameters._make(fake(value) for value in parameters),
            options,
            lengths=fake(LENGTHS),
            reset=fake(make_reset()),
            seed=fake(torch.tensor(3)),
            running=None if running is None else type(running)._make(fake(value) for value in running),
        )
        result.output.sum().backward()
    assert result.output.shape == (STEPS, ROWS, HIDDEN)


def test_reading_the_running_statistics_waits_for_nothing() -> None:
    norm = BatchNorm(4, momentum=None)
    buffers = layer_buffers(initial_buffers(Architecture(INPUTS, HIDDEN, norm=norm)), 0, 0)
    parameters = make_parameters(norm)
    options = LayerOptions(norm=norm)
    statistics = lstm_layer(normal(STEPS, ROWS, INPUTS), None, None, parameters, options, lengths=LENGTHS).statistics
    assert statistics is not None
    narrow = [None if value is None else value.float() for value in statistics]
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in buffers.items()}
        lengths = mode.from_tensor(LENGTHS)
        assert read_running(fake, options, STEPS, torch.float32, lengths=lengths) is not None
        batch = type(statistics)._make(None if value is None else mode.from_tensor(value) for value in narrow)
        update_running(fake, batch, norm, steps=STEPS, rows=ROWS, lengths=lengths)


@pytest.mark.compile
def test_compiled_without_breaks() -> None:
    options = LayerOptions(direction=1, zoneout_cell=0.5, **CASES["batch_norm"])
    parameters, running = make_parameters(options.norm), make_running(options.norm, 2)

    def function(x: Tensor, seed: Tensor, lengths: Tensor) -> Tensor:
        return lstm_layer(x, None, None, parameters, options, lengths=lengths, seed=seed, running=running).output

    x, seed = normal(2, ROWS, INPUTS), torch.tensor(3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, seed, LENGTHS), function(x, seed, LENGTHS))


@pytest.mark.parametrize("case", ["plain", "everything", "everything_batch_norm", "everything_untied_layer_norm"])
def test_vmap_over_samples_is_a_loop_over_them(case: str) -> None:
    options = LayerOptions(direction=1, **CASES[case])
    parameters, running = make_parameters(options.norm), make_running(options.norm)

    def function(x: Tensor, lengths: Tensor, seed: Tensor) -> Tensor:
        return lstm_layer(x, None, None, parameters, options, lengths=lengths, seed=seed, running=running).output

    samples = (
        normal(3, STEPS, ROWS, INPUTS),
        torch.tensor([[4, 6, 0, 1], [6, 6, 6, 6], [1, 2, 3, 4]]),
        torch.tensor([1, 2, 3]),
    )
    expected = torch.stack([function(*sample) for sample in zip(*samples, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(*samples), expected)


def test_func_grad_and_per_sample_gradients() -> None:
    options = LayerOptions(**CASES["everything"])
    parameters = make_parameters()
    x, seed = normal(STEPS, ROWS, INPUTS), torch.tensor(4)

    def loss(weight_hh: Tensor, x: Tensor) -> Tensor:
        own = parameters._replace(weight_hh=weight_hh)
        return lstm_layer(x, None, None, own, options, seed=seed).output.square().sum()

    (expected,) = torch.autograd.grad(loss(parameters.weight_hh, x), parameters.weight_hh)
    weight = parameters.weight_hh.detach()
    torch.testing.assert_close(torch.func.grad(loss)(weight, x), expected)
    samples = torch.stack((x, 2 * x))
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, samples)
    torch.testing.assert_close(per_sample[0], expected)
    torch.testing.assert_close(per_sample[1], torch.func.grad(loss)(weight, 2 * x))
