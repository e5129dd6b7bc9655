"""The masks that the CUDA kernels draw, in every tier, bit for bit those of ``fusedreg/masks.py``.

No kernel returns a mask. But one that drops leaves zeros where it does: in a result, or in a gradient, for a layer that
is one step long and has nothing else in the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from emulated_cuda import TIERS, emulated, lstm_layer, use
from torch import Tensor

from fusedreg.layer import FORWARD, REVERSE, LayerOptions, LayerParameters
from fusedreg.masks import LayerMasks, layer_masks

pytestmark = emulated

ROWS, INPUTS, HIDDEN = 5, 7, 21
SEEDS = [0, -1, 0x0123456789ABCDEF]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    with use(request.param):
        yield request.param


def drawn(options: LayerOptions, seed: int, steps: int) -> LayerMasks:
    sizes = {"rows": ROWS, "input_size": INPUTS, "hidden_size": HIDDEN, "output_size": HIDDEN}
    return layer_masks(torch.tensor(seed), options, steps=steps, **sizes)


def positive(*shape: int) -> Tensor:
    """Numbers in [0.5, 1.5]: nothing but a mask makes a zero of their sums and products."""
    return 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def run(
    options: LayerOptions, seed: int, steps: int, gates: tuple[int, ...] = (0, 1, 2, 3), state: bool = True
) -> dict[str, Tensor]:
    """Results and gradients of a layer with positive weights, of which only some gates read anything."""
    read = torch.zeros(4, 1, 1)
    read[list(gates)] = 1.0
    leaves = {
        "input": positive(steps, ROWS, INPUTS),
        "hidden": positive(ROWS, HIDDEN) if state else torch.zeros(ROWS, HIDDEN),
        "cell": positive(ROWS, HIDDEN) if state else torch.zeros(ROWS, HIDDEN),
        "weight_ih": (0.1 * read * positive(4, HIDDEN, INPUTS)).flatten(0, 1),
        "weight_hh": (0.1 * read * positive(4, HIDDEN, HIDDEN)).flatten(0, 1),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    input, hidden, cell, *weights = leaves.values()
    parameters = LayerParameters(*weights, bias_ih=torch.full((4 * HIDDEN,), 0.5))  # no candidate is 0
    result = lstm_layer(input, hidden, cell, parameters, options, seed=torch.tensor(seed))
    # All that is summed on the way is positive, so nothing cancels.
    gradients = torch.autograd.grad(result.final_hidden.sum(), list(leaves.values()))
    values = {"output": result.output, "cells": result.cells, "final_hidden": result.final_hidden}
    values |= {f"grad {name}": one for name, one in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in values.items() if value is not None}


def options_of(**changes: object) -> LayerOptions:
    return dataclasses.replace(LayerOptions(layer=3, return_cells=True), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("direction", [FORWARD, REVERSE])
@pytest.mark.parametrize("name", ["dropout", "output_dropout"])
def test_masks_of_the_output(tier: str, name: str, direction: int, seed: int) -> None:
    options = options_of(direction=direction, **{name: 0.4})
    dropped = getattr(drawn(options, seed, 3), name)
    assert torch.equal(run(options, seed, 3)["output"] == 0, dropped.expand(3, ROWS, HIDDEN))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("direction", [FORWARD, REVERSE])
def test_masks_of_zoneout(tier: str, direction: int, seed: int) -> None:
    options = options_of(direction=direction, zoneout_hidden=0.3, zoneout_cell=0.6)
    masks = drawn(options, seed, 4)
    values = run(options, seed, 4)
    assert masks.zoneout_hidden is not None and masks.zoneout_cell is not None
    order = range(4) if direction == FORWARD else range(3, -1, -1)
    hidden, cell = positive(ROWS, HIDDEN), positive(ROWS, HIDDEN)
    for t in order:
        assert torch.equal(values["output"][t] == hidden, masks.zoneout_hidden[t])
        assert torch.equal(values["cells"][t] == cell, masks.zoneout_cell[t])
        hidden, cell = values["output"][t], values["cells"][t]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["step", "sequence"])
def test_masks_of_the_update(tier: str, kind: str, seed: int) -> None:
    options = options_of(update_dropout=0.4, update_mask=kind)
    dropped = drawn(options, seed, 1).update_dropout
    assert dropped is not None
    assert torch.equal(run(options, seed, 1, state=False)["cells"][0] == 0, dropped.view(ROWS, HIDDEN))


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_of_the_cell(tier: str, seed: int) -> None:
    options = options_of(cell_dropout=0.4)
    assert torch.equal(run(options, seed, 1)["cells"][0] == 0, drawn(options, seed, 1).cell_dropout)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["input_dropout", "hidden_dropout"])
def test_masks_of_what_all_gates_read(tier: str, name: str, seed: int) -> None:
    options = options_of(**{name: 0.4})
    dropped = getattr(drawn(options, seed, 1), name)
    gradient = run(options, seed, 1)["grad input" if name == "input_dropout" else "grad hidden"]
    assert torch.equal(gradient.view(dropped.shape) == 0, dropped)


@pytest.mark.parametrize("gate", range(4))
@pytest.mark.parametrize("name", ["input_dropout", "hidden_dropout"])
def test_masks_of_what_each_gate_reads(tier: str, name: str, gate: int) -> None:
    options = options_of(gate_masks="untied", **{name: 0.4})
    dropped = getattr(drawn(options, 11, 1), name)[:, gate]
    values = run(options, 11, 1, gates=(gate,))
    gradient = values["grad input" if name == "input_dropout" else "grad hidden"]
    assert torch.equal(gradient.view(dropped.shape) == 0, dropped)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["element", "row"])
def test_masks_of_the_weight(tier: str, kind: str, seed: int) -> None:
    options = options_of(weight_dropout=0.4, weight_mask=kind)
    dropped = drawn(options, seed, 1).weight_dropout
    assert dropped is not None
    assert torch.equal(run(options, seed, 1)["grad weight_hh"] == 0, dropped.expand(4 * HIDDEN, HIDDEN))
