"""The operators as anyone can call them: schemas, what they refuse, what they return for every option."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from helpers import REGULARIZERS, compiled
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedreg import encoding
from fusedreg.backends import cpu
from fusedreg.layer import compute_dtype
from fusedreg.testing import LayerCase, make_arguments

pytestmark = compiled

SAVES = {"nothing": encoding.SAVE_NOTHING, "gates": encoding.SAVE_GATES, "recompute": encoding.SAVE_RECOMPUTE}

FORWARD_ARGUMENTS = (*encoding.TENSOR_ARGUMENTS, "rates", "options", "norm_eps")
GRADIENTS = ("grad_output", "grad_final_hidden", "grad_final_cell", "grad_cells")
STATISTICS = ("input_statistics", "recurrent_statistics", "cell_statistics")
SAVED = ("cells", "hidden", "gates", "input_gates", *STATISTICS)
BACKWARD_ARGUMENTS = (*GRADIENTS, *encoding.TENSOR_ARGUMENTS, *SAVED, "rates", "options", "norm_eps", "needed")


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.fusedreg.lstm_layer_forward.default(*arguments)  # type: ignore[no-any-return]


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.fusedreg.lstm_layer_backward.default(*arguments)  # type: ignore[no-any-return]


def forward_arguments(case: LayerCase, save: int = encoding.SAVE_GATES, seed: int = 0) -> dict[str, Any]:
    """The operator's arguments by name, for a case."""
    given = make_arguments(case, seed)
    encoded = encoding.encode_options(case.options, save)
    named = dict(zip(FORWARD_ARGUMENTS, [*given.tensors(), *encoded], strict=True))
    if named["initial_cell"] is not None:
        named["initial_cell"] = named["initial_cell"].to(compute_dtype(case.dtype))
    return named


def backward_arguments(case: LayerCase, save: int, needed: list[bool] | None = None, seed: int = 0) -> dict[str, Any]:
    named = forward_arguments(case, save, seed)
    output, final_hidden, final_cell, cells, hidden, *saved = forward(*named.values())
    differs = encoding.hidden_differs(named["rates"], named["options"])
    grads = [torch.ones_like(value) for value in (output, final_hidden, final_cell, cells)]
    values = [*grads, *(named[name] for name in encoding.TENSOR_ARGUMENTS), cells, hidden if differs else output]
    values += [*saved, named["rates"], named["options"], named["norm_eps"], needed or [True] * 16]
    return dict(zip(BACKWARD_ARGUMENTS, values, strict=True))


# Schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "names", "results"),
    [("lstm_layer_forward", FORWARD_ARGUMENTS, 10), ("lstm_layer_backward", BACKWARD_ARGUMENTS, 16)],
)
def test_schemas_agree_with_python(operator: str, names: tuple[str, ...], results: int) -> None:
    schema = getattr(torch.ops.fusedreg, operator).default._schema
    assert tuple(argument.name for argument in schema.arguments) == names
    assert len(schema.returns) == results
    assert not schema.is_mutable
    assert all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


def test_gradients_come_in_the_order_of_the_differentiable_arguments() -> None:
    schema = torch.ops.fusedreg.lstm_layer_backward.default._schema
    expected = [f"grad_{encoding.TENSOR_ARGUMENTS[position]}" for position in encoding.DIFFERENTIABLE]
    assert [value.name for value in schema.returns] == expected


# Results: shapes, strides and types, absent ones, against the fakes -----------------------------------------------


def layout(values: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    return [(tuple(value.shape), value.stride(), value.dtype, value.device) for value in values]


def faked(operator: Any, arguments: dict[str, Any]) -> list[tuple[Any, ...]]:
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments.values()]
        return layout(operator(*values))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_fakes_are_what_comes(name: str, save: str, training: bool) -> None:
    case = LayerCase(name, regularization=REGULARIZERS[name], ragged=True, training=training)
    arguments = forward_arguments(case, SAVES[save])
    assert faked(forward, arguments) == layout(forward(*arguments.values()))
    if save != "nothing":
        arguments = backward_arguments(case, SAVES[save])
        assert faked(backward, arguments) == layout(backward(*arguments.values()))


@pytest.mark.parametrize("position", range(16))
def test_what_is_not_needed_is_empty(position: int) -> None:
    case = LayerCase("everything_layer_norm", proj_size=3, regularization=REGULARIZERS["everything_layer_norm"])
    for needed in ([place == position for place in range(16)], [place != position for place in range(16)]):
        arguments = backward_arguments(case, encoding.SAVE_GATES, needed)
        results = backward(*arguments.values())
        assert [value.shape != (0,) for value in results] == needed
        assert faked(backward, arguments) == layout(results)


