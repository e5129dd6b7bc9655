"""Probes: what reaches ``h_s`` and ``c_s`` on the way back, read off a normal backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import REGULARIZERS, compiled
from naive import Naive
from torch import Tensor, nn

from fusedreg.layer import REVERSE, LayerOptions, LayerParameters
from fusedreg.masks import layer_masks
from fusedreg.regularization import BatchNorm
from fusedreg.testing import LayerCase, implementation, make_arguments, run_layer

BACKENDS = ["reference", pytest.param("cpu", marks=compiled)]
NAMES = ["none", "everything", "everything_untied", "zoneout_candidate", "batch_norm", "everything_layer_norm"]


def case_of(name: str, **changes: Any) -> LayerCase:
    case = LayerCase(name, regularization=REGULARIZERS[name], dtype=torch.float64, probes=True)
    return replace(case, **{"rows": 12 if isinstance(case.regularization.norm, BatchNorm) else 5, **changes})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("proj_size", [0, 4])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_reference_adds_them(name: str, proj_size: int, ragged: bool) -> None:
    """With probes that are not zero, against the second statement: results and every gradient, theirs too."""
    case = case_of(name, proj_size=proj_size, ragged=ragged, resets=ragged, direction=int(ragged))
    made = make_arguments(case, 1)
    hidden_width = proj_size or case.hidden_size
    probes = (
        0.1 * torch.randn(case.steps, case.rows, hidden_width, dtype=torch.float64),
        0.1 * torch.randn(case.steps, case.rows, case.hidden_size, dtype=torch.float64),
    )
    leaves = [value.clone().requires_grad_() for value in (made.input, *probes)]
    result = implementation("reference")(
        leaves[0], *made[1:4], case.options, lengths=made.lengths, reset=made.reset, seed=made.seed,
        running=made.running, probes=(leaves[1], leaves[2]),
    )  # fmt: skip
    drawn = layer_masks(
        made.seed, case.options, steps=case.steps, rows=case.rows, input_size=case.input_size,
        hidden_size=case.hidden_size, output_size=hidden_width,
    )  # fmt: skip
    lengths = [case.steps] * case.rows if made.lengths is None else made.lengths.tolist()
    naive = Naive(made.parameters, case.options, drawn, made.running, probes=(leaves[1], leaves[2]))
    assert made.initial_hidden is not None and made.initial_cell is not None
    expected = naive.run(leaves[0], made.initial_hidden, made.initial_cell, lengths, made.reset)
    for one, two in zip(result[:4], expected, strict=True):
        torch.testing.assert_close(one, two)
    weights = list(made.gradients.values())
    ours = torch.autograd.grad(list(result[:4]), leaves, weights)
    for one, two in zip(ours, torch.autograd.grad(list(expected), leaves, weights), strict=True):
        torch.testing.assert_close(one, two)
        if made.lengths is not None:
            padding = torch.arange(case.steps)[:, None] >= made.lengths
            assert not one[padding].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_the_gradients_of_the_states(backend: str) -> None:
    """Against an LSTM written out with ``nn.LSTMCell``, whose states keep their gradients."""
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 4, dtype=torch.float64)
    input, weights = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(6, 2, 4, dtype=torch.float64)
    h = c = torch.zeros(2, 4, dtype=torch.float64)
    hidden, cells = [], []
    for step in input:
        h, c = cell(step, (h, c))
        h.retain_grad()
        c.retain_grad()
        hidden.append(h)
        cells.append(c)
    ((torch.stack(hidden) * weights).sum() + c.pow(2).sum()).backward()

    probes = (torch.zeros(6, 2, 4, dtype=torch.float64), torch.zeros(6, 2, 4, dtype=torch.float64))
    for probe in probes:
        probe.requires_grad_()
    parameters = LayerParameters(*(value.detach() for value in cell.parameters()))
    result = implementation(backend)(input, None, None, parameters, LayerOptions(), probes=probes)
    ((result.output * weights).sum() + result.final_cell.pow(2).sum()).backward()
    for probe, states in zip(probes, (hidden, cells), strict=True):
        torch.testing.assert_close(probe.grad, torch.stack([state.grad for state in states]))  # type: ignore[misc]


@compiled
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chosen", [(True, False), (False, True), (True, True)], ids=["hidden", "cell", "both"])
def test_kernels_give_those_that_are_asked_for(name: str, chosen: tuple[bool, bool]) -> None:
    """And only those, whatever the probes' strides; other gradients and results do not depend on it, bit for bit."""
    case = case_of(name, ragged=True, resets=True, direction=REVERSE, recompute=chosen == (True, True))
    made = make_arguments(case, 2)
    plain = run_layer(implementation("cpu"), replace(case, probes=False), made._replace(probes=None))
    exact = run_layer(implementation("reference"), case, made)
    shapes = [(case.steps, case.rows, case.hidden_size)] * 2
    probes = [
        torch.zeros((), dtype=torch.float64).expand(shape).requires_grad_(on)
        for shape, on in zip(shapes, chosen, strict=True)
    ]
    leaf = made.input.clone().requires_grad_()
    result = implementation("cpu")(
        leaf, *made[1:4], case.options, lengths=made.lengths, reset=made.reset, seed=made.seed,
        running=made.running, probes=(probes[0], probes[1] if chosen[1] else None),
    )  # fmt: skip
    wanted = [leaf, *(probe for probe, on in zip(probes, chosen, strict=True) if on)]
    gradients = torch.autograd.grad(list(result[:4]), wanted, list(made.gradients.values()))
    assert torch.equal(gradients[0], plain["grad input"])
    names = [name for name, on in zip(("hidden_probe", "cell_probe"), chosen, strict=True) if on]
    for key, gradient in zip(names, gradients[1:], strict=True):
        torch.testing.assert_close(gradient, exact[f"grad {key}"], rtol=1e-9, atol=1e-11)
        assert torch.equal(gradient == 0, exact[f"grad {key}"] == 0)


