"""The masks of the GPU's kernels are the CPU's, bit for bit: each family is read off a layer that lays it bare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_targets import Target
from torch import Tensor

from fusedreg import Regularization
from fusedreg.layer import LayerParameters
from fusedreg.masks import masks

STEPS, ROWS, UNITS = 5, 37, 137
SEEDS = (3, -(2**62) - 12345, 2**40 + 7)
GATES = ("i", "f", "g", "o")
OPEN, SHUT, WEIGHT = 30.0, -30.0, 8.0


def call(
    target: Target,
    options: Regularization,
    seed: int,
    *,
    biases: tuple[float, float, float, float],
    weight_ih: Tensor | None = None,
    weight_hh: Tensor | None = None,
    input: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: float = 0.0,
    steps: int = 1,
) -> Any:
    rows = ROWS if hidden is None else hidden.shape[0]
    parameters = LayerParameters(
        torch.zeros(4 * UNITS, UNITS) if weight_ih is None else weight_ih,
        torch.zeros(4 * UNITS, UNITS) if weight_hh is None else weight_hh,
        torch.tensor(biases).repeat_interleave(UNITS),
        torch.zeros(4 * UNITS),
    )
    with target.forced(), torch.no_grad():
        return target.layer(
            torch.zeros(steps, rows, UNITS) if input is None else input,
            torch.zeros(rows, UNITS) if hidden is None else hidden,
            torch.full((rows, UNITS), cell),
            parameters,
            options.layer_options(0, 2, direction=0, training=True, recompute=False, return_cells=True),
            seed=torch.tensor(seed),
        )


def expected(options: Regularization, seed: int, steps: int = 1, rows: int = ROWS) -> Any:
    drawn = masks(seed, options, input_size=UNITS, hidden_size=UNITS, batch_size=rows, steps=steps, num_layers=2)
    return drawn["l0"]


# For each gate: biases, cell before and what shows sigmoid (tanh) of that gate's pre-activation alone.
PROBES: dict[str, tuple[tuple[float, float, float, float], float, str]] = {
    "i": ((0.0, SHUT, OPEN, OPEN), 0.0, "cells"),
    "f": ((SHUT, 0.0, OPEN, OPEN), 1.0, "cells"),
    "g": ((OPEN, SHUT, 0.0, OPEN), 0.0, "cells"),
    "o": ((SHUT, OPEN, OPEN, 0.0), 20.0, "output"),
}


def dropped(result: Any, gate: str) -> Tensor:
    """Where the pre-activation is 0, and not the weight times what was kept: 0.5 (tanh: 0) and not 1."""
    _, _, field = PROBES[gate]
    return getattr(result, field)[0] < 0.75


def block(gate: str, values: Tensor) -> Tensor:
    """``(4H, ·)`` with ``values (H, ·)`` for one gate, zeros for the others."""
    weight = torch.zeros(4 * UNITS, values.shape[1])
    start = GATES.index(gate) * UNITS
    weight[start : start + UNITS] = values
    return weight


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_masks", ["tied", "untied"])
def test_hidden_dropout(target: Target, gate: str, gate_masks: Any, seed: int) -> None:
    options = Regularization(hidden_dropout=0.4, gate_masks=gate_masks)
    biases, cell, _ = PROBES[gate]
    result = call(
        target,
        options,
        seed,
        biases=biases,
        cell=cell,
        weight_hh=block(gate, WEIGHT * torch.eye(UNITS)),
        hidden=torch.ones(ROWS, UNITS),
    )
    mask = expected(options, seed).hidden_dropout
    assert torch.equal(dropped(result, gate), mask if gate_masks == "tied" else mask[:, GATES.index(gate)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_masks", ["tied", "untied"])
def test_input_dropout(target: Target, gate: str, gate_masks: Any, seed: int) -> None:
    options = Regularization(input_dropout=0.3, gate_masks=gate_masks)
    biases, cell, _ = PROBES[gate]
    result = call(
        target,
        options,
        seed,
        biases=biases,
        cell=cell,
        weight_ih=block(gate, WEIGHT * torch.eye(UNITS)),
        input=torch.ones(1, ROWS, UNITS),
    )
    mask = expected(options, seed).input_dropout
    assert torch.equal(dropped(result, gate), mask if gate_masks == "tied" else mask[:, GATES.index(gate)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("weight_mask", ["element", "row"])
def test_weight_dropout(target: Target, gate: str, weight_mask: Any, seed: int) -> None:
    """Row ``b`` of the batch carries one unit alone, and so reads column ``b`` of the weight."""
    options = Regularization(weight_dropout=0.35, weight_mask=weight_mask)
    biases, cell, _ = PROBES[gate]
    result = call(
        target,
        options,
        seed,
        biases=biases,
        cell=cell,
        weight_hh=block(gate, torch.full((UNITS, UNITS), WEIGHT)),
        hidden=torch.eye(UNITS),
    )
    start = GATES.index(gate) * UNITS
    mask = expected(options, seed).weight_dropout[start : start + UNITS].expand(UNITS, UNITS)
    assert torch.equal(dropped(result, gate).t(), mask)


GROWING = (0.0, OPEN, 1.0, OPEN)  # the cell grows by a half of tanh(1) each step, and h with it
FRESH = (OPEN, SHUT, OPEN, OPEN)  # every step anew


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("site", ["zoneout_hidden", "zoneout_cell"])
def test_zoneout(target: Target, site: str, seed: int) -> None:
    """A state that stood still was zoned out, and no other."""
    options = Regularization(**{site: 0.35})  # type: ignore[arg-type]
    result = call(target, options, seed, biases=GROWING, cell=0.1, steps=STEPS)
    values = result.cells if site == "zoneout_cell" else result.output
    first = torch.full((1, ROWS, UNITS), 0.1 if site == "zoneout_cell" else 0.0)
    still = values == torch.cat((first, values[:-1]))
    assert torch.equal(still, getattr(expected(options, seed, STEPS), site))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("update_mask", ["step", "sequence"])
def test_update_dropout(target: Target, update_mask: Any, seed: int) -> None:
    options = Regularization(update_dropout=0.4, update_mask=update_mask)
    result = call(target, options, seed, biases=FRESH, steps=STEPS)
    mask = expected(options, seed, STEPS).update_dropout
    assert torch.equal(result.cells < 0.5, mask.expand(STEPS, ROWS, UNITS))


@pytest.mark.parametrize("seed", SEEDS)
def test_cell_dropout(target: Target, seed: int) -> None:
    options = Regularization(cell_dropout=0.2)
    result = call(target, options, seed, biases=FRESH, steps=STEPS)
    assert torch.equal(result.cells < 0.5, expected(options, seed).cell_dropout.expand(STEPS, ROWS, UNITS))


@pytest.mark.parametrize("seed", SEEDS)
def test_output_and_between_layer_dropout(target: Target, seed: int) -> None:
    for options in (Regularization(output_dropout=0.25), Regularization(dropout=0.35)):
        result = call(target, options, seed, biases=FRESH, steps=STEPS)
        drawn = expected(options, seed, STEPS)
        mask = drawn.output_dropout.expand(STEPS, ROWS, UNITS) if options.output_dropout else drawn.dropout
        assert torch.equal(result.output == 0, mask)
