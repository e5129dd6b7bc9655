"""What else must hold on a GPU: streams, graphs, no waiting for the device, memory, transforms, the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_targets import DEVICE, Target
from helpers import REGULARIZERS
from test_parity import case_of
from torch import Tensor, nn

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization
from fusedreg.layer import LayerParameters
from fusedreg.testing import make_arguments, run_layer

OPTIONS = {
    "plain": Regularization(),
    "everything": REGULARIZERS["everything"],
    "everything_untied": REGULARIZERS["everything_untied"],
    "batch_norm": Regularization(norm=BatchNorm(max_steps=40), zoneout_cell=0.2),
    "layer_norm": Regularization(norm=LayerNorm(), hidden_dropout=0.2),
}


def name_of(backend: Target) -> str:
    """The backend as a module is told; a stand-in's is the CPU's."""
    return backend.backend if DEVICE.type == "cuda" else "cpu"


def make(backend: Target, name: str = "everything", **options: Any) -> fusedreg.LSTM:
    torch.manual_seed(0)
    options = {"dtype": torch.float32, **options}
    return fusedreg.LSTM(24, 72, 2, regularization=OPTIONS[name], backend=name_of(backend), device=DEVICE, **options)


def inputs(steps: int = 12, rows: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(steps * 1000 + rows)
    return torch.randn(steps, rows, 24, generator=generator).to(DEVICE, dtype)


def step(module: fusedreg.LSTM, x: Tensor, seed: Any = 5) -> list[Tensor]:
    """Output and every gradient of a training step."""
    leaf = x.detach().clone().requires_grad_()
    output, (hidden, cell) = module(leaf, seed=seed)
    loss = output.square().sum() + hidden.sum() + cell.square().sum()
    return [output.detach(), *torch.autograd.grad(loss, [leaf, *module.parameters()])]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_module_is_nn_lstm(
    backend: Target, bidirectional: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which cuDNN takes by default
    torch.manual_seed(0)
    theirs = nn.LSTM(24, 72, 2, bidirectional=bidirectional, device=DEVICE, dtype=dtype)
    ours = fusedreg.LSTM.from_torch(theirs, backend=name_of(backend))
    x = inputs(dtype=dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = []
    for module, leaf in zip((theirs, ours), leaves, strict=True):
        output, (hidden, cell) = module(leaf)
        loss = output.float().sum() + hidden.float().sum() + cell.float().sum()
        results.append([output, hidden, cell, *torch.autograd.grad(loss, [leaf, *module.parameters()])])
    tolerance = 2e-4 if dtype == torch.float32 else 3e-2
    for right, found in zip(*results, strict=True):
        error = torch.linalg.vector_norm((found - right).double()) / torch.linalg.vector_norm(right.double())
        assert error < tolerance


@pytest.mark.parametrize("name", OPTIONS)
def test_two_backwards_over_one_graph_are_equal(target: Target, name: str) -> None:
    case = case_of("everything" if name == "plain" else name if name in REGULARIZERS else "everything")
    arguments = make_arguments(case, 0)
    leaf = arguments.input.clone().requires_grad_()
    weights = LayerParameters(*(None if one is None else one.clone().requires_grad_() for one in arguments.parameters))  # type: ignore[arg-type]
    with target.forced():
        result = target.layer(
            leaf,
            arguments.initial_hidden,
            arguments.initial_cell,
            weights,
            case.options,
            lengths=arguments.lengths,
            reset=arguments.reset,
            seed=arguments.seed,
            running=arguments.running,
        )
        loss = result.output.square().sum() + result.final_cell.sum()
        leaves = [leaf, *(one for one in weights if one is not None)]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert equal(list(first), list(torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_second_derivatives(backend: Target, name: str) -> None:
    module = make(backend, name)
    reference = make(backend, name)
    reference.backend = "reference"
    x = inputs(3, 2)
    found = []
    for one in (module, reference):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(leaf, seed=5)[0].square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_variable_length_and_packed(backend: Target, name: str) -> None:
    """Padding may hold anything, NaN included, and lengths may lie on the device."""
    module = make(backend, name)
    x, lengths = inputs(9, 12), torch.tensor([9, 9, 9, 3, 9, 9, 9, 9, 5, 9, 9, 9])
    padding = torch.arange(9, device=DEVICE).unsqueeze(1) >= lengths.to(DEVICE)
    wild = x.masked_fill(padding.unsqueeze(2), float("nan"))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    outputs = []
    for values, given in ((x, lengths), (wild, lengths.to(DEVICE))):
        module.load_state_dict(state)
        output, _ = module(values, lengths=given, seed=3)
        assert not output[padding].any()
        output.square().sum().backward()
        outputs.append([output.detach(), *(value.grad.clone() for value in module.parameters())])  # type: ignore[union-attr]
        module.zero_grad()
    assert equal(*outputs)
    module.load_state_dict(state)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, _ = nn.utils.rnn.pad_packed_sequence(module(packed, seed=3)[0])
    assert torch.equal(output, outputs[0][0])


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled(backend: Target, name: str) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    module, eager = make(backend, name), make(backend, name)
    whole = torch.compile(lambda x: module(x, seed=3)[0], backend="aot_eager", fullgraph=True, dynamic=True)
    for steps in (5, 8):
        x = inputs(steps)
        ours, right = whole(x), eager(x, seed=3)[0]
        torch.testing.assert_close(ours, right)
        parts = [
            torch.autograd.grad(one.square().sum(), list(some.parameters()))
            for one, some in ((ours, module), (right, eager))
        ]
        torch.testing.assert_close(parts[0], parts[1])


def test_torch_func(backend: Target) -> None:
    module = make(backend, "everything").double() if backend.backend == "cuda" else make(backend, "everything")
    xs = torch.stack([inputs(4, 3, module.weight_ih_l0.dtype) for _ in range(3)])  # type: ignore[arg-type]
    loss: Callable[[Tensor], Tensor] = lambda x: module(x, seed=7)[0].square().sum()  # noqa: E731
    batched = torch.vmap(torch.func.grad(loss))(xs)
    for x, gradient in zip(xs, batched, strict=True):
        torch.testing.assert_close(torch.func.grad(loss)(x), gradient)


@pytest.mark.parametrize("name", ["everything", "batch_norm"])
def test_an_ensemble_is_its_members(backend: Target, name: str) -> None:
    """Weights, and a batch norm's statistics, of each member's own: models of one call."""
    members = [make(backend, name) for _ in range(3)]
    for number, member in enumerate(members):
        torch.manual_seed(number)
        member.reset_parameters()
    xs = torch.stack([inputs(4, 3) for _ in members])
    parameters, buffers = torch.func.stack_module_state(members)

    def output(own: dict[str, Tensor], statistics: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(members[0], (own, statistics), (x,), {"seed": 7})[0]

    stacked = torch.vmap(output)(parameters, buffers, xs)
    gradients = torch.autograd.grad(stacked.square().sum(), list(parameters.values()))
    for number, (member, x) in enumerate(zip(members, xs, strict=True)):
        alone, _ = member(x, seed=7)
        assert torch.equal(alone, stacked[number])
        expected = torch.autograd.grad(alone.square().sum(), list(member.parameters()))
        assert equal([gradient[number] for gradient in gradients], list(expected))
        for key, value in member.named_buffers():
            torch.testing.assert_close(buffers[key][number], value)


# ---- The device itself -------------------------------------------------------------------------------------------


@pytest.mark.device
@pytest.mark.parametrize("name", OPTIONS)
def test_the_callers_stream_is_used(backend: Target, name: str) -> None:
    """On a side stream that is kept busy first: what went to another stream would run before its input is there."""
    module = make(backend, name)
    x = inputs()
    expected = step(make(backend, name), x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.full_like(x, float("nan"))
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = step(module, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert equal(found, expected)


@pytest.mark.device
@pytest.mark.parametrize("name", ["plain", "everything", "batch_norm"])
def test_several_streams_at_once(backend: Target, name: str) -> None:
    """Cooperative kernels of different streams share the device without mixing what they exchange."""
    sizes = [(30, 16), (25, 20), (20, 8), (35, 12)]
    expected = [step(make(backend, name), inputs(*size), seed) for seed, size in enumerate(sizes)]
    modules = [[make(backend, name) for _ in sizes] for _ in range(5)]
    streams = [torch.cuda.Stream() for _ in sizes]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = []
    for round_of in modules:
        found.append([])
        for seed, (module, size, stream) in enumerate(zip(round_of, sizes, streams, strict=True)):
            with torch.cuda.stream(stream):
                found[-1].append(step(module, inputs(*size), seed))
    torch.cuda.synchronize()
    for results in found:
        for result, right in zip(results, expected, strict=True):
            assert equal(result, right)


@pytest.mark.device
@pytest.mark.parametrize("name", OPTIONS)
def test_a_cuda_graph_replays(target: Target, name: str) -> None:
    """Captured once, replayed with other inputs and other seeds; equal to eager calls."""
    module, eager = make(target, name), make(target, name)
    x = inputs().requires_grad_()
    seed = torch.tensor(11, device=DEVICE)
    parameters = list(module.parameters())

    def call() -> list[Tensor]:
        output, _ = module(x, seed=seed)
        return [output, *torch.autograd.grad(output.square().sum(), [x, *parameters])]

    state = {key: value.clone() for key, value in module.state_dict().items()}
    with target.forced():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for number in (21, 22):
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
                seed.fill_(number)
                module.load_state_dict(state)
            graph.replay()
            eager.load_state_dict(state)
            leaf = x.detach().clone().requires_grad_()
            output, _ = eager(leaf, seed=number)
            right = [output, *torch.autograd.grad(output.square().sum(), [leaf, *eager.parameters()])]
            assert equal(captured, right)
            for key, value in eager.state_dict().items():
                assert torch.equal(module.state_dict()[key], value), key


@pytest.mark.device
def test_a_cuda_graph_draws_fresh_masks(backend: Target) -> None:
    module = make(backend, "everything")
    x = inputs()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            module(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = module(x)[0]
        graph.replay()
        first = output.clone()
        graph.replay()
    assert not torch.equal(first, output)


@pytest.mark.device
@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_waits_for_the_device(backend: Target, name: str) -> None:
    module = make(backend, name)
    x = inputs()
    on_host = torch.tensor([12, 9, 5, 1] * 5)
    lengths, reset = on_host.to(DEVICE), torch.zeros(12, 20, dtype=torch.bool, device=DEVICE)
    packed = nn.utils.rnn.pack_padded_sequence(x, on_host, enforce_sorted=False)
    module(x, lengths=lengths, reset=reset)[0].sum().backward()  # what is compiled or loaded may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x, lengths=lengths, reset=reset, seed=4)[0].sum().backward()
        module(x)[0].sum().backward()
        for given in (on_host, on_host.int(), on_host.pin_memory(), [12, 9, 5, 1] * 5):
            module(x, lengths=given)[0].sum().backward()
        module(packed)[0].data.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.device
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_memory_that_is_kept_for_the_backward(backend: Target, name: str) -> None:
    """Gates and cells, 5 H values a step and row, besides the output; with recompute 2 H at most."""
    steps, rows, hidden = 64, 32, 256
    for recompute, allowed in ((False, 5), (True, 2)):
        module = fusedreg.LSTM(
            32,
            hidden,
            regularization=replace(OPTIONS[name], dropout=0.0),  # which is between layers, and there is one
            recompute=recompute,
            backend=name_of(backend),
            device=DEVICE,
        )
        x = torch.randn(steps, rows, 32, device=DEVICE, requires_grad=True)
        module(x)[0].sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output, state = module(x)
        kept = torch.cuda.memory_allocated() - before
        own = sum(value.numel() * value.element_size() for value in (output, *state))
        differs = name != "plain"  # the carried h is saved beside an output that is dropped
        assert kept - own <= (allowed + differs) * steps * rows * hidden * 4 * 1.05 + 2**16


@pytest.mark.device
@pytest.mark.slow
def test_more_than_two_billion_elements(backend: Target) -> None:
    """T B 4H beyond 32-bit indices."""
    steps, rows, hidden = 4200, 256, 512
    needed = steps * rows * hidden * 2 * 16
    if torch.cuda.mem_get_info()[0] < needed * 1.5:
        pytest.skip(f"not run: needs {needed * 1.5 / 2**30:.0f} GiB of free memory on the GPU")
    module = fusedreg.LSTM(8, hidden, zoneout_cell=0.1, backend=name_of(backend), device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(steps, rows, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    output, _ = module(x, seed=1)
    output.sum().backward()
    assert x.grad is not None
    # The last rows of the last steps, alone: rows do not depend on each other, and masks are keyed on the row.
    again, _ = module(x[:, :8].detach(), seed=1)
    assert torch.equal(output[-1, :8], again[-1]) or torch.allclose(
        output[-1, :8].float(), again[-1].float(), atol=2e-2
    )
    assert x.grad[-1].isfinite().all()
    assert x.grad[-1, -1].any()


@pytest.mark.device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: needs a second GPU")
def test_the_tensors_device_is_used_and_not_the_current_one(backend: Target) -> None:
    module = make(backend, "everything")
    expected = step(module, inputs())
    found = step(module.to("cuda:1"), inputs().to("cuda:1"))
    assert all(value.device.index == 1 for value in found)
    assert equal([value.cpu() for value in found], [value.cpu() for value in expected])


@pytest.mark.device
def test_auto_takes_the_cuda_kernels_where_they_are_built() -> None:
    if not fusedreg.backends.availability("cuda"):
        pytest.skip(f"not run: {fusedreg.backends.availability('cuda').reason}")
    assert fusedreg.backends.resolve("auto", DEVICE, torch.float32) == "cuda"
    text = fusedreg.backends.explain(DEVICE, torch.bfloat16, hidden_size=512, batch_size=16)
    assert "auto takes cuda" in text and "forward: " in text and "backward: " in text
    module = fusedreg.LSTM(8, 16, device=DEVICE)
    assert torch.isfinite(module(torch.randn(3, 2, 8, device=DEVICE))[0]).all()


def test_autocast(backend: Target) -> None:
    module = make(backend, "plain")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        output, (_, cell) = module(inputs())
    assert output.dtype == torch.bfloat16
    right = make(backend, "plain", dtype=torch.bfloat16)
    right.load_state_dict(module.state_dict())
    assert torch.equal(output, right(inputs(dtype=torch.bfloat16))[0])
    assert cell.dtype == torch.bfloat16


def test_gradients_reach_only_what_asks_for_them(target: Target) -> None:
    case = case_of("everything")
    arguments = make_arguments(case, 0)
    with target.forced():
        everything = run_layer(target.layer, case, arguments)
        leaf = arguments.parameters.weight_hh.clone().requires_grad_()
        result = target.layer(
            arguments.input,
            arguments.initial_hidden,
            arguments.initial_cell,
            arguments.parameters._replace(weight_hh=leaf),
            case.options,
            lengths=None,
            reset=None,
            seed=arguments.seed,
        )
        gradients = [arguments.gradients[name] for name in ("output", "final_hidden", "final_cell", "cells")]
        (found,) = torch.autograd.grad(list(result[:4]), leaf, gradients)
    torch.testing.assert_close(found, everything["grad weight_hh"])
