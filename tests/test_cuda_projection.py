"""The CUDA kernels with ``proj_size``, on the emulated device: parity, masks and the tier. ``h`` and ``y`` have ``P``
units then, ``c`` and the gates ``H``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulated_cuda import emulated, lstm_layer, use
from helpers import REGULARIZERS
from test_parity import REPRESENTATIVE, acts_in_evaluation, case_of
from test_random_options import agree, allowed_error, padding_is_zero

from fusedreg.layer import FORWARD, REVERSE, LayerOptions, LayerParameters
from fusedreg.masks import LayerMasks, layer_masks
from fusedreg.testing import LayerCase, assert_within_budget, implementation, one_thread, run_layer
from fusedreg.testing.cases import make_arguments

pytestmark = emulated


def check(case: LayerCase, seeds: int = 3) -> None:
    with use("step"), one_thread():
        assert_within_budget(lstm_layer, case, seeds=seeds)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regulariser(name: str) -> None:
    for mode in ("reverse", "recompute"):
        check(case_of(name, mode, steps=5, proj_size=4, resets=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVE)
def test_16_bits(name: str, mode: str, dtype: torch.dtype) -> None:
    if mode != "evaluation" or name == "none" or acts_in_evaluation(REGULARIZERS[name]):
        check(case_of(name, mode, steps=5, rows=9, hidden_size=13, proj_size=7, dtype=dtype))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_float64(name: str) -> None:
    """Exact but for rounding: what is missing or in the wrong place shows."""
    case = case_of(name, "lengths", steps=5, proj_size=4, dtype=torch.float64, probes=True)
    arguments = make_arguments(case, 1)
    exact = run_layer(implementation("reference"), case, arguments)
    with use("step"):
        ours = run_layer(lstm_layer, case, arguments)
    agree(ours, exact, allowed_error(case.regularization))
    padding_is_zero(ours, case, arguments.lengths)


# One unit of either kind, more than a warp and a block of them, P near H and above it.
@pytest.mark.parametrize(
    ("hidden_size", "proj_size"), [(1, 1), (2, 1), (9, 8), (37, 33), (300, 3), (7, 12), (260, 257)]
)
@pytest.mark.parametrize("name", ["none", "everything_untied"])
def test_sizes(name: str, hidden_size: int, proj_size: int) -> None:
    changes = {"steps": 3, "rows": 3, "hidden_size": hidden_size, "proj_size": proj_size}
    check(case_of(name, **changes, ragged=name != "none"), seeds=2)


@pytest.mark.parametrize("changes", [{"bias": False, "initial_state": False}, {"return_cells": False}], ids=str)
def test_optional_arguments(changes: dict[str, object]) -> None:
    check(case_of("everything", **{"steps": 3, "proj_size": 4, **changes}))


@pytest.mark.parametrize("tier", ["grid", "cluster"])
@pytest.mark.parametrize("proj_size", [4, 11], ids=["narrower", "as wide"])
def test_persistent_tiers_say_that_they_have_none(tier: str, proj_size: int) -> None:
    case = LayerCase("refused", steps=2, proj_size=proj_size)
    given = make_arguments(case, 0)
    message = rf"a projection \(H = 11 to P = {proj_size}\) has no kernel but that of the step tier"
    with use(tier), pytest.raises(RuntimeError, match=message):
        lstm_layer(*given[:4], case.options)
    with use("auto"), one_thread():
        assert_within_budget(lstm_layer, case, seeds=1)


# ---- Masks: those of h and y count units of P, those of c units of H ---------------------------------------------

ROWS, HIDDEN, PROJECTED, STEPS = 4, 21, 13, 3


def drawn(options: LayerOptions, seed: int) -> LayerMasks:
    sizes = {"rows": ROWS, "input_size": 7, "hidden_size": HIDDEN, "output_size": PROJECTED}
    return layer_masks(torch.tensor(seed), options, steps=STEPS, **sizes)


def run(options: LayerOptions, seed: int) -> dict[str, torch.Tensor]:
    """Of a layer with positive weights, inputs and states: nothing but a mask makes a zero or repeats a state."""

    def positive(*shape: int) -> torch.Tensor:
        return 0.1 * (0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(0)))

    hidden = positive(ROWS, PROJECTED).requires_grad_()
    cell = positive(ROWS, HIDDEN)
    parameters = LayerParameters(
        positive(4 * HIDDEN, 7), positive(4 * HIDDEN, PROJECTED), weight_hr=positive(PROJECTED, HIDDEN)
    )
    parameters.weight_hh.requires_grad_()
    result = lstm_layer(positive(STEPS, ROWS, 7), hidden, cell, parameters, options, seed=torch.tensor(seed))
    # Of the first step: what is summed on the way is positive, so nothing cancels.
    first = 0 if options.direction == FORWARD else STEPS - 1
    gradients = torch.autograd.grad(result.output[first].sum(), (hidden, parameters.weight_hh))
    return {
        "output": result.output.detach(),
        "cells": result.cells.detach(),  # type: ignore[union-attr]
        "grad hidden": gradients[0],
        "grad weight_hh": gradients[1],
        "hidden": hidden.detach(),
        "cell": cell,
    }


@pytest.mark.parametrize("direction", [FORWARD, REVERSE])
@pytest.mark.parametrize("seed", [0, 0x0123456789ABCDEF])
def test_masks(direction: int, seed: int) -> None:
    options = LayerOptions(layer=2, direction=direction, return_cells=True)

    def both(**rates: float) -> tuple[dict[str, torch.Tensor], LayerMasks]:
        changed = dataclasses.replace(options, **rates)  # type: ignore[arg-type]
        with use("step"):
            return run(changed, seed), drawn(changed, seed)

    for name in ("dropout", "output_dropout"):
        values, masks = both(**{name: 0.4})
        assert torch.equal(values["output"] == 0, getattr(masks, name).expand(STEPS, ROWS, PROJECTED))
    values, masks = both(hidden_dropout=0.4)
    assert torch.equal(values["grad hidden"] == 0, masks.hidden_dropout)
    values, masks = both(weight_dropout=0.4)
    assert torch.equal(values["grad weight_hh"] == 0, masks.weight_dropout)
    values, masks = both(zoneout_hidden=0.3, zoneout_cell=0.6)
    hidden, cell = values["hidden"], values["cell"]
    for t in range(STEPS) if direction == FORWARD else reversed(range(STEPS)):
        assert torch.equal(values["output"][t] == hidden, masks.zoneout_hidden[t])
        assert torch.equal(values["cells"][t] == cell, masks.zoneout_cell[t])
        hidden, cell = values["output"][t], values["cells"][t]