@compiled
def test_kernels_do_not_read_them() -> None:
    case = case_of("everything")
    made = make_arguments(case, 3)
    assert made.probes is not None
    spoiled = (torch.full_like(made.probes[0], torch.nan), torch.full_like(made.probes[1], torch.nan))
    expected = run_layer(implementation("cpu"), case, made)
    for key, value in run_layer(implementation("cpu"), case, made._replace(probes=spoiled)).items():
        assert torch.equal(value, expected[key]), key


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_their_types(dtype: torch.dtype) -> None:
    """The hidden probe's gradient is of the input's type, the cell probe's of the compute type."""
    case = case_of("none", dtype=dtype)
    values = run_layer(implementation("cpu"), case, make_arguments(case, 0))
    assert (values["grad hidden_probe"].dtype, values["grad cell_probe"].dtype) == (dtype, torch.float32)


@compiled
def test_probes_that_do_not_fit_are_refused() -> None:
    case = case_of("none")
    made = make_arguments(case, 0)
    assert made.probes is not None
    for wrong, message in (
        ((made.probes[0][1:], None), r"hidden_probe: expected shape \(T, B, P\)"),
        ((None, made.probes[1].float()), "cell_probe: expected dtype float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            implementation("cpu")(*made[:4], case.options, seed=made.seed, probes=wrong)


def test_seeds_of_groups_in_the_reference() -> None:
    """Each group of rows draws as a call of its own does, its steps counted from the first one given."""
    case = case_of("everything", rows=6, probes=False)
    made = make_arguments(case, 0)
    seeds = torch.tensor([[5, 0], [5, 3]])
    options = case.options
    together = implementation("reference")(*made[:4], options, seed=seeds)
    sizes = {"input_size": case.input_size, "hidden_size": case.hidden_size, "output_size": case.hidden_size}
    drawn = layer_masks(seeds, options, steps=case.steps, rows=6, **sizes)
    longer = layer_masks(torch.tensor(5), options, steps=case.steps + 3, rows=3, **sizes)
    for name in ("dropout", "zoneout_hidden", "zoneout_cell", "update_dropout"):
        own, expected = getattr(drawn, name), getattr(longer, name)
        assert torch.equal(own[:, :3], expected[: case.steps])
        assert torch.equal(own[:, 3:], expected[3:])
    for name in ("input_dropout", "hidden_dropout", "output_dropout", "cell_dropout"):
        assert torch.equal(getattr(drawn, name), getattr(longer, name).repeat(2, 1))
    assert torch.equal(drawn.weight_dropout, longer.weight_dropout)  # type: ignore[arg-type]
    alone: list[Tensor | None] = [value if value is None else value[..., :3, :] for value in made[:3]]
    first = implementation("reference")(*alone, made.parameters, options, seed=torch.tensor(5))
    torch.testing.assert_close(first.output, together.output[:, :3])
