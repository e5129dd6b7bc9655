"""Groups of rows inside one call of the operators: seeds and first steps of their own, and gradients of their own.

Each group is to be what a call with its rows alone is. :mod:`fusedreg.batching` relies on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import INSTRUCTION_SETS, REGULARIZERS, compiled, use_instruction_set
from torch import Tensor

from fusedreg import ops
from fusedreg.encoding import DIFFERENTIABLE, GRADIENT_GROUPS, NUMBER_OF_TENSORS, TENSOR_ARGUMENTS
from fusedreg.regularization import BatchNorm
from fusedreg.testing import LayerCase, make_arguments

pytestmark = compiled

GROUPS = 3
FORWARD, BACKWARD = torch.ops.fusedreg.lstm_layer_forward, torch.ops.fusedreg.lstm_layer_backward
GRADIENTS = ("output", "final_hidden", "final_cell", "cells")
# The axis of the rows in the tensors that have one.
ROW_AXIS = {"input": 1, "initial_hidden": 0, "initial_cell": 0, "lengths": 0, "reset": 1}
PER_SAMPLE = [name for name in REGULARIZERS if not isinstance(REGULARIZERS[name].norm, BatchNorm)]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_case(name: str, **changes: Any) -> LayerCase:
    sizes = {"steps": 5, "rows": 2 * GROUPS, "input_size": 7, "hidden_size": 19}
    return LayerCase(name, regularization=REGULARIZERS[name], **{**sizes, **changes})


def seeds_of(case: LayerCase) -> Tensor:
    """Seeds and first steps of all groups; one seed where all groups share the weights' mask."""
    seeds = torch.tensor([[5, 0], [-(2**60) + 1, 3], [2**33, 11]])
    if case.options.weight_dropout > 0:
        seeds[:, 0] = 5
    return seeds


def forward_arguments(case: LayerCase, seed: Tensor) -> list[Any]:
    made = make_arguments(case, seed=1)
    tensors: dict[str, Any] = dict.fromkeys(TENSOR_ARGUMENTS)
    tensors |= {name: value for name, value in made._asdict().items() if name in tensors}
    tensors |= made.parameters._asdict()
    if made.running is not None:
        tensors |= {
            name if name.startswith("running_") else f"running_{name}": value
            for name, value in made.running._asdict().items()
        }
    if made.seed is not None:
        tensors["seed"] = seed
    save = ops.SAVE_RECOMPUTE if case.recompute else ops.SAVE_GATES
    return [*(tensors[name] for name in TENSOR_ARGUMENTS), *ops.encode_options(case.options, save)]


def backward_arguments(case: LayerCase, forward: list[Any], results: Any, groups: int, rows: slice) -> list[Any]:
    made = make_arguments(case, seed=1)
    grads = [made.gradients[name][(slice(None), rows) if name in ("output", "cells") else rows] for name in GRADIENTS]
    incoming = [grad.contiguous() for grad in grads]
    hidden = results[4] if results[4].dim() == 3 else results[0]
    rates, options, eps = forward[NUMBER_OF_TENSORS:]
    options = [*options]
    options[GRADIENT_GROUPS] = groups
    needed = [forward[position] is not None for position in DIFFERENTIABLE]
    tensors = forward[:NUMBER_OF_TENSORS]
    return [*incoming, *tensors, results[3], hidden, *results[5:], rates, options, eps, needed]


def of_group(forward: list[Any], group: int, rows: slice) -> list[Any]:
    """The arguments of a call with one group's rows alone."""
    own = list(forward)
    for name, axis in ROW_AXIS.items():
        place = TENSOR_ARGUMENTS.index(name)
        if own[place] is not None:
            own[place] = own[place][(slice(None),) * axis + (rows,)].contiguous()
    place = TENSOR_ARGUMENTS.index("seed")
    if own[place] is not None:
        own[place] = own[place][group : group + 1]
    return own


