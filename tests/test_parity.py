"""Every backend against the float64 reference, within the error budget: results and all gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import BATCH_NORMS, INSTRUCTION_SETS, LAYER_NORMS, REGULARIZERS, compiled, use_instruction_set

import fusedreg
from fusedreg.backends.common import DTYPES
from fusedreg.layer import FORWARD, REVERSE
from fusedreg.masks import masks
from fusedreg.regularization import BatchNorm, LayerNorm, Regularization
from fusedreg.testing import (
    LayerCase,
    PermutedSums,
    assert_within_budget,
    check_report,
    compare,
    eager_errors,
    implementation,
    make_arguments,
    one_thread,
    relative_error,
    run_layer,
)

BACKENDS = [pytest.param("cpu", marks=compiled)]
EVERY_BACKEND = ["reference", *BACKENDS]

MODES: dict[str, dict[str, object]] = {
    "plain": {},
    "lengths": {"ragged": True},
    "resets": {"resets": True},
    "reverse": {"direction": REVERSE, "ragged": True},
    "recompute": {"recompute": True},
    "evaluation": {"training": False},
}


def case_of(name: str, mode: str = "plain", **changes: object) -> LayerCase:
    regularization = REGULARIZERS[name]
    case = LayerCase(f"{name}-{mode}", regularization=regularization)
    if isinstance(regularization.norm, BatchNorm):
        case = replace(case, rows=12, hidden_size=10)
    return replace(case, **{**MODES[mode], **changes})  # type: ignore[arg-type]


def acts_in_evaluation(regularization: Regularization) -> bool:
    acting = (regularization.cell_dropout, regularization.zoneout_hidden, regularization.zoneout_cell)
    return regularization.norm is not None or any(acting)


MATRIX = [
    case_of(name, mode)
    for name, mode in itertools.product(REGULARIZERS, MODES)
    if mode != "evaluation" or name == "none" or acts_in_evaluation(REGULARIZERS[name])
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.id)
def test_float32(backend: str, case: LayerCase) -> None:
    assert_within_budget(implementation(backend), case)


REPRESENTATIVE = [
    *((name, mode) for name, mode in itertools.product(("none", "everything", "everything_untied"), MODES)),
    *((name, mode) for name in ("batch_norm", "layer_norm") for mode in ("lengths", "recompute", "evaluation")),
    *((name, "lengths") for name in ("zoneout_candidate", "weight_row", "update_sequence", "everything_batch_norm")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVE)
def test_other_types(backend: str, name: str, mode: str, dtype: torch.dtype) -> None:
    assert_within_budget(implementation(backend), case_of(name, mode, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "mode"), REPRESENTATIVE)
def test_reference_in_16_bits(name: str, mode: str, dtype: torch.dtype) -> None:
    """The reference is the other side of its own budget there; so hold it to absolute figures, and to its types."""
    report = assert_within_budget(implementation("reference"), case_of(name, mode, dtype=dtype))
    norm = REGULARIZERS[name].norm is not None
    for key, one in report.items():
        assert one.error < (40 if norm else 4) * torch.finfo(dtype).eps, key


# Around the widths of vectors (4, 8, 16), of tiles and blocks (64), and beyond one block of anything.
SHAPES = [
    # steps, rows, input_size, hidden_size
    (1, 1, 1, 1),
    (1, 3, 5, 4),
    (5, 1, 3, 1),
    (30, 1, 9, 7),
    (6, 1, 16, 16),
    (9, 2, 1, 8),
    (5, 6, 17, 9),
    (6, 7, 8, 15),
    (12, 4, 33, 17),
    (5, 9, 64, 32),
    (5, 8, 31, 33),
    (5, 5, 70, 63),
    (5, 6, 65, 64),
    (5, 3, 12, 65),
    (6, 13, 20, 130),
    (5, 33, 7, 12),
    (5, 2, 7, 257),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "T{}B{}I{}H{}".format(*shape))
@pytest.mark.parametrize("name", ["none", "everything", "everything_untied"])
def test_shapes(backend: str, name: str, shape: tuple[int, int, int, int]) -> None:
    steps, rows, inputs, hidden = shape
    changes = {"steps": steps, "rows": rows, "input_size": inputs, "hidden_size": hidden}
    if name != "none":
        changes |= {"ragged": True, "resets": True}
    if name == "everything_untied":
        changes |= {"direction": REVERSE}
    assert_within_budget(implementation(backend), case_of(name, **changes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "everything_layer_norm"])
@pytest.mark.parametrize("shape", [(5, 9, 17, 8), (5, 17, 8, 33), (6, 8, 65, 66), (5, 40, 5, 16), (4, 10, 3, 131)])
def test_norm_shapes(backend: str, name: str, shape: tuple[int, int, int, int]) -> None:
    steps, rows, inputs, hidden = shape
    case = case_of(name, steps=steps, rows=rows, input_size=inputs, hidden_size=hidden, resets=True)
    assert_within_budget(implementation(backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"bias": False},
        {"initial_state": False},
        {"return_cells": False},
        {"bias": False, "initial_state": False, "return_cells": False, "recompute": True},
        {"num_layers": 1},
        {"layer": 3, "num_layers": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["none", "everything", "everything_layer_norm"])
def test_optional_arguments(backend: str, name: str, changes: dict[str, object]) -> None:
    assert_within_budget(implementation(backend), case_of(name, **changes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["none", "everything_batch_norm", "everything_layer_norm"])
@pytest.mark.parametrize("recompute", [False, True])
def test_everything_at_once(backend: str, name: str, recompute: bool) -> None:
    case = case_of(name, "reverse", resets=True, recompute=recompute, steps=11)
    assert_within_budget(implementation(backend), case)


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_instruction_set(request.param) as reason:
        if reason:
            pytest.skip(f"not run: {reason}")
        yield request.param


SHAPED = [(5, 9, 17, 33), (6, 2, 8, 16), (5, 8, 3, 70)]


@compiled
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("shape", SHAPED, ids=lambda shape: "T{}B{}I{}H{}".format(*shape))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["none", "everything", "everything_untied", "everything_layer_norm", "batch_norm"])
def test_instruction_sets(
    instruction_set: str, name: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    steps, rows, inputs, hidden = shape
    if isinstance(REGULARIZERS[name].norm, BatchNorm):
        rows = max(rows, 9)
    case = case_of(name, dtype=dtype, steps=steps, rows=rows, input_size=inputs, hidden_size=hidden)
    assert_within_budget(implementation("cpu"), replace(case, ragged=rows > 2, resets=dtype != torch.float64))


# ---- Norms where the budget does not apply -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("norm", [*BATCH_NORMS.values(), *LAYER_NORMS.values()], ids=[*BATCH_NORMS, *LAYER_NORMS])
@pytest.mark.parametrize("recompute", [False, True])
def test_zero_variance_is_finite(backend: str, norm: BatchNorm | LayerNorm, recompute: bool) -> None:
    """All rows alike (batch norm) and all features alike (layer norm): no variance at all, and no NaN."""
    case = LayerCase("zero", rows=4, regularization=Regularization(norm=norm), recompute=recompute)
    arguments = make_arguments(case, 0)
    same_rows = {
        "input": arguments.input[:, :1].expand(-1, 4, -1).contiguous(),
        "initial_hidden": torch.zeros(4, case.hidden_size),
        "initial_cell": torch.zeros(4, case.hidden_size),
    }
    parameters = arguments.parameters._replace(
        weight_ih=torch.ones_like(arguments.parameters.weight_ih),
        weight_hh=torch.ones_like(arguments.parameters.weight_hh),
    )
    values = run_layer(implementation(backend), case, arguments._replace(parameters=parameters, **same_rows))
    for name, value in values.items():
        assert value.isfinite().all(), f"{name} is not finite"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("name", ["batch_norm", "everything_batch_norm"])
def test_batch_norm_of_few_rows(backend: str, name: str, rows: int) -> None:
    """Where rounding is amplified the budget says nothing, but float64 still has to agree to many digits."""
    case = case_of(name, rows=rows, dtype=torch.float64, ragged=True, resets=True)
    arguments = make_arguments(case, 0)
    ours = run_layer(implementation(backend), case, arguments)
    exact = run_layer(implementation("reference"), case, arguments)
    for key, value in exact.items():
        assert relative_error([(ours[key], value)]) < 1e-9, key
    single = replace(case, dtype=torch.float32)
    for key, value in run_layer(implementation(backend), single, arguments.to(torch.float32)).items():
        assert value.isfinite().all(), key


# ---- Stacked layers, two directions ------------------------------------------------------------------------------


def run_module(module: fusedreg.LSTM, dtype: torch.dtype, seed: int, ragged: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    directions = 2 if module.bidirectional else 1
    states = module.num_layers * directions

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    input = normal(6, 9, 5).requires_grad_()
    hx = (normal(states, 9, 12).requires_grad_(), normal(states, 9, 12).requires_grad_())
    lengths = torch.tensor([6, 6, 4, 6, 5, 0, 6, 1, 6]) if ragged else None
    result = module(input, hx, lengths=lengths, seed=seed + 1, return_cell_states=True)
    output, (h_n, c_n), cells = result
    loss = sum(((value * normal(*value.shape)).sum() for value in (output, h_n, c_n, cells)), torch.zeros(()))
    names = [name for name, _ in module.named_parameters()]
    leaves = [input, *hx, *module.parameters()]
    gradients = torch.autograd.grad(loss, leaves)
    values = {"output": output, "final_hidden": h_n, "final_cell": c_n, "cells": cells}
    values |= {f"grad {name}": one for name, one in zip(["input", "h_0", "c_0", *names], gradients, strict=True)}
    return {name: value.detach() for name, value in values.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["none", "everything", "everything_untied", "everything_layer_norm"])
def test_two_layers(backend: str, name: str, training: bool, ragged: bool, bidirectional: bool) -> None:
    torch.manual_seed(0)

    def module(used: str, dtype: torch.dtype) -> fusedreg.LSTM:
        made = fusedreg.LSTM(
            5, 12, 2, bidirectional=bidirectional, regularization=REGULARIZERS[name], backend=used, dtype=dtype
        )
        made.load_state_dict(state)
        return made.train(training)

    state = fusedreg.LSTM(5, 12, 2, bidirectional=bidirectional, regularization=REGULARIZERS[name]).state_dict()
    seeds = range(4)
    with one_thread():
        exact = [run_module(module("reference", torch.float64), torch.float64, seed, ragged) for seed in seeds]
        eager = module("reference", torch.float32)
        orders = [[run_module(eager, torch.float32, seed, ragged) for seed in seeds]]
        with PermutedSums():
            orders.append([run_module(eager, torch.float32, seed, ragged) for seed in seeds])
    runs = [run_module(module(backend, torch.float32), torch.float32, seed, ragged) for seed in seeds]
    report, faults = compare(runs, exact, eager_errors(orders, exact), torch.float32)
    check_report(f"two layers of {name}", report, faults)


# ---- What must be equal, not close -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("name", [name for name, one in REGULARIZERS.items() if not acts_in_evaluation(one)])
@pytest.mark.parametrize("direction", [FORWARD, REVERSE])
def test_evaluation_without_anything_acting_is_the_plain_layer(backend: str, name: str, direction: int) -> None:
    case = case_of(name, "evaluation", direction=direction)
    arguments = make_arguments(case, 3)
    plain = run_layer(implementation(backend), replace(case, regularization=Regularization()), arguments)
    for key, value in run_layer(implementation(backend), case, arguments).items():
        assert torch.equal(value, plain[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(REGULARIZERS))
def test_inference_equals_training_forward(backend: str, name: str) -> None:
    """Nothing is saved under no_grad; what comes out must not depend on that."""
    for mode in ("lengths", "resets", "evaluation"):
        case = case_of(name, mode)
        arguments = make_arguments(case, 4)
        with_graph = run_layer(implementation(backend), case, arguments)
        with torch.no_grad():
            without = run_layer(implementation(backend), case, arguments, backward=False)
        for key, value in without.items():
            assert torch.equal(value, with_graph[key]), f"{mode}: {key}"


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_zoneout_selects(backend: str) -> None:
    """What is zoned out does not reach the state, not even as NaN times zero: one bad input spoils one candidate."""
    module = fusedreg.LSTM(4, 33, zoneout_hidden=0.5, zoneout_cell=0.5, backend=backend)
    input = torch.randn(1, 5, 4)
    input[0, 2, 1] = float("nan")
    output, (h_n, c_n) = module(input, seed=3)
    drawn = masks(3, module.regularization, input_size=4, hidden_size=33, batch_size=5, steps=1)["l0"]
    for value, zone in ((h_n[0], drawn.zoneout_hidden), (c_n[0], drawn.zoneout_cell)):
        assert zone is not None
        assert not value[torch.arange(5) != 2].isnan().any()
        assert torch.equal(value[2].isnan(), ~zone[0, 2])
    assert torch.equal(output[0].isnan(), h_n[0].isnan())