def test_the_two_bias_gradients_are_two_tensors() -> None:
    results = backward(*backward_arguments(LayerCase("none"), encoding.SAVE_GATES).values())
    assert results[3].data_ptr() != results[4].data_ptr()
    assert torch.equal(results[3], results[4])
    for needed in ([place == 3 for place in range(16)], [place == 4 for place in range(16)]):
        one = backward(*backward_arguments(LayerCase("none"), encoding.SAVE_GATES, needed).values())
        assert torch.equal(one[needed.index(True)], results[3])


def test_parameters_of_a_norm_that_is_off_have_a_gradient_of_zero() -> None:
    arguments = backward_arguments(LayerCase("none"), encoding.SAVE_GATES)
    results = backward(*arguments.values())
    for value in results[8:14]:
        assert value.shape[0] in (44, 11)
        assert not value.any()


# Refusals: what would read or write memory that is not there ------------------------------------------------------


def wrong_dtype(value: Tensor) -> Tensor:
    return value.to(torch.float64 if value.dtype != torch.float64 else torch.float32)


def one_more(value: Tensor) -> Tensor:
    return torch.cat([value, value[-1:]])


def one_dimension_more(value: Tensor) -> Tensor:
    return value.unsqueeze(0)


BAD = {"dtype": wrong_dtype, "size": one_more, "rank": one_dimension_more}
PLAIN = LayerCase("everything", regularization=REGULARIZERS["everything"], ragged=True, resets=True)
PROJECTED = LayerCase("projected", proj_size=3, probes=True)
LAYER_NORM = LayerCase("layer_norm", regularization=REGULARIZERS["layer_norm"])
BATCH_NORM = LayerCase("batch_norm", regularization=REGULARIZERS["batch_norm"], ragged=True)
TENSORS = [
    *((PLAIN, name) for name in encoding.TENSOR_ARGUMENTS[1:5] + encoding.TENSOR_ARGUMENTS[6:10]),
    *((PROJECTED, name) for name in ("weight_hh", "weight_hr", "hidden_probe", "cell_probe")),
    *((LAYER_NORM, name) for name in encoding.TENSOR_ARGUMENTS[11:17]),
    *((BATCH_NORM, name) for name in encoding.TENSOR_ARGUMENTS[19:21]),
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("case", "name"), TENSORS, ids=[f"{case.name}-{name}" for case, name in TENSORS])
def test_bad_tensors_of_the_forward(case: LayerCase, name: str, bad: str) -> None:
    arguments = forward_arguments(case)
    arguments[name] = BAD[bad](arguments[name])
    # The size H is read off weight_hh, so that one more row there is a wrong shape there.
    with pytest.raises(RuntimeError, match=rf"fusedreg::lstm_layer_forward: {name}: expected (dtype|shape)"):
        forward(*arguments.values())


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [*GRADIENTS, *SAVED[:4]])
def test_bad_tensors_of_the_backward(name: str, bad: str) -> None:
    case = LayerCase("everything_batch_norm", regularization=REGULARIZERS["everything_batch_norm"])
    arguments = backward_arguments(case, encoding.SAVE_GATES)
    arguments[name] = BAD[bad](arguments[name])
    with pytest.raises(RuntimeError, match=rf"fusedreg::lstm_layer_backward: {name}: expected (dtype|shape)"):
        backward(*arguments.values())


@pytest.mark.parametrize("name", [*STATISTICS, "gates"])
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_saved_tensors_must_be_there(norm: str, name: str) -> None:
    case = LayerCase(norm, regularization=REGULARIZERS[norm])
    arguments = backward_arguments(case, encoding.SAVE_GATES)
    arguments[name] = torch.empty(0)
    with pytest.raises(RuntimeError, match=rf"{name}: expected shape the forward's = .*, got \(0,\)"):
        backward(*arguments.values())


def test_statistics_of_another_norm_are_refused() -> None:
    """Batch norm's are (T, 2, 4H), layer norm's (T, 2, B): one read as the other would run past the end."""
    arguments = backward_arguments(BATCH_NORM, encoding.SAVE_GATES)
    arguments["recurrent_statistics"] = arguments["recurrent_statistics"][:, :, :5].contiguous()
    with pytest.raises(RuntimeError, match="recurrent_statistics: expected shape"):
        backward(*arguments.values())


ROWS = [
    ("running_index", 5, "expected at least 6 rows, which an index reads, got 5"),
    ("running_index", 10**12, "expected at least"),
    ("running_index", -2, "expected row numbers or -1, got -2"),
    ("running_input_index", 5, "running_input_mean: expected at least 6 rows"),
    ("running_input_index", -(2**63), "expected row numbers or -1"),
]


