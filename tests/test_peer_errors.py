"""Errors that other implementations were seen to make: each has a check, and a planted copy that the check catches.

A check takes an implementation of a layer. It is applied to every backend, where it passes, and to the reference
with that error put in, where it must fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import compiled
from peer_checks import (
    evaluation_uses_all_weights,
    first_row_for_all,
    gradient_is_the_derivative,
    gradients_are_the_callers_own,
    inverted,
    masks_of_step_0,
    overwriting,
    rates_are_of_dropping,
    returning_the_buffer,
    rows_have_masks_of_their_own,
    saved_buffers_survive,
    seeds_make_masks_of_their_own,
    states_are_zoned_out_separately,
    weights_are_learnt,
    with_the_first_seed,
    zeroing_for_good,
    zoneout_in_evaluation_is_the_expectation,
)
from planting import (
    PLAIN,
    Backward,
    call,
    case_of,
    changing_masks,
    changing_options,
    changing_result,
    changing_weight,
    with_backward_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import fusedreg
from fusedreg import reference
from fusedreg.layer import REVERSE, LayerParameters, LayerResult
from fusedreg.regularization import BatchNorm
from fusedreg.testing import (
    LayerCase,
    LayerImplementation,
    assert_within_budget,
    implementation,
    make_arguments,
    run_layer,
)

# ---- Checks: padding ---------------------------------------------------------------------------------------------


def padding_enters_no_statistic(implement: LayerImplementation) -> None:
    """The second step of a ragged batch is a call of its own with the rows that are still there."""
    case = replace(case_of(norm=BatchNorm(max_steps=5)), steps=2, rows=9)
    arguments = make_arguments(case, 0)
    lengths = torch.tensor([2, 1, 2, 2, 0, 2, 1, 2, 2])
    still = lengths == 2
    both = call(implement, case, arguments, lengths=lengths)
    assert both.cells is not None and both.statistics is not None and both.statistics.recurrent is not None
    second = call(
        implement,
        replace(case, steps=1),
        arguments,
        input=arguments.input[1:, still],
        initial_hidden=both.output[0, still],
        initial_cell=both.cells[0, still],
        running=None
        if arguments.running is None
        else arguments.running._replace(
            index=arguments.running.index[1:], input_index=arguments.running.input_index[1:]
        ),
    )
    assert second.statistics is not None and second.statistics.recurrent is not None
    torch.testing.assert_close(both.output[1, still], second.output[0])
    torch.testing.assert_close(both.statistics.recurrent[1], second.statistics.recurrent[0])


def ignoring_lengths(*arguments: Any, lengths: Tensor | None = None, **keywords: Any) -> LayerResult:
    """Runs over the padding as if it were data, and then sets the output there to zero."""
    result = reference.lstm_layer(*arguments, **keywords)
    assert lengths is not None and result.cells is not None
    valid = (torch.arange(len(result.output))[:, None] < lengths)[..., None]
    return result._replace(output=torch.where(valid, result.output, 0.0), cells=torch.where(valid, result.cells, 0.0))


def reverse_starts_at_the_last_valid_step(implement: LayerImplementation) -> None:
    case = replace(PLAIN, direction=REVERSE, ragged=True)
    arguments = make_arguments(case, 0)
    assert arguments.lengths is not None
    assert arguments.initial_hidden is not None and arguments.initial_cell is not None
    result = call(implement, case, arguments)
    for row, length in enumerate(arguments.lengths.tolist()):
        if length == 0:
            continue
        alone = call(
            implement,
            replace(case, steps=length),
            arguments,
            input=arguments.input[:length, row : row + 1],
            initial_hidden=arguments.initial_hidden[row : row + 1],
            initial_cell=arguments.initial_cell[row : row + 1],
            lengths=None,
        )
        torch.testing.assert_close(result.output[:length, row], alone.output[:, 0])
        torch.testing.assert_close(result.final_cell[row], alone.final_cell[0])


# ---- Checks: numbers ---------------------------------------------------------------------------------------------


def saturation_is_finite(implement: LayerImplementation) -> None:
    """Pre-activations of thousands, of both signs, in every type."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        case = replace(PLAIN, dtype=dtype)
        arguments = make_arguments(case, 0)
        for scale in (1e2, 1e4, -1e4):
            values = run_layer(implement, case, arguments._replace(input=arguments.input * scale))
            for name, value in values.items():
                assert value.isfinite().all(), f"{name} with inputs times {scale} in {dtype}"
            assert values["output"].abs().max() <= 1.0


