"""Every check of what a user passes to a call: argument, expected, got, remedy.

The option dataclasses check themselves. Nothing here changes a tensor, and nothing waits for a device: what only a
device knows (lengths on it) is clamped by the operator instead. The cost of a call's checks is a few comparisons, so
they are written out rather than composed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedreg.layer import compute_dtype
from fusedreg.parameters import Architecture

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STRIDED = torch.strided
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class InputError(ValueError, RuntimeError):
    """A ``ValueError`` that is also a ``RuntimeError``, which is what ``torch.nn.LSTM`` raises in the same place."""


class InputTypeError(TypeError, RuntimeError):
    """A ``TypeError`` that is also a ``RuntimeError``, for the same reason."""


def check_input(input: Any, architecture: Architecture, weight: Tensor, batch_first: bool) -> tuple[int, ...]:
    """Check the input of a call against the model: rank, size, type, device, length.

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, or ``(T, I)`` unbatched.
        architecture: the model's sizes.
        weight: its ``weight_ih_l0``, for type and device.
        batch_first: as in the call.

    Returns:
        The input's shape.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong rank or type. InputError: wrong feature size or device, or no time step.
    """
    if not isinstance(input, Tensor):
        raise TypeError(
            f"input: expected a tensor or a PackedSequence, got {type(input).__name__}; convert with torch.as_tensor"
        )
    if input.layout is not _STRIDED or input.is_nested:
        check_layout("input", input)
    shape: tuple[int, ...] = input.shape
    if len(shape) not in (2, 3):
        raise ValueError(
            f"input: expected 2 dimensions (T, I) or 3 {_layout(batch_first)}, got shape {tuple(shape)}; "
            f"reshape to (steps, rows, features)"
        )
    if input.dtype != weight.dtype or input.dtype not in DTYPES:
        raise wrong_type(input.dtype, weight.dtype, "module")
    if input.device != weight.device:
        raise InputError(
            f"input: expected device {weight.device}, where the parameters are, got {input.device}; move one with "
            f".to(device)"
        )
    if shape[-1] != architecture.input_size:
        raise InputError(
            f"input: expected input_size={architecture.input_size} features in the last dimension, got shape "
            f"{tuple(shape)}; check input_size and batch_first={batch_first}"
        )
    if shape[1 if batch_first and len(shape) == 3 else 0] == 0:
        raise InputError(
            f"input: expected at least one time step, got shape {tuple(shape)}; skip empty sequences, or check "
            f"batch_first={batch_first}"
        )
    return shape


def check_layout(name: str, value: Tensor) -> None:
    """Check that a tensor has one size in each dimension and a value at each place.

    Raises:
        InputError: sparse, nested, or in a library's own layout.
    """
    if value.layout is torch.strided and not value.is_nested:
        return
    if value.is_nested:
        got = "a nested tensor"
        remedy = "pad with torch.nested.to_padded_tensor(..., 0.0); fusedreg.LSTM takes the rows' lengths="
    else:
        got, remedy = f"layout {value.layout}", "convert with .to_dense()"
    raise InputError(f"{name}: expected a dense tensor (torch.strided), got {got}; {remedy}")


def wrong_type(got: torch.dtype, wanted: torch.dtype, model: str) -> ValueError:
    """The error for an input that is not of the parameters' type, or where that is none that can be computed in.

    Args:
        got: the input's.
        wanted: the parameters'.
        model: what the caller calls what has them.
    """
    if wanted not in DTYPES:
        return ValueError(
            f"input: expected parameters of a real floating type, got {wanted}; convert with {model}.float(), and the "
            f"input too"
        )
    also = f" or {model}.to({got})" if got in DTYPES else ""
    return ValueError(
        f"input: expected {wanted}, the parameters' type, got {got}; convert with input.to({wanted}){also}"
    )


def _layout(batch_first: bool) -> str:
    return "(B, T, I)" if batch_first else "(T, B, I)"


def check_state(hx: Any, architecture: Architecture, input: Tensor, rows: int | None) -> tuple[Tensor, Tensor]:
    """Check initial states ``(h_0, c_0)`` of shapes ``(L * D, B, P)`` and ``(L * D, B, H)``.

    Args:
        hx: what the caller passed; the rows' dimension is absent with an unbatched input.
        architecture: the model's sizes.
        input: already checked.
        rows: ``B``, or ``None`` with an unbatched input.

    Returns:
        The two states.

    Raises:
        InputTypeError: not a pair of tensors. InputError: wrong shape, type or device.
    """
    places, width = architecture.num_layers * architecture.num_directions, architecture.hidden_size
    leading = (places,) if rows is None else (places, rows)
    expected = (*leading, architecture.proj_size or width), (*leading, width)
    if type(hx) is tuple and len(hx) == 2 and are_states(hx[0], hx[1], expected, input):
        return hx
    if isinstance(hx, Tensor) or not isinstance(hx, Sequence) or len(hx) != 2:
        got = f"{type(hx).__name__} of length {len(hx)}" if isinstance(hx, Sequence) else type(hx).__name__
        raise InputTypeError(f"hx: expected a tuple (h_0, c_0) of two tensors, got {got}; pass None for zeros")
    for name, state, shape in zip(("h_0", "c_0"), hx, expected, strict=True):
        if not isinstance(state, Tensor):
            raise InputTypeError(
                f"hx: expected {name} to be a tensor, got {type(state).__name__}; pass hx=None for zeros, or "
                f"torch.zeros of the right shape"
            )
        check_layout(f"hx: {name}", state)
        if state.shape != shape:
            raise InputError(
                f"hx: expected {name} of shape {shape} (layers * directions{'' if rows is None else ', rows'}, "
                f"size), got {tuple(state.shape)}; batch_first does not apply to states"
            )
        check_state_type(name, state, input, is_cell=name == "c_0")
    return hx[0], hx[1]


def are_states(hidden: Any, cell: Any, expected: tuple[tuple[int, ...], tuple[int, ...]], input: Tensor) -> bool:
    """Whether two states are as nearly all are: what comes after it asks again, one thing after another, to name it."""
    return (
        isinstance(hidden, Tensor)
        and isinstance(cell, Tensor)
        and hidden.shape == expected[0]
        and cell.shape == expected[1]
        and hidden.dtype is cell.dtype is input.dtype
        and hidden.device == cell.device == input.device
        and hidden.layout is cell.layout is _STRIDED
    )


def check_state_type(name: str, state: Tensor, input: Tensor, *, is_cell: bool) -> None:
    """Check a state's device and type: the input's, or for a cell the wider type it is computed in.

    Raises:
        InputError: naming the state.
    """
    if state.device != input.device:
        raise InputError(f"hx: expected {name} on {input.device}, got {state.device}; move it with .to(device)")
    if state.dtype != input.dtype and not (is_cell and state.dtype == compute_dtype(input.dtype)):
        also = " (or float32)" if is_cell and input.dtype in (torch.bfloat16, torch.float16) else ""
        raise InputError(
            f"hx: expected {name} of {input.dtype}{also} as the input, got {state.dtype}; convert with "
            f"{name}.to({input.dtype})"
        )


def check_packed(packed: PackedSequence, lengths: Any) -> None:
    """Check a packed input, whose lengths are its own.

    Raises:
        ValueError: ``lengths`` beside it. InputError: features of another rank than 1.
    """
    if lengths is not None:
        raise ValueError(
            "lengths: expected None beside a PackedSequence, which has its own, got both; pass the padded batch with "
            "lengths, or the packed one without"
        )
    if packed.data.dim() != 2:
        raise InputError(
            f"input: expected packed data with 2 dimensions (steps of all rows, I), got shape "
            f"{tuple(packed.data.shape)}; pack a (T, B, I) batch"
        )


def check_lengths(lengths: Any, rows: int | None, steps: int, device: torch.device) -> Tensor:
    """Check the rows' lengths and bring them to the device.

    Args:
        lengths: ``(B,)``, a tensor of integers on any device, or a sequence of ints.
        rows, steps: the input's ``B`` (``None``: unbatched, which has no padding) and ``T``.
        device: the input's.

    Returns:
        int64 on ``device``. Lengths on the host have been checked to be in ``[0, T]``, except inside a traced
        region; there, and on another device, the operator clamps them.

    Raises:
        TypeError: not integers. ValueError: wrong shape, or out of range.
    """
    if rows is None:
        raise ValueError("lengths: expected None with an unbatched input, got lengths; cut the input instead")
    if not isinstance(lengths, Tensor):
        lengths = _lengths_of_sequence(lengths)
    check_layout("lengths", lengths)
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"lengths: expected a tensor of integers, got {lengths.dtype}; convert with lengths.long()")
    if lengths.dim() != 1 or lengths.shape[0] != rows:
        raise ValueError(
            f"lengths: expected shape ({rows},), got {tuple(lengths.shape)}; pass one integer in [0, {steps}] a row"
        )
    if lengths.device.type == "cpu" and not _traced(lengths) and lengths.numel() > 0:
        low, high = (int(bound) for bound in torch.aminmax(lengths))
        if low < 0 or high > steps:
            raise ValueError(
                f"lengths: expected values in [0, {steps}], the input's steps, got values from {low} to {high}; "
                f"clamp them or pad the input"
            )
    return lengths_on(device, lengths)


def lengths_on(device: torch.device, lengths: Tensor) -> Tensor:
    """The lengths as int64 on ``device``; those of the host without waiting for a GPU, and free to be changed at once.

    A copy to a GPU that is not to be waited for has read ordinary memory when the call returns, pinned memory not.
    """
    from_host = device.type == "cuda" and lengths.device.type == "cpu" and not _traced(lengths)
    if from_host and lengths.is_pinned():
        lengths = lengths.clone()
    moved: Tensor = lengths.to(device=device, dtype=torch.int64, non_blocking=from_host)
    return moved


def _lengths_of_sequence(lengths: Any) -> Tensor:
    if isinstance(lengths, (str, bytes)) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths: expected a tensor of integers, got {type(lengths).__name__}; pass one integer a row")
    # An int is asked for first: inside torch.compile a symbolic one answers to nothing else.
    if not all(
        (isinstance(length, int) or hasattr(length, "__index__")) and not isinstance(length, bool) for length in lengths
    ):
        raise TypeError(f"lengths: expected integers, got {list(lengths)!r}; pass one integer a row")
    return torch.tensor(list(lengths), dtype=torch.int64)


def _traced(tensor: Tensor) -> bool:
    """Whether the values cannot be read: compiled, fake, or transformed by ``torch.func``."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return True
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def check_reset(reset: Any, expected: tuple[int, ...], device: torch.device, bidirectional: bool) -> Tensor:
    """Check the resets: bool, of the input's shape without its features, and in one direction only.

    Args:
        reset: true where a row's state becomes zero before the step.
        expected: ``(T, B)``, ``(B, T)`` with ``batch_first``, ``(T,)`` unbatched.
        device: the input's.
        bidirectional: the model's.

    Raises:
        TypeError: not a bool tensor. ValueError: wrong shape or device, or a bidirectional model.
    """
    if bidirectional:
        raise ValueError(
            "reset: expected None with bidirectional=True, got a tensor; the reverse direction has no meaning across "
            "a reset: split the sequences, or use one direction"
        )
    if not isinstance(reset, Tensor):
        raise TypeError(
            f"reset: expected a bool tensor of shape {expected}, got {type(reset).__name__}; convert with torch.tensor"
        )
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: expected torch.bool, got {reset.dtype}; convert with reset.bool()")
    check_layout("reset", reset)
    if reset.dim() != len(expected) or any(a != b for a, b in zip(reset.shape, expected, strict=True)):
        raise ValueError(
            f"reset: expected shape {expected}, the input's without its features, got {tuple(reset.shape)}; one flag "
            f"a step and row"
        )
    if reset.device != device:
        raise ValueError(f"reset: expected device {device}, the input's, got {reset.device}; move it with .to(device)")
    return reset


