"""The whole option space at random, against the reference. The seed stands in pytest's header and summary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import compiled, use_instruction_set
from hypothesis import event, example, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedreg
from fusedreg.layer import FORWARD, REVERSE
from fusedreg.regularization import BatchNorm, LayerNorm, Regularization
from fusedreg.testing import (
    LayerCase,
    assert_within_budget,
    implementation,
    make_arguments,
    relative_error,
    run_layer,
)

pytestmark = compiled

RATES = st.one_of(st.just(0.0), st.just(0.0), st.sampled_from([0.05, 0.3, 0.5, 0.75]))


@st.composite
def norms(draw: st.DrawFn) -> BatchNorm | LayerNorm | None:
    kind = draw(st.sampled_from(["none", "batch", "layer"]))
    if kind == "none":
        return None
    terms = draw(st.sets(st.sampled_from(["input", "recurrent", "cell"]), min_size=1))
    on = {name: name in terms for name in ("input", "recurrent", "cell")}
    eps = draw(st.sampled_from([1e-5, 1e-2]))
    if kind == "layer":
        return LayerNorm(**on, eps=eps)
    statistics: Any = draw(st.sampled_from(["per_step", "shared"]))
    steps = draw(st.integers(1, 9)) if statistics == "per_step" else None
    pooled: Any = draw(st.sampled_from(["step", "sequence"]))
    return BatchNorm(max_steps=steps, **on, statistics=statistics, input_statistics=pooled, eps=eps)


@st.composite
def regularizations(draw: st.DrawFn) -> Regularization:
    options: dict[str, Any] = {
        name: draw(RATES)
        for name in (
            "dropout",
            "input_dropout",
            "hidden_dropout",
            "output_dropout",
            "update_dropout",
            "cell_dropout",
            "weight_dropout",
            "zoneout_hidden",
            "zoneout_cell",
        )
    }
    options["gate_masks"] = draw(st.sampled_from(["tied", "untied"]))
    options["update_mask"] = draw(st.sampled_from(["step", "sequence"]))
    options["weight_mask"] = draw(st.sampled_from(["element", "row"]))
    options["zoneout_output"] = draw(st.sampled_from(["state", "candidate"]))
    return Regularization(**options, norm=draw(norms()))


@st.composite
def cases(draw: st.DrawFn) -> LayerCase:
    num_layers = draw(st.integers(1, 3))
    flags = st.booleans()
    hidden_size = draw(st.one_of(st.integers(1, 9), st.integers(10, 70)))
    return LayerCase(
        "random",
        steps=draw(st.integers(1, 9)),
        rows=draw(st.one_of(st.integers(1, 6), st.integers(7, 34))),
        input_size=draw(st.one_of(st.integers(1, 5), st.integers(6, 70))),
        hidden_size=hidden_size,
        proj_size=draw(st.one_of(st.just(0), st.integers(1, hidden_size))),
        probes=draw(flags),
        regularization=draw(regularizations()),
        layer=draw(st.integers(0, num_layers - 1)),
        num_layers=num_layers,
        direction=draw(st.sampled_from([FORWARD, REVERSE])),
        training=draw(flags),
        recompute=draw(flags),
        return_cells=draw(flags),
        ragged=draw(flags),
        resets=draw(flags),
        bias=draw(flags),
        initial_state=draw(flags),
    )


def padding_is_zero(ours: dict[str, Tensor], case: LayerCase, lengths: Tensor | None) -> None:
    if lengths is None:
        return
    padding = torch.arange(case.steps)[:, None] >= lengths.clamp(0, case.steps)[None, :]
    for name in ("output", "cells", "grad input", "grad hidden_probe", "grad cell_probe"):
        if name in ours:
            assert (ours[name][padding] == 0).all(), f"{name} is not zero in padding"


# What norms of few rows or features may make of float64's rounding.
NORM_ERROR = 1e-6


def agree(ours: dict[str, Tensor], exact: dict[str, Tensor], allowed: float) -> None:
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype, name
        if allowed < NORM_ERROR:
            # Behind a norm of very few values a zero may be the luck of a cancellation; the zeros that are there by
            # right are asked for by `padding_is_zero`, and by the parity and memory-safety tests.
            zero = value == 0
            assert (ours[name][zero] == 0).all(), f"{name} is not zero where the reference is"
        error = relative_error([(ours[name], value)])
        # Gradients that vanish but for rounding have no relative error.
        assert error < allowed or (ours[name] - value).abs().max() < 1e-12, f"{name}: {error:.1e}"


def allowed_error(regularization: Regularization) -> float:
    """In float64: rounding, which norms of few rows or features amplify."""
    return 1e-12 if regularization.norm is None else NORM_ERROR


# One unit: a norm over it has no spread, and what it passes back cancels to exactly 0.
ONE_UNIT = LayerCase(
    "one unit",
    steps=3,
    rows=2,
    input_size=1,
    hidden_size=1,
    regularization=Regularization(norm=LayerNorm()),
    training=False,
    ragged=True,
    resets=True,
    bias=False,
    initial_state=False,
)


@settings(max_examples=150)
@given(case=cases(), seed=st.integers(0, 2**16))
@example(case=ONE_UNIT, seed=1)
def test_layer_in_float64(case: LayerCase, seed: int) -> None:
    """Any shape, however small: float64 leaves no doubt whether a difference is rounding."""
    case = replace(case, dtype=torch.float64)
    event(f"norm {type(case.regularization.norm).__name__}")
    arguments = make_arguments(case, seed)
    exact = run_layer(implementation("reference"), case, arguments)
    ours = run_layer(implementation("cpu"), case, arguments)
    agree(ours, exact, allowed_error(case.regularization))
    padding_is_zero(ours, case, arguments.lengths)


@pytest.mark.parametrize("instruction_set", ["avx2", "portable"])
@settings(max_examples=40)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_layer_with_other_instructions(instruction_set: str, case: LayerCase, seed: int) -> None:
    case = replace(case, dtype=torch.float64)
    with use_instruction_set(instruction_set) as reason:
        if reason:
            pytest.skip(f"not run: {reason}")
        arguments = make_arguments(case, seed)
        exact = run_layer(implementation("reference"), case, arguments)
        ours = run_layer(implementation("cpu"), case, arguments)
        agree(ours, exact, allowed_error(case.regularization))
        padding_is_zero(ours, case, arguments.lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=40)
@given(case=cases())
def test_layer_within_budget(dtype: torch.dtype, case: LayerCase) -> None:
    """The error budget, where it says something.

    Eight rows and some features, so that no error is the luck of a few numbers, and an ``eps`` that keeps norms of
    nearly constant values from amplifying rounding. The float64 tests above go everywhere else.
    """
    regularization = case.regularization
    if regularization.norm is not None:
        regularization = replace(regularization, norm=replace(regularization.norm, eps=0.1))
    assert_within_budget(
        implementation("cpu"),
        replace(
            case,
            dtype=dtype,
            regularization=regularization,
            hidden_size=max(case.hidden_size, 16),
            proj_size=max(case.proj_size, 16) if case.proj_size else 0,
            rows=max(case.rows, 12),
        ),
    )


# ---- The module ----------------------------------------------------------------------------------------------------


@st.composite
def modules(draw: st.DrawFn) -> dict[str, Any]:
    hidden_size = draw(st.integers(1, 20))
    return {
        "input_size": draw(st.integers(1, 12)),
        "hidden_size": hidden_size,
        "proj_size": draw(st.sampled_from([0, hidden_size // 2])),
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "regularization": draw(regularizations()),
        "recompute": draw(st.booleans()),
        "training": draw(st.booleans()),
    }


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "steps": draw(st.integers(1, 7)),
        "rows": draw(st.integers(2, 9)),
        "kind": draw(st.sampled_from(["padded", "lengths", "packed", "unbatched"])),
        "hx": draw(st.booleans()),
        "reset": draw(st.booleans()),
        "cells": draw(st.booleans()),
        "seed": draw(st.integers(-(2**63), 2**64 - 1)),
        "values": draw(st.integers(0, 2**16)),
    }


def call_module(backend: str, made: dict[str, Any], call: dict[str, Any]) -> dict[str, Tensor]:
    """Results, gradients and running statistics of one call of a module, in float64."""
    made = dict(made)
    training = made.pop("training")
    torch.manual_seed(0)
    module = fusedreg.LSTM(**made, dtype=torch.float64, backend=backend).train(training)
    generator = torch.Generator().manual_seed(call["values"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps, rows = call["steps"], call["rows"]
    norm = made["regularization"].norm
    unbatched = call["kind"] == "unbatched" and not (isinstance(norm, BatchNorm) and training)
    layout = (rows, steps) if made["batch_first"] else (steps, rows)
    layout = (steps,) if unbatched else layout
    leaf = normal(*layout, made["input_size"]).requires_grad_()
    lengths = torch.randint(0, steps + 1, (rows,), generator=generator)
    input: Tensor | PackedSequence = leaf
    keywords: dict[str, Any] = {"seed": call["seed"], "return_cell_states": call["cells"]}
    if call["kind"] == "packed":
        input = pack_padded_sequence(leaf, lengths.clamp(min=1), made["batch_first"], enforce_sorted=False)
    elif call["kind"] == "lengths":
        keywords["lengths"] = lengths
    if call["reset"] and not made["bidirectional"] and call["kind"] != "packed":
        keywords["reset"] = torch.rand(layout, generator=generator) < 0.3
    states = made["num_layers"] * (2 if made["bidirectional"] else 1)
    shape = (states,) if unbatched else (states, rows)
    sizes = (made["proj_size"] or made["hidden_size"], made["hidden_size"])
    hx = tuple(normal(*shape, size).requires_grad_() for size in sizes) if call["hx"] else None

    output, (hidden, cell), *cells = module(input, hx, **keywords)
    results = {"output": output, "hidden": hidden, "cell": cell}
    results |= {"cells": cells[0]} if cells else {}
    flat = {name: one.data if isinstance(one, PackedSequence) else one for name, one in results.items()}
    # Odd in the sign of a unit, so that gradients of neighbouring units do not cancel.
    loss = torch.stack([(one * torch.linspace(-1, 2, one.numel()).view(one.shape)).sum() for one in flat.values()])
    leaves = {"input": leaf, **dict(module.named_parameters())}
    if hx is not None:
        leaves |= {"h_0": hx[0], "c_0": hx[1]}
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    values = {name: one.detach() for name, one in flat.items()}
    values |= {f"grad {name}": one for name, one in zip(leaves, gradients, strict=True)}
    return values | {f"buffer {name}": one for name, one in module.named_buffers()}


EVERYTHING = Regularization(0.3, 0.3, 0.3, 0.3, 0.3, 0.1, 0.3, 0.2, 0.4)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@settings(max_examples=80)
@given(made=modules(), call=calls())
@example(
    made={
        "input_size": 3,
        "hidden_size": 5,
        "proj_size": 0,
        "num_layers": 2,
        "bias": True,
        "batch_first": True,
        "bidirectional": True,
        "regularization": EVERYTHING,
        "recompute": False,
        "training": True,
    },
    call={
        "steps": 4,
        "rows": 3,
        "kind": "packed",
        "hx": True,
        "reset": False,
        "cells": True,
        "seed": -1,
        "values": 0,
    },
)
def test_module(made: dict[str, Any], call: dict[str, Any]) -> None:
    note(f"{made['regularization']}")
    event(f"kind {call['kind']}")
    exact = call_module("reference", made, call)
    agree(call_module("cpu", made, call), exact, allowed_error(made["regularization"]))