class NaiveTanh(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tanh, torch.Tensor.tanh):
            decayed = torch.exp(-2.0 * args[0])
            return (1.0 - decayed) / (1.0 + decayed)
        return func(*args, **(kwargs or {}))


def naive_tanh(*arguments: Any, **keywords: Any) -> LayerResult:
    with NaiveTanh():
        return reference.lstm_layer(*arguments, **keywords)


def cells_stay_float32(implement: LayerImplementation) -> None:
    assert_within_budget(implement, LayerCase("cells", steps=30, dtype=torch.bfloat16))


def rounding_cells(
    x: Tensor, hidden: Tensor, cell: Tensor, parameters: LayerParameters, options: Any, **keywords: Any
) -> LayerResult:
    """A call for each step, between which ``c`` is stored in the input's type."""
    outputs, cells = [], []
    for step in x.split(1):
        result = reference.lstm_layer(step, hidden, cell, parameters, options)
        hidden, cell = result.final_hidden, result.final_cell.to(x.dtype).float()
        outputs.append(result.output)
        cells.append(cell[None])
    return LayerResult(torch.cat(outputs), hidden, cell, torch.cat(cells), None)


def nothing_is_clipped(implement: LayerImplementation) -> None:
    """Cells that grow by one a step, and gradients that scale with what comes in."""
    case = replace(PLAIN, steps=30)
    arguments = make_arguments(case, 0)
    opened = arguments._replace(
        parameters=arguments.parameters._replace(bias_ih=torch.full((44,), 60.0, dtype=torch.float64)),
        initial_cell=torch.zeros(case.rows, case.hidden_size, dtype=torch.float64),
    )
    assert torch.allclose(call(implement, case, opened).final_cell, torch.tensor(30.0, dtype=torch.float64))
    values = run_layer(implement, case, arguments)
    large = {name: 1e4 * value for name, value in arguments.gradients.items()}
    for name, value in run_layer(implement, case, arguments._replace(gradients=large)).items():
        if name.startswith("grad"):
            torch.testing.assert_close(value, 1e4 * values[name], msg=name)


def clipping_cells(result: LayerResult) -> LayerResult:
    return result._replace(final_cell=result.final_cell.clamp(-10.0, 10.0))


def float32_products_are_true(implement: LayerImplementation) -> None:
    assert_within_budget(implement, LayerCase("float32", input_size=40, hidden_size=40))


def in_tf32(*arguments: Any, **keywords: Any) -> LayerResult:
    """Ten bits of mantissa, on this side of the comparison only."""

    def short(value: Tensor) -> Tensor:
        if value.dtype != torch.float32:
            return value
        rounded = (value.detach().view(torch.int32) & ~0x1FFF).view(torch.float32)
        return value + (rounded - value).detach()

    x, hidden, cell, parameters, *rest = arguments
    parameters = parameters._replace(weight_ih=short(parameters.weight_ih), weight_hh=short(parameters.weight_hh))
    return reference.lstm_layer(short(x), hidden, cell, parameters, *rest, **keywords)


# ---- Checks: the host --------------------------------------------------------------------------------------------


