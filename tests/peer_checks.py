"""Checks for errors that peers make with memory, zoneout, weights and masks, each with the error to plant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from planting import call, case_of
from torch import Tensor

from fusedreg import reference
from fusedreg.layer import LayerResult
from fusedreg.masks import LayerMasks
from fusedreg.regularization import Regularization
from fusedreg.testing import (
    LayerArguments,
    LayerImplementation,
    make_arguments,
)

# ---- Checks: memory ----------------------------------------------------------------------------------------------


def pull_twice(implement: LayerImplementation, spoil: bool) -> None:
    case = case_of(zoneout_hidden=0.3, hidden_dropout=0.2)
    arguments = make_arguments(case, 0)
    weight = arguments.parameters.weight_hh.clone().requires_grad_()
    result = call(implement, case, arguments, parameters=arguments.parameters._replace(weight_hh=weight))
    loss = (result.output * arguments.gradients["output"]).sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    kept = first.clone()
    if spoil:
        first.fill_(float("nan"))
    second = torch.autograd.grad(loss, weight)[0]
    assert torch.equal(second, kept)
    assert not spoil or first.isnan().all(), "the second backward wrote to the first one's gradient"


def saved_buffers_survive(implement: LayerImplementation) -> None:
    pull_twice(implement, spoil=False)


def overwriting(grad: Tensor, buffer: Tensor) -> Tensor:
    result = grad * buffer
    buffer.copy_(result)
    return result


def gradients_are_the_callers_own(implement: LayerImplementation) -> None:
    pull_twice(implement, spoil=True)


def returning_the_buffer(grad: Tensor, buffer: Tensor) -> Tensor:
    return buffer.copy_(grad)


# ---- Checks: zoneout ---------------------------------------------------------------------------------------------


def gradient_is_the_derivative(implement: LayerImplementation) -> None:
    """Against central differences of the implementation's own forward, along a random direction."""
    case = case_of(zoneout_hidden=0.5, zoneout_cell=0.5)
    arguments = make_arguments(case, 0)
    direction = torch.randn(arguments.input.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6

    def loss(input: Tensor) -> Tensor:
        return (call(implement, case, arguments, input=input).output * arguments.gradients["output"]).sum()

    slope = (loss(arguments.input + step * direction) - loss(arguments.input - step * direction)) / (2 * step)
    leaf = arguments.input.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def masks_of_step_0(masks: LayerMasks) -> LayerMasks:
    def first(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask[:1].expand_as(mask)

    return masks._replace(zoneout_hidden=first(masks.zoneout_hidden), zoneout_cell=first(masks.zoneout_cell))


def kept_states(result: LayerResult, arguments: LayerArguments) -> tuple[Tensor, Tensor]:
    """Where ``h`` and ``c`` are exactly those of the step before."""
    assert arguments.initial_hidden is not None and arguments.initial_cell is not None and result.cells is not None
    hidden = torch.cat([arguments.initial_hidden[None], result.output])
    cells = torch.cat([arguments.initial_cell[None], result.cells])
    return hidden[1:] == hidden[:-1], cells[1:] == cells[:-1]


def states_are_zoned_out_separately(implement: LayerImplementation) -> None:
    case = replace(case_of(zoneout_hidden=0.5, zoneout_cell=0.5), steps=20)
    arguments = make_arguments(case, 0)
    hidden, cells = kept_states(call(implement, case, arguments), arguments)
    assert 0.4 < (hidden == cells).double().mean().item() < 0.6
    assert 0.4 < (hidden[1:] == hidden[:-1]).double().mean().item() < 0.6, "one mask for all steps"


def rates_are_of_dropping(implement: LayerImplementation) -> None:
    case = replace(case_of(zoneout_hidden=0.2, zoneout_cell=0.2), steps=30)
    arguments = make_arguments(case, 0)
    for kept in kept_states(call(implement, case, arguments), arguments):
        assert 0.15 < kept.double().mean().item() < 0.25
    case = replace(case_of(output_dropout=0.2), rows=40, hidden_size=40)
    output = call(implement, case, make_arguments(case, 0)).output
    assert 0.15 < (output == 0).double().mean().item() < 0.25
    plain = call(implement, replace(case, regularization=Regularization()), make_arguments(case, 0)).output
    torch.testing.assert_close(output, torch.where(output == 0, 0.0, plain / 0.8))


def inverted(masks: LayerMasks) -> LayerMasks:
    return LayerMasks(*(None if mask is None else ~mask for mask in masks))


def zoneout_in_evaluation_is_the_expectation(implement: LayerImplementation) -> None:
    """A step without zoneout, mixed by hand with the state before it; several steps, one call each."""
    case = replace(case_of(zoneout_hidden=0.3, zoneout_cell=0.6), training=False)
    plain = replace(case, regularization=Regularization())
    arguments = make_arguments(case, 0)
    result = call(implement, case, arguments)
    hidden, cell = arguments.initial_hidden, arguments.initial_cell
    assert hidden is not None and cell is not None
    for step in range(case.steps):
        new = call(
            implement,
            plain,
            arguments,
            input=arguments.input[step : step + 1],
            initial_hidden=hidden,
            initial_cell=cell,
        )
        hidden = 0.3 * hidden + 0.7 * new.final_hidden
        cell = 0.6 * cell + 0.4 * new.final_cell
        torch.testing.assert_close(result.output[step], hidden)
    torch.testing.assert_close(result.final_cell, cell)


# ---- Checks: dropped weights, masks of rows and calls ------------------------------------------------------------


def evaluation_uses_all_weights(implement: LayerImplementation) -> None:
    for kind in ("element", "row"):
        case = replace(case_of(weight_dropout=0.5, weight_mask=kind), training=False)
        arguments = make_arguments(case, 0)
        plain = call(implement, replace(case, regularization=Regularization()), arguments)
        result = call(implement, case, arguments._replace(seed=torch.tensor(5)))
        torch.testing.assert_close(result.output, plain.output)


def weights_are_learnt(implement: LayerImplementation) -> None:
    """The parameter is left as it is, and over some calls every element of it receives a gradient."""
    case = case_of(weight_dropout=0.5)
    arguments = make_arguments(case, 0)
    weight = arguments.parameters.weight_hh.clone().requires_grad_()
    reached = torch.zeros_like(weight, dtype=torch.bool)
    for seed in range(12):
        parameters = arguments.parameters._replace(weight_hh=weight)
        result = call(implement, case, arguments, parameters=parameters, seed=torch.tensor(seed))
        assert torch.equal(weight, arguments.parameters.weight_hh), "the parameter was changed"
        assert result.output.requires_grad, "no gradient at all"
        gradient = torch.autograd.grad(result.output.sum(), [weight], allow_unused=True)[0]
        assert gradient is not None, "no gradient at all"
        now = gradient != 0
        assert 0.4 < now.double().mean().item() < 0.6, "the gradient of dropped elements is zero, of others not"
        reached |= now
    assert reached.double().mean().item() > 0.99


def zeroing_for_good(weight: Tensor) -> Tensor:
    with torch.no_grad():
        weight[0, 0] = 0.0
    return weight


PER_ROW: tuple[dict[str, Any], ...] = (
    {"dropout": 0.5},
    {"input_dropout": 0.5},
    {"hidden_dropout": 0.5},
    {"input_dropout": 0.5, "gate_masks": "untied"},
    {"hidden_dropout": 0.5, "gate_masks": "untied"},
    {"output_dropout": 0.5},
    {"update_dropout": 0.5},
    {"update_dropout": 0.5, "update_mask": "sequence"},
    {"cell_dropout": 0.5},
    {"zoneout_hidden": 0.5},
    {"zoneout_cell": 0.5},
)


def rows_have_masks_of_their_own(implement: LayerImplementation) -> None:
    for options in PER_ROW:
        case = case_of(**options)
        arguments = make_arguments(case, 0)

        def alike(value: Tensor | None, dim: int) -> Tensor:
            assert value is not None
            return value.narrow(dim, 0, 1).expand_as(value).contiguous()

        result = call(
            implement,
            case,
            arguments,
            input=alike(arguments.input, 1),
            initial_hidden=alike(arguments.initial_hidden, 0),
            initial_cell=alike(arguments.initial_cell, 0),
        )
        for row in range(1, case.rows):
            assert not torch.equal(result.output[:, 0], result.output[:, row]), options


def first_row_for_all(masks: LayerMasks) -> LayerMasks:
    def shared(name: str, mask: Tensor | None) -> Tensor | None:
        if mask is None or name == "weight_dropout":
            return mask
        stepwise = mask.dim() == 3 and name in ("dropout", "update_dropout", "zoneout_hidden", "zoneout_cell")
        return mask.narrow(1 if stepwise else 0, 0, 1).expand_as(mask)

    return LayerMasks(*(shared(name, mask) for name, mask in masks._asdict().items()))


def seeds_make_masks_of_their_own(implement: LayerImplementation) -> None:
    for options in (*PER_ROW, {"weight_dropout": 0.5}, {"weight_dropout": 0.5, "weight_mask": "row"}):
        case = case_of(**options)
        arguments = make_arguments(case, 0)
        results = [call(implement, case, arguments, seed=torch.tensor(seed)).output for seed in (1, 2, 1 + 2**32)]
        assert not torch.equal(results[0], results[1]), options
        assert not torch.equal(results[0], results[2]), f"{options}: the high word of the seed"
        assert torch.equal(results[0], call(implement, case, arguments, seed=torch.tensor(1)).output), options


def with_the_first_seed() -> LayerImplementation:
    first: list[Tensor] = []

    def implement(*arguments: Any, seed: Tensor | None = None, **keywords: Any) -> LayerResult:
        if seed is not None:
            first.append(seed)
        return reference.lstm_layer(*arguments, seed=first[0] if first else None, **keywords)

    return implement
