"""Triton's operators on several models at once, under the interpreter: a call for each, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_support  # noqa: F401  # before the kernels
from helpers import compiled
from test_models import FULL, SAVES, case_of, check_both, forward_arguments, pair_of, refused, together
from torch.func import functional_call, grad, stack_module_state, vmap

import fusedreg
from fusedreg.backends import availability

pytestmark = [
    compiled,
    pytest.mark.skipif(not availability("triton"), reason=f"not run: {availability('triton').reason}"),
]


@pytest.mark.parametrize(
    ("name", "save", "changes"),
    [
        ("everything_batch_norm", "gates", {"steps": 2}),
        ("everything_layer_norm", "recompute", {**FULL, "steps": 2, "rows": 2, "dtype": torch.bfloat16}),
    ],
)
def test_a_model_is_a_call_of_its_own(name: str, save: str, changes: dict[str, Any]) -> None:
    check_both(pair_of("fusedreg", "triton_lstm_layer"), case_of(name, **changes), SAVES[save], models=2)


def test_what_does_not_fit_is_refused() -> None:
    forward = pair_of("fusedreg", "triton_lstm_layer").forward
    every = together([forward_arguments(case_of("everything"), SAVES["gates"], seed) for seed in range(2)])
    for key in ("weight_hh", "bias_ih", "initial_cell", "seed"):
        refused(forward, every | {key: every[key][0]}, f"{key}: expected an axis of 2 models in front")
        refused(forward, every | {key: torch.cat([every[key]] * 2)}, f"{key}: expected an axis of 2 models in front")
    refused(forward, every | {"weight_ih": every["weight_ih"][:, 1:]}, "weight_ih: expected")
    refused(forward, every | {"input": every["input"][None]}, "input")


def test_an_ensemble() -> None:
    modules = [fusedreg.LSTM(3, 8, zoneout_cell=0.3, weight_dropout=0.2, backend="triton") for _ in range(2)]
    parameters, _ = stack_module_state(modules)  # type: ignore[arg-type]
    parameters = {name: value.detach() for name, value in parameters.items()}
    inputs = torch.randn(2, 2, 2, 3)
    found = []
    for backend in ("triton", "cpu"):
        modules[0].backend = backend
        gradient = grad(lambda own, x: functional_call(modules[0], own, (x,), {"seed": 7})[0].square().sum())
        found.append(vmap(gradient)(parameters, inputs))
    torch.testing.assert_close(*found)