def check_generator(generator: Any, seed: Any) -> None:
    """Check that a generator is one, comes without a seed, and is used in eager mode.

    Raises:
        TypeError: not a ``torch.Generator``. ValueError: beside ``seed=``, or in a compiled region.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator, got {type(generator).__name__}; an int goes into seed="
        )
    if seed is not None:
        raise ValueError("generator: expected None beside seed=, got both; pass the one that shall decide the masks")
    if torch.compiler.is_compiling():
        raise ValueError(
            "generator: expected None in a compiled region, got a torch.Generator; draw a seed outside with "
            "fusedreg.seeds.draw_seed(device, generator=generator) and pass it as seed="
        )


def check_batch_norm_rows(rows: int) -> None:
    """Check that batch statistics exist.

    Raises:
        ValueError: a single row in training.
    """
    if rows == 1:
        raise ValueError(
            "input: expected at least 2 rows with BatchNorm in training, got a batch of 1; call .eval(), enlarge the "
            "batch, or use LayerNorm"
        )


def check_buffers(buffers: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the running statistics of a functional call with a batch norm.

    Raises:
        TypeError: not a mapping. ValueError: one is missing or has another shape.
    """
    if not isinstance(buffers, Mapping):
        raise TypeError(
            f"buffers: expected a mapping with the batch norm's running statistics, got {type(buffers).__name__}; pass "
            f"dict(module.named_buffers())"
        )
    for name, shape in shapes.items():
        got = tuple(buffers[name].shape) if name in buffers else None
        if got != shape:
            raise ValueError(f"buffers: expected {name} of shape {shape}, got {got}; pass dict(module.named_buffers())")


def check_flag(name: str, value: Any) -> None:
    """Check an option that is True or False, with the error type of ``nn.LSTM``.

    Raises:
        TypeError: naming the option.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r} of type {type(value).__name__}; pass a bool")


def check_size(name: str, value: Any, least: int) -> None:
    """Check a size of the model, with the error types of ``nn.LSTM``.

    Raises:
        TypeError: not an int. ValueError: below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}; pass an int")
    if value < least:
        kind = "positive int" if least == 1 else "non-negative int"
        raise ValueError(f"{name}: expected a {kind}, got {value}; pass {least} or more")
