"""The checks themselves: what they let through, what they return, and that they read no value they must not.

``test_bad_inputs.py`` holds the table of what they refuse.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import compiled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fusedreg import LSTM, BatchNorm, validation
from fusedreg.parameters import Architecture
from fusedreg.validation import InputError, InputTypeError

CPU = torch.device("cpu")
SIZES = Architecture(4, 5, num_layers=2, bidirectional=True)
WEIGHT = torch.zeros(20, 4)


def test_errors_are_of_both_kinds() -> None:
    """What nn.LSTM raises as RuntimeError is caught by programs that expect one, and is the kind it should be."""
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, RuntimeError)
    assert issubclass(InputTypeError, TypeError)
    assert issubclass(InputTypeError, RuntimeError)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 0, 4), (1, 1, 4)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_that_are_fine(shape: tuple[int, ...], batch_first: bool) -> None:
    if batch_first and shape == (3, 0, 4):
        with pytest.raises(InputError, match="at least one time step"):
            validation.check_input(torch.zeros(shape), SIZES, WEIGHT, batch_first)
        return
    validation.check_input(torch.zeros(shape), SIZES, WEIGHT, batch_first)


def test_no_rows_is_fine_and_no_steps_is_not_in_either_layout() -> None:
    validation.check_input(torch.zeros(0, 3, 4), SIZES, WEIGHT, batch_first=True)
    with pytest.raises(InputError, match=r"input: .*\(0, 3, 4\).*batch_first=False"):
        validation.check_input(torch.zeros(0, 3, 4), SIZES, WEIGHT, batch_first=False)


def test_complex_and_integer_models_are_refused() -> None:
    for dtype in (torch.complex64, torch.int32):
        with pytest.raises(ValueError, match="input: expected parameters of a real floating type"):
            validation.check_input(torch.zeros(3, 2, 4, dtype=dtype), SIZES, WEIGHT.to(dtype), False)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_that_are_fine(kind: Any, dtype: torch.dtype) -> None:
    """A list as nn.LSTM takes it; a float32 cell beside every type."""
    hidden, cell = torch.zeros(4, 3, 5, dtype=dtype), torch.zeros(4, 3, 5)
    input = torch.zeros(6, 3, 4, dtype=dtype)
    got = validation.check_state(kind((hidden, cell)), SIZES, input, rows=3)
    assert got[0] is hidden
    assert got[1] is cell
    validation.check_state((hidden[:, 0], cell[:, 0]), SIZES, input, rows=None)


@pytest.mark.parametrize(
    "lengths",
    [
        [3, 0],
        (3, 1),
        torch.tensor([3, 3]),
        torch.tensor([3, 2], dtype=torch.int32),
        torch.tensor([1, 2]).numpy().tolist(),
    ],
    ids=str,
)
def test_lengths_that_are_fine(lengths: Any) -> None:
    got = validation.check_lengths(lengths, 2, 3, CPU)
    assert got.dtype == torch.int64
    assert got.tolist() == list(lengths)


def test_lengths_of_another_device_are_not_read() -> None:
    """A value on a device costs a synchronisation; the operator clamps it."""
    lengths = torch.tensor([9, -1], device="meta")
    assert validation.check_lengths(lengths, 2, 3, torch.device("meta")).device.type == "meta"


def test_lengths_without_values_are_not_read() -> None:
    """Fake tensors and transforms: out of range is clamped there too."""
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.tensor([9, -1]))
        assert validation.check_lengths(fake, 2, 3, CPU).shape == (2,)
    batched = torch.tensor([[9, -1], [3, 2]])
    got = torch.vmap(lambda lengths: validation.check_lengths(lengths, 2, 3, CPU))(batched)
    assert torch.equal(got, batched)


def test_lengths_that_samples_share_are_read() -> None:
    def call(sample: torch.Tensor) -> torch.Tensor:
        return sample + validation.check_lengths([4, 0], 2, 3, CPU)

    with pytest.raises(ValueError, match=r"lengths: expected values in \[0, 3\]"):
        torch.vmap(call)(torch.zeros(2, 2))


def test_lengths_are_clamped_where_they_cannot_be_read() -> None:
    module = LSTM(4, 5, backend="reference")
    input = torch.randn(3, 2, 4)
    call = torch.vmap(lambda lengths: module(input, lengths=lengths)[0])
    clamped = call(torch.tensor([[9, -1]]))[0]
    assert torch.equal(clamped, module(input, lengths=[3, 0])[0])


@pytest.mark.parametrize("expected", [(3, 2), (3,)])
def test_resets_that_are_fine(expected: tuple[int, ...]) -> None:
    reset = torch.zeros(expected, dtype=torch.bool)
    assert validation.check_reset(reset, expected, CPU, bidirectional=False) is reset


def test_reset_and_both_directions() -> None:
    with pytest.raises(ValueError, match=r"reset: expected None with bidirectional=True"):
        validation.check_reset(torch.zeros(3, 2, dtype=torch.bool), (3, 2), CPU, bidirectional=True)


def test_packed_of_wrong_rank() -> None:
    packed = pack_sequence([torch.ones(2, 3, 4)])
    with pytest.raises(InputError, match=r"input: expected packed data with 2 dimensions.*\(2, 3, 4\)"):
        validation.check_packed(packed, None)
    assert isinstance(packed, PackedSequence)


def test_generator_in_a_compiled_region() -> None:
    module = LSTM(4, 5, zoneout_cell=0.5, backend="reference")
    generator = torch.Generator()

    def refused() -> None:
        validation.check_generator(generator, None)

    refused()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(ValueError, match=r"generator: .*compiled region.*draw_seed.*seed="):
            refused()
    assert module(torch.ones(2, 2, 4), generator=generator)[0].shape == (2, 2, 5)


def test_batch_of_one_under_batch_norm_is_refused_in_training_only() -> None:
    module = LSTM(4, 5, norm=BatchNorm(max_steps=3))
    with pytest.raises(ValueError, match=r"input: expected at least 2 rows with BatchNorm.*\.eval\(\).*LayerNorm"):
        module(torch.ones(3, 1, 4))
    assert module.eval()(torch.ones(3, 1, 4))[0].shape == (3, 1, 5)
    assert module.train()(torch.ones(3, 0, 4))[0].shape == (3, 0, 5)


def test_flags_and_sizes() -> None:
    validation.check_flag("bias", True)
    validation.check_size("hidden_size", 3, 1)
    with pytest.raises(TypeError, match="bias: expected True or False, got 1"):
        validation.check_flag("bias", 1)
    with pytest.raises(TypeError, match="hidden_size: expected an int, got True"):
        validation.check_size("hidden_size", True, 1)
    with pytest.raises(ValueError, match="proj_size: expected a non-negative int, got -1"):
        validation.check_size("proj_size", -1, 0)


def test_buffers() -> None:
    shapes = {"running_cell_mean_l0": (3, 5)}
    validation.check_buffers({"running_cell_mean_l0": torch.zeros(3, 5)}, shapes)
    with pytest.raises(TypeError, match="buffers: expected a mapping"):
        validation.check_buffers(None, shapes)
    with pytest.raises(ValueError, match=r"buffers: expected running_cell_mean_l0 of shape \(3, 5\), got None"):
        validation.check_buffers({}, shapes)
    with pytest.raises(ValueError, match=r"got \(2, 5\); pass dict\(module\.named_buffers\(\)\)"):
        validation.check_buffers({"running_cell_mean_l0": torch.zeros(2, 5)}, shapes)


@compiled
@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_lengths_in_a_list_that_is_another_each_call() -> None:
    """In compiled code the second list's ints are symbolic, and so is every one after it."""
    module = LSTM(4, 5, backend="cpu")
    whole = torch.compile(lambda x, lengths: module(x, lengths=lengths).output, backend="aot_eager", fullgraph=True)
    input = torch.randn(2, 3, 4)
    for lengths in ([2, 1, 2], [1, 0, 2], [2, 2, 0]):
        torch.testing.assert_close(whole(input, lengths), module(input, lengths=lengths).output)