def host_does_not_wait(implement: LayerImplementation) -> None:
    """With tensors that have no values, whatever would read one on the host (and so wait for a device) raises."""
    case = replace(case_of(norm=BatchNorm(max_steps=5), zoneout_cell=0.2), rows=8, ragged=True, resets=True)
    arguments = make_arguments(case, 0)
    with FakeTensorMode() as fake:

        def faked(value: Any) -> Any:
            if isinstance(value, Tensor):
                return fake.from_tensor(value)
            if isinstance(value, tuple):
                return type(value)(*(faked(one) for one in value))
            return value

        try:
            result = implement(
                *(faked(value) for value in arguments[:4]),
                case.options,
                lengths=faked(arguments.lengths),
                reset=faked(arguments.reset),
                seed=faked(arguments.seed),
                running=faked(arguments.running),
            )
        except torch._subclasses.fake_tensor.DataDependentOutputException as error:
            raise AssertionError(f"a value was read on the host: {error}") from error
    assert result.output.shape == (case.steps, case.rows, case.hidden_size)


def reading_lengths(*arguments: Any, lengths: Tensor | None = None, **keywords: Any) -> LayerResult:
    assert lengths is not None and int(lengths.max().item()) >= 0
    return reference.lstm_layer(*arguments, lengths=lengths, **keywords)


def absent_state_is_zero(implement: LayerImplementation) -> None:
    arguments = make_arguments(PLAIN, 0)
    zeros = torch.zeros(PLAIN.rows, PLAIN.hidden_size, dtype=torch.float64)
    expected = call(implement, PLAIN, arguments, initial_hidden=zeros, initial_cell=zeros)
    try:
        result = call(implement, PLAIN, arguments, initial_hidden=None, initial_cell=None)
    except NameError as error:
        raise AssertionError(f"hx=None does not work: {error}") from error
    torch.testing.assert_close(result.output, expected.output)


def undefined_state(x: Tensor, hidden: Any, *rest: Any, **keywords: Any) -> LayerResult:
    if hidden is None:
        raise NameError("name 'initial_state' is not defined")
    return reference.lstm_layer(x, hidden, *rest, **keywords)


# ---- All of them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerError:
    name: str
    check: Callable[[LayerImplementation], None]
    planted: Callable[[], LayerImplementation]


def _planting(implement: LayerImplementation) -> Callable[[], LayerImplementation]:
    return lambda: implement


PEER_ERRORS = [
    PeerError(
        "saved buffer overwritten",
        saved_buffers_survive,
        _planting(changing_weight(lambda weight: Backward.apply(weight, overwriting))),
    ),
    PeerError(
        "gradient is a saved buffer",
        gradients_are_the_callers_own,
        _planting(changing_weight(lambda weight: Backward.apply(weight, returning_the_buffer))),
    ),
    PeerError(
        "zoneout mask of step 0 in the backward",
        gradient_is_the_derivative,
        _planting(with_backward_of(changing_masks(masks_of_step_0))),
    ),
    PeerError(
        "one zoneout mask for h and c",
        states_are_zoned_out_separately,
        _planting(changing_masks(lambda masks: masks._replace(zoneout_cell=masks.zoneout_hidden))),
    ),
    PeerError(
        "one zoneout mask for all steps", states_are_zoned_out_separately, _planting(changing_masks(masks_of_step_0))
    ),
    PeerError("probability of keeping", rates_are_of_dropping, _planting(changing_masks(inverted))),
    PeerError(
        "no zoneout in evaluation",
        zoneout_in_evaluation_is_the_expectation,
        _planting(changing_options(lambda _: {"zoneout_hidden": 0.0, "zoneout_cell": 0.0})),
    ),
    PeerError(
        "weights dropped in evaluation",
        evaluation_uses_all_weights,
        _planting(changing_options(lambda options: {"training": options.weight_dropout > 0})),
    ),
    PeerError(
        "row-wise weights dropped in evaluation",
        evaluation_uses_all_weights,
        _planting(changing_options(lambda options: {"training": options.weight_mask == "row"})),
    ),
    PeerError("dropped weight detached", weights_are_learnt, _planting(changing_weight(Tensor.detach))),
    PeerError("dropped weight zeroed for good", weights_are_learnt, _planting(changing_weight(zeroing_for_good))),
    PeerError(
        "one mask for the whole batch", rows_have_masks_of_their_own, _planting(changing_masks(first_row_for_all))
    ),
    PeerError("masks stale across calls", seeds_make_masks_of_their_own, with_the_first_seed),
    PeerError("padding in batch statistics", padding_enters_no_statistic, _planting(ignoring_lengths)),
    PeerError("reverse starts at the padding", reverse_starts_at_the_last_valid_step, _planting(ignoring_lengths)),
    PeerError("tanh of exponentials", saturation_is_finite, _planting(naive_tanh)),
    PeerError("cells rounded every step", cells_stay_float32, _planting(rounding_cells)),
    PeerError("clipping reaches the forward", nothing_is_clipped, _planting(changing_result(clipping_cells))),
    PeerError(
        "clipping reaches the gradients",
        nothing_is_clipped,
        _planting(changing_weight(lambda w: Backward.apply(w, lambda grad, _: grad.clamp(-1.0, 1.0)))),
    ),
    PeerError("TF32 on one side", float32_products_are_true, _planting(in_tf32)),
    PeerError("host waits for the device", host_does_not_wait, _planting(reading_lengths)),
    PeerError("absent state is an undefined name", absent_state_is_zero, _planting(undefined_state)),
]
every_error = pytest.mark.parametrize("error", PEER_ERRORS, ids=lambda error: error.name.replace(" ", "_"))


