"""The checks: each compares with the reference in float64, on the same rounded values and the same masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedreg
from benchmarks.support.places import Place
from fusedreg import BatchNorm, LayerNorm, Regularization

# Of the relative Frobenius norm of a difference. That kernels stay within the error budget is tested elsewhere.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}

TIED = {
    **{"dropout": 0.2, "input_dropout": 0.3, "hidden_dropout": 0.25, "output_dropout": 0.15, "update_dropout": 0.2},
    **{"cell_dropout": 0.1, "weight_dropout": 0.3, "zoneout_hidden": 0.15, "zoneout_cell": 0.4},
}
UNTIED = {"gate_masks": "untied", "update_mask": "sequence", "weight_mask": "row", "zoneout_output": "candidate"}


def values(place: Place, dtype: torch.dtype, *shape: int, seed: int = 1) -> Tensor:
    """Normal numbers, rounded to the type, on the place's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(place.device)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, whatever its form."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in tensors(part)]


def close(found: Sequence[Tensor], right: Sequence[Tensor], tolerance: float) -> None:
    """Raise unless every tensor is near its counterpart."""
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        difference = torch.linalg.vector_norm(one.detach().cpu().double() - other.detach().cpu().double())
        size = torch.linalg.vector_norm(other.detach().cpu().double())
        assert one.shape == other.shape
        assert difference <= tolerance * max(float(size), 1e-2), f"error {float(difference / size):.1e}"


def twin_of(module: fusedreg.LSTM) -> fusedreg.LSTM:
    """The same weights in the reference, in float64 on the CPU."""
    twin = copy.deepcopy(module).cpu().double()
    twin.backend = "reference"
    return twin


Call = Callable[[nn.Module, Tensor], Any]


def run(module: nn.Module, input: Tensor, **given: Any) -> Any:
    """One call under a fixed seed."""
    return module(input, seed=3, **given)


def agree(place: Place, module: fusedreg.LSTM, input: Tensor, call: Call = run, scale: float = 1.0) -> None:
    """Results, and gradients of everything, as the reference's in float64."""
    twin, tolerance = twin_of(module), TOLERANCES[input.dtype] * scale
    found, right = [], []
    for one, into in ((module, found), (twin, right)):
        leaf = (input if one is module else input.cpu().double()).clone().requires_grad_()
        results = tensors(call(one, leaf))
        into += results
        loss = sum((result.double() ** 2).sum() for result in results)
        into += torch.autograd.grad(loss, [leaf, *one.parameters()])  # type: ignore[arg-type]
    close(found, right, tolerance)


def rates(place: Place, dtype: torch.dtype) -> None:
    steps = 2 if place.slow else 3
    for options in (TIED, {**TIED, **UNTIED}):
        module = place.module(3, 4, 2, dtype=dtype, regularization=Regularization(**options))  # type: ignore[arg-type]
        agree(place, module, values(place, dtype, steps, 2, 3))
        if not place.slow:
            agree(place, module.eval(), values(place, dtype, steps, 2, 3))


def batch_norm(place: Place, dtype: torch.dtype) -> None:
    for norm in (BatchNorm(max_steps=4), BatchNorm(statistics="shared", input_statistics="sequence")):
        module = place.module(dtype=dtype, norm=norm, zoneout_cell=0.2)
        agree(place, module, values(place, dtype, 2, 9, 3), scale=3)
        if not place.slow:
            agree(place, module.eval(), values(place, dtype, 2, 9, 3), scale=3)


def layer_norm(place: Place, dtype: torch.dtype) -> None:
    agree(place, place.module(dtype=dtype, norm=LayerNorm(), zoneout_cell=0.2), values(place, dtype, 3, 2, 3), scale=3)


def projection(place: Place, dtype: torch.dtype) -> None:
    for norm in (LayerNorm(),) if place.slow else (None, LayerNorm()):
        module = place.module(dtype=dtype, proj_size=2, num_layers=2, norm=norm, zoneout_hidden=0.2, hidden_dropout=0.3)
        agree(place, module, values(place, dtype, 2, 2, 3), scale=3)


def layouts(place: Place, dtype: torch.dtype) -> None:
    module = place.module(3, 4, 2, bidirectional=True, batch_first=True, dtype=dtype, hidden_dropout=0.2)
    input = values(place, dtype, 2, 2, 3)
    agree(place, module, input)
    agree(place, module, input[0])
    lengths = [1, 2]
    packed: Call = lambda one, x: run(one, pack_padded_sequence(x, torch.tensor(lengths), True, False))  # type: ignore[arg-type]  # noqa: E731
    agree(place, module, input, packed)


def ragged(place: Place, dtype: torch.dtype) -> None:
    module = place.module(dtype=dtype, zoneout_cell=0.2)
    reset = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]], dtype=torch.bool)

    def call(one: nn.Module, x: Tensor) -> Any:
        at = x.device
        given = {"lengths": torch.tensor([4, 2], device=at), "reset": reset.to(at), "return_cell_states": True}
        return run(one, x.index_put((torch.tensor(3), torch.tensor(1)), x.new_tensor(float("nan"))), **given)

    agree(place, module, values(place, dtype, 4, 2, 3), call)