def check(case: LayerCase) -> None:
    """One call with all groups against one call a group, forward and backward."""
    forward = forward_arguments(case, seeds_of(case))
    together = FORWARD(*forward)
    gradients = BACKWARD(*backward_arguments(case, forward, together, GROUPS, slice(None)))
    tolerance = 1e-12 if case.dtype == torch.float64 else 2e-2
    close = {"rtol": tolerance, "atol": tolerance}
    for group in range(GROUPS):
        rows = slice(group * case.rows // GROUPS, (group + 1) * case.rows // GROUPS)
        own = of_group(forward, group, rows)
        alone = FORWARD(*own)
        for place, axis in ((0, 1), (1, 0), (2, 0), (3, 1)):
            ours, expected = together[place][(slice(None),) * axis + (rows,)], alone[place]
            torch.testing.assert_close(ours, expected, **close)
            assert torch.equal(ours == 0, expected == 0)  # the same masks
        expected_gradients = BACKWARD(*backward_arguments(case, own, alone, 1, rows))
        for position, ours, expected in zip(DIFFERENTIABLE, gradients, expected_gradients, strict=True):
            name = TENSOR_ARGUMENTS[position]
            if forward[position] is None:
                continue
            if name in ROW_AXIS:
                ours = ours[(slice(None),) * ROW_AXIS[name] + (rows,)]
            else:
                assert ours.shape == (GROUPS, *forward[position].shape)
                ours = ours[group]
            torch.testing.assert_close(ours, expected, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("shape", ["plain", "ragged"])
def test_a_group_is_a_call_of_its_own(name: str, shape: str) -> None:
    ragged = shape == "ragged"
    check(make_case(name, dtype=torch.float64, ragged=ragged, resets=ragged, direction=int(ragged)))


@pytest.mark.parametrize("name", ["everything", "everything_untied", "everything_layer_norm"])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_instruction_sets_and_recomputation(name: str, instruction_set: str) -> None:
    with use_instruction_set(instruction_set) as reason:
        if reason:
            pytest.skip(f"not run: {reason}")
        check(make_case(name, dtype=torch.float64, recompute=True, ragged=True))
        check(make_case(name, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["none", "everything", "everything_untied", "everything_layer_norm"])
def test_projections(name: str) -> None:
    check(make_case(name, dtype=torch.float64, proj_size=5))
    check(make_case(name, dtype=torch.float64, proj_size=16, hidden_size=32, ragged=True, resets=True, recompute=True))


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_sequence", "everything_batch_norm"])
def test_batch_norm_in_evaluation(name: str) -> None:
    """Statistics are constants then, so that groups have nothing in common."""
    for ragged in (False, True):
        check(make_case(name, dtype=torch.float64, training=False, ragged=ragged))


@pytest.mark.parametrize(("rows", "steps"), [(2, 600), (16, 40)])
@pytest.mark.parametrize(("name", "ragged"), [("zoneout_cell", True), ("layer_norm", False)])
def test_many_chunks_and_threads(rows: int, steps: int, name: str, ragged: bool) -> None:
    """Enough work for two threads, in either division of labour, and sums over several chunks of steps."""
    sizes = {"rows": GROUPS * rows, "steps": steps, "hidden_size": 32, "input_size": 9}
    check(make_case(name, dtype=torch.float64, ragged=ragged, **sizes))


@pytest.mark.parametrize("name", [name for name in PER_SAMPLE if REGULARIZERS[name].changed()])
def test_first_step_continues_a_sequence(name: str) -> None:
    """A sequence in two pieces, the second one told where it begins, draws what the whole sequence draws."""
    case = make_case(name, dtype=torch.float64, resets=True)
    places = {argument: place for place, argument in enumerate(TENSOR_ARGUMENTS)}
    whole = forward_arguments(case, torch.tensor(9))
    expected = FORWARD(*whole)
    state, outputs = (whole[places["initial_hidden"]], whole[places["initial_cell"]]), []
    for begin, end in ((0, 2), (2, 5)):
        piece = list(whole)
        piece[places["input"]] = whole[0][begin:end]
        piece[places["reset"]] = whole[places["reset"]][begin:end]
        piece[places["initial_hidden"]], piece[places["initial_cell"]] = state
        if piece[places["seed"]] is not None:
            piece[places["seed"]] = torch.tensor([[9, begin]])
        output, *state = FORWARD(*piece)[:3]
        outputs.append(output)
    assert torch.equal(torch.cat(outputs) == 0, expected[0] == 0)
    torch.testing.assert_close(torch.cat(outputs), expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(expected[1:3]), rtol=1e-12, atol=1e-12)