@pytest.mark.parametrize(("name", "row", "message"), ROWS)
def test_an_index_stays_inside_its_rows(name: str, row: int, message: str) -> None:
    arguments = forward_arguments(BATCH_NORM)
    assert arguments["running_recurrent_mean"].shape[0] == 5
    arguments[name] = arguments[name].clone()
    arguments[name][3] = row
    with pytest.raises(RuntimeError, match=message):
        forward(*arguments.values())


def test_an_index_without_statistics_is_refused() -> None:
    arguments = forward_arguments(BATCH_NORM) | {"running_cell_var": None}
    arguments["running_index"] = torch.zeros_like(arguments["running_index"])
    with pytest.raises(RuntimeError, match="running_cell_var: expected a tensor, since an index reads it, got None"):
        forward(*arguments.values())


OTHERS = [
    ({"rates": [0.0] * 8}, "expected 9 rates and 15 options, got 8 and 15; .* build it again"),
    ({"options": [0] * 14}, "expected 9 rates and 15 options, got 9 and 14"),
    ({"rates": [1.0] + [0.0] * 8}, r"rates: expected numbers in \[0, 1\), got 1"),
    ({"rates": [float("nan")] + [0.0] * 8}, r"rates: expected numbers in \[0, 1\), got -?nan"),
    ({"rates": [-0.1] + [0.0] * 8}, r"rates: expected numbers in \[0, 1\), got -0\.1"),
    ({"options": [0] * 13 + [3, 1]}, r"options\[13\]: expected 0 <= value < 3, got 3"),
    ({"options": [0] * 7 + [-1] + [0] * 7}, r"options\[7\]: expected 0 <= value < 3, got -1"),
    ({"options": [2**40] + [0] * 14}, r"options\[0\]: expected 0 <= value < 1073741824"),
    ({"norm_eps": float("nan")}, "norm_eps: expected >= 0, got -?nan"),
    ({"seed": None}, "seed: expected a 0-dimensional int64 tensor, since a rate is active, got None"),
    ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed: expected shape \(\) = \(\), got \(1,\)"),
    ({"seed": torch.tensor(1.0)}, "seed: expected dtype int64, got float32"),
    ({"seed": torch.zeros(5, 3, dtype=torch.int64)}, r"seed: expected shape \(S, 2\) = \(5, 2\), got \(5, 3\)"),
    (
        {"seed": torch.zeros(2, 2, dtype=torch.int64)},
        "seed: expected a number of groups that divides the 5 rows, got 2",
    ),
    ({"seed": torch.tensor([[1, -1]])}, "seed: expected first steps of 0 to 4294967283, got -1"),
    ({"seed": torch.tensor([[1, 2**32]])}, "seed: expected first steps of 0 to"),
    ({"input": torch.zeros(0, 5, 6)}, r"input: expected shape \(T, B, I\) with T >= 1, got \(0, 5, 6\)"),
    ({"input": torch.zeros(5, 6)}, r"input: expected shape \(T, B, I\) with T >= 1, got \(5, 6\)"),
    ({"input": torch.zeros(7, 5, 6, dtype=torch.int64)}, "input: expected dtype float32, .*, got int64"),
    ({"weight_hr": torch.zeros(3, 11)}, r"weight_hr: expected shape \(P, H\) = \(11, 11\), got \(3, 11\)"),
    (
        {"weight_hr": torch.zeros(3, 11), "weight_hh": torch.zeros(3, 3)},
        "weight_hh: expected shape .* with H and P >= 1",
    ),
    ({"weight_hh": torch.zeros(0, 0)}, r"weight_hh: expected shape \(4H, H\) with H >= 1, got \(0, 0\)"),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS, ids=[message[:30] for _, message in OTHERS])
def test_other_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        forward(*(forward_arguments(PLAIN) | changes).values())


@pytest.mark.parametrize("name", ["input", "weight_hh", "initial_cell"])
def test_a_tensor_without_strides_is_refused(name: str) -> None:
    arguments = forward_arguments(PLAIN)
    arguments[name] = arguments[name].to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError), match="lstm_layer_forward"):
        forward(*arguments.values())


def test_a_forward_that_kept_nothing_has_no_backward() -> None:
    arguments = backward_arguments(LayerCase("none"), encoding.SAVE_GATES)
    arguments["options"] = [*arguments["options"][:-2], encoding.SAVE_NOTHING, 1]
    with pytest.raises(RuntimeError, match="options: expected a forward that saved for the backward"):
        backward(*arguments.values())