def recompute(place: Place, dtype: torch.dtype) -> None:
    module = place.module(dtype=dtype, recompute=True, zoneout_cell=0.2, norm=LayerNorm())
    agree(place, module, values(place, dtype, 3, 2, 3), scale=3)


def twice_backward(place: Place, dtype: torch.dtype) -> None:
    module = place.module(dtype=dtype, hidden_dropout=0.3)
    leaves = list(module.parameters())
    loss = run(module, values(place, dtype, 3, 2, 3))[0].sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


def double_backward(place: Place, dtype: torch.dtype) -> None:
    module = place.module(dtype=dtype, zoneout_cell=0.2, hidden_dropout=0.3)
    twin, input = twin_of(module), values(place, dtype, 3, 2, 3)
    found = []
    for one, x in ((module, input), (twin, input.cpu().double())):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(one, leaf)[0].square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [leaf, *one.parameters()]))
    close(found[0], found[1], 4 * TOLERANCES[dtype])


def forward_mode(place: Place, dtype: torch.dtype) -> None:
    module, input = place.module(dtype=dtype), values(place, dtype, 3, 2, 3)
    twin, direction = twin_of(module), values(place, dtype, 3, 2, 3, seed=2)
    derivative = torch.func.jvp(lambda x: run(module, x)[0], (input,), (direction,))[1]
    wide = input.cpu().double(), direction.cpu().double()
    close([derivative], [torch.func.jvp(lambda x: run(twin, x)[0], wide[:1], wide[1:])[1]], 4 * TOLERANCES[dtype])


def per_sample(place: Place, dtype: torch.dtype) -> None:
    module = place.module(dtype=dtype, zoneout_cell=0.2)
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        result = torch.func.functional_call(module, weights, (x,), {"seed": 3})
        total: Tensor = result[0].square().sum()
        return total

    samples, gradient = values(place, dtype, 3, 3, 2, 3), torch.func.grad(loss)
    batched = torch.vmap(gradient, in_dims=(None, 0))(parameters, samples)
    for index, sample in enumerate(samples):
        expected = gradient(parameters, sample)
        close([batched[name][index] for name in expected], list(expected.values()), TOLERANCES[dtype])


def functional(place: Place, dtype: torch.dtype) -> None:
    module, input = place.module(dtype=dtype), values(place, dtype, 3, 2, 3)
    halved = {name: value / 2 for name, value in module.state_dict().items()}
    found = torch.func.functional_call(module, halved, (input,))[0]
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", _Halved())
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "parametrizations" not in name:
                value.div_(2)
    close([module(input)[0]], [found], TOLERANCES[dtype])


class _Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def autocast(place: Place, dtype: torch.dtype) -> None:
    """To ``dtype``, of a float32 module; a float64 one is left alone."""
    module, input = place.module(zoneout_cell=0.2), values(place, torch.float32, 3, 2, 3)
    with torch.autocast(place.device.type, dtype):
        result = run(module, input, return_cell_states=True)
    assert result.output.dtype == dtype
    assert result.cell_states.dtype == torch.float32
    close([result.output], [run(twin_of(module), input.cpu().double())[0]], TOLERANCES[dtype])


def checkpointing(place: Place, dtype: torch.dtype) -> None:
    from torch.utils.checkpoint import checkpoint

    module, input = place.module(dtype=dtype, hidden_dropout=0.3), values(place, dtype, 3, 2, 3)
    found = []
    for kind in (None, False, True):
        leaf = input.clone().requires_grad_()
        torch.manual_seed(7)
        call: Call = lambda one, x: one(x)[0]  # noqa: E731
        output = call(module, leaf) if kind is None else checkpoint(call, module, leaf, use_reentrant=kind)
        found.append(torch.autograd.grad(output.square().sum(), leaf)[0] if kind is not True else _into(output, leaf))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def _into(output: Tensor, leaf: Tensor) -> Tensor:
    output.square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def like_torch(place: Place, dtype: torch.dtype) -> None:
    module, input = place.module(dtype=dtype, num_layers=2), values(place, dtype, 3, 2, 3)
    plain = nn.LSTM(3, 4, 2, dtype=dtype, device=place.device)
    plain.load_state_dict(module.state_dict())
    close(tensors(module(input)), tensors(plain(input)), TOLERANCES[dtype])


def cells(place: Place, dtype: torch.dtype) -> None:
    backend = "cpu" if place.stand_in == "emulated" else place.backend
    torch.manual_seed(0)
    cell = fusedreg.LSTMCell(3, 4, backend=backend, device=place.device, dtype=dtype)
    plain = nn.LSTMCell(3, 4, device=place.device, dtype=dtype)
    plain.load_state_dict(cell.state_dict())
    input = values(place, dtype, 2, 3)
    close(tensors(cell(input)), tensors(plain(input)), TOLERANCES[dtype])