@every_error
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
def test_backend_does_not_make_it(error: PeerError, backend: str) -> None:
    error.check(implementation(backend))


@every_error
def test_planted_it_is_caught(error: PeerError) -> None:
    with pytest.raises(AssertionError):
        error.check(error.planted())


# ---- Of the module -----------------------------------------------------------------------------------------------


def calls_draw_anew(module: torch.nn.Module) -> None:
    """Also when the state is carried over, as in truncated back-propagation."""
    input = torch.ones(3, 2, 4)
    first, state = module(input)
    assert not torch.equal(first, module(input)[0])
    carried = tuple(value.detach() for value in state)
    assert not torch.equal(module(input, carried)[0], module(input, carried)[0])


class StaleMasks(fusedreg.LSTM):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return super().forward(*arguments, **{**keywords, "seed": 0})


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
def test_module_draws_anew(backend: str) -> None:
    calls_draw_anew(fusedreg.LSTM(4, 5, hidden_dropout=0.5, backend=backend))
    with pytest.raises(AssertionError):
        calls_draw_anew(StaleMasks(4, 5, hidden_dropout=0.5, backend=backend))


def message_names_the_argument(module: Callable[..., Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        module(torch.zeros(3, 2, 4), (torch.zeros(1, 2, 5), torch.zeros(1, 9, 5)))
    text = str(caught.value)
    assert "c_0" in text or "hx" in text
    assert "(1, 2, 5)" in text and "(1, 9, 5)" in text


def saying_criteria(*arguments: Any) -> None:
    raise ValueError("the arguments do not meet the criteria")


def test_message_says_which_argument() -> None:
    message_names_the_argument(fusedreg.LSTM(4, 5))
    with pytest.raises(AssertionError):
        message_names_the_argument(saying_criteria)


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device, the CPU has no streams")
def test_side_streams_are_honoured() -> None:
    """The layer runs on the caller's stream: behind the work that makes its input there."""
    module = fusedreg.LSTM(64, 64).cuda()
    input = torch.randn(5, 8, 64, device="cuda")
    expected = module(input * 2.0)[0]
    torch.cuda.synchronize()
    with side_stream():
        torch.cuda._sleep(10_000_000)
        result = module(input * 2.0)[0]
    torch.testing.assert_close(result, expected)