@pytest.mark.parametrize("count", [0, 13, 17])
def test_needed_has_a_flag_for_each_result(count: int) -> None:
    arguments = backward_arguments(LayerCase("none"), encoding.SAVE_GATES)
    with pytest.raises(RuntimeError, match=f"needed: expected 16 flags, got {count}"):
        backward(*(arguments | {"needed": [True] * count}).values())


# Layouts ----------------------------------------------------------------------------------------------------------


def relaid(value: Any) -> Any:
    """The same values, nothing contiguous: every other element of a larger tensor along each dimension."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    larger = value.new_zeros([2 * size for size in value.shape])
    view = larger[tuple(slice(None, None, 2) for _ in value.shape)]
    view.copy_(value)
    return view


@pytest.mark.parametrize("name", ["everything", "everything_batch_norm", "everything_layer_norm"])
def test_any_strides_of_any_argument(name: str) -> None:
    case = LayerCase(name, regularization=REGULARIZERS[name], ragged=True, resets=True)
    arguments = forward_arguments(case)
    for one, two in zip(forward(*arguments.values()), forward(*map(relaid, arguments.values())), strict=True):
        assert torch.equal(one, two)
    arguments = backward_arguments(case, encoding.SAVE_GATES)
    for one, two in zip(backward(*arguments.values()), backward(*map(relaid, arguments.values())), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rows", [1, 3])
def test_expanded_and_transposed_inputs_and_gradients(rows: int) -> None:
    case = LayerCase("none", rows=rows)
    arguments = backward_arguments(case, encoding.SAVE_GATES)
    shape = arguments["grad_output"].shape
    transposed = torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1)
    for grad in (torch.ones(()).expand(shape), torch.ones(shape[2]).expand(shape), transposed):
        one = backward(*(arguments | {"grad_output": grad}).values())
        two = backward(*(arguments | {"grad_output": grad.contiguous()}).values())
        for left, right in zip(one, two, strict=True):
            assert torch.equal(left, right)


def test_an_empty_batch_gives_zero_gradients() -> None:
    case = LayerCase("batch_norm", rows=0, regularization=REGULARIZERS["layer_norm"])
    results = backward(*backward_arguments(case, encoding.SAVE_GATES).values())
    assert all(not value.any() for value in results)
    assert results[1].shape == (44, 6)


def test_no_features() -> None:
    case = LayerCase("none", input_size=0)
    results = backward(*backward_arguments(case, encoding.SAVE_GATES).values())
    assert results[0].shape == (7, 5, 0)
    assert results[1].shape == (44, 0)
    assert results[2].isfinite().all()


# Private operators ------------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_in_use() -> None:
    usable = cpu.instruction_sets()
    assert usable[-1] == "portable"
    assert set(usable) <= {"avx512", "avx2", "portable"}
    assert cpu.instruction_set() == usable[0]


def test_an_instruction_set_can_be_chosen() -> None:
    choose = torch.ops.fusedreg._set_cpu_instruction_set
    before = cpu.instruction_set()
    try:
        for name in cpu.instruction_sets():
            assert choose(name)
            assert cpu.instruction_set() == name
        assert not choose("mmx")
        assert cpu.instruction_set() == "portable"
    finally:
        assert choose(before)


def test_fma_rate() -> None:
    rate = torch.ops.fusedreg._measure_fma_rate(1, 0.01)
    assert 0.1 < rate < 1000.0
    for threads, seconds in itertools.product((0, torch.get_num_threads() + 1), (0.01,)):
        with pytest.raises(RuntimeError, match="_measure_fma_rate: expected 1 to"):
            torch.ops.fusedreg._measure_fma_rate(threads, seconds)


# Teams ------------------------------------------------------------------------------------------------------------


def test_errors_in_one_call_leave_the_others_alone() -> None:
    """A refused call and good ones at the same time, from several threads."""
    arguments = forward_arguments(PLAIN)
    expected = forward(*arguments.values())[0]
    wrong: list[str] = []

    def work() -> None:
        for turn in range(20):
            try:
                result = forward(*(arguments | ({"seed": None} if turn % 2 else {})).values())[0]
            except RuntimeError as error:
                if turn % 2 == 0 or "seed" not in str(error):
                    wrong.append(str(error))
            else:
                if turn % 2 == 1 or not torch.equal(result, expected):
                    wrong.append(f"turn {turn}")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_fork_after_a_parallel_region_still_runs_in_parallel() -> None:
    """OpenMP's threads do not survive a fork: a torch operator large enough for two threads hangs there."""
    program = """
import os, signal, sys, warnings, torch, fusedreg
warnings.simplefilter("ignore", DeprecationWarning)
torch.set_num_threads(3)
module, input = fusedreg.LSTM(20, 60), torch.randn(4, 33, 20)
expected = module(input).output
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(module(input).output, expected) else 1)
sys.exit(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
