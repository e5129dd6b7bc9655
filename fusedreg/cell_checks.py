"""The checks of what a user passes to :class:`fusedreg.LSTMCell`: argument, expected, got, remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedreg.layer import LayerOptions
from fusedreg.masks import WEIGHT
from fusedreg.regularization import BatchNorm, Regularization
from fusedreg.validation import (
    DTYPES,
    InputError,
    InputTypeError,
    are_states,
    check_layout,
    check_state_type,
    wrong_type,
)


def check_regularization(regularization: Regularization) -> None:
    """Check that the options make sense for one layer, step by step.

    Raises:
        ValueError: ``dropout``, or a batch norm with ``input_statistics="sequence"``.
    """
    if regularization.dropout not in (0.0, (), (0.0,)):
        raise ValueError(
            f"dropout: expected 0 for a cell, since it acts between layers, got {regularization.dropout}; put "
            f"nn.Dropout between two cells, or use output_dropout"
        )
    norm = regularization.norm
    if isinstance(norm, BatchNorm) and norm.input_statistics == "sequence":
        raise ValueError(
            "norm: expected input_statistics='step' for a cell, got 'sequence', which takes its statistics over all "
            "steps at once; use fusedreg.LSTM over the whole sequence"
        )


def check_output_is_asked_for(options: LayerOptions) -> None:
    """Check, of a step without ``return_output``, that an output which is not ``h`` is not lost.

    Raises:
        ValueError: ``output_dropout``, or zoneout with ``zoneout_output="candidate"``.
    """
    if options.output_dropout > 0.0 or (options.zoneout_output == "candidate" and options.zoneout_hidden > 0.0):
        name = "output_dropout" if options.output_dropout > 0.0 else "zoneout_output='candidate'"
        raise ValueError(
            f"return_output: expected True with {name}, which makes the output differ from h, got False; call "
            f"output, (h, c) = cell(input, (h, c), return_output=True)"
        )


def check_input(input: Any, input_size: int, weight: Tensor) -> tuple[int, ...]:
    """Check the input of a step: rank, size, type, device.

    Returns:
        The input's shape.

    Raises:
        TypeError: not a tensor. ValueError: wrong rank or type. InputError: wrong feature size or device.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}; convert with torch.as_tensor")
    check_layout("input", input)
    shape: tuple[int, ...] = input.shape
    if len(shape) not in (1, 2):
        raise ValueError(
            f"input: expected shape (B, {input_size}), or ({input_size},) unbatched, got {tuple(shape)}; pass "
            f"one step, or use fusedreg.LSTM for a whole sequence"
        )
    if input.dtype != weight.dtype or input.dtype not in DTYPES:
        raise wrong_type(input.dtype, weight.dtype, "cell")
    if input.device != weight.device:
        raise InputError(
            f"input: expected device {weight.device}, where the parameters are, got {input.device}; move one with "
            f".to(device)"
        )
    if shape[-1] != input_size:
        raise InputError(
            f"input: expected input_size={input_size} features in the last dimension, got shape {tuple(shape)}; "
            f"check input_size"
        )
    return shape


def check_state(hx: Any, shape: tuple[int, ...], hidden_size: int, input: Tensor) -> tuple[Tensor, Tensor]:
    """Check ``(h, c)``, each of the input's ``shape`` with ``hidden_size`` in place of the features.

    Raises:
        InputTypeError: not a pair of tensors. InputError: wrong shape, type or device.
    """
    expected = (hidden_size,) if len(shape) == 1 else (shape[0], hidden_size)
    if type(hx) is tuple and len(hx) == 2 and are_states(hx[0], hx[1], (expected, expected), input):
        return hx
    if isinstance(hx, Tensor) or not isinstance(hx, Sequence) or len(hx) != 2:
        got = f"{type(hx).__name__} of length {len(hx)}" if isinstance(hx, Sequence) else type(hx).__name__
        raise InputTypeError(f"hx: expected a tuple (h, c) of two tensors, got {got}; pass None for zeros")
    for name, state in (("h", hx[0]), ("c", hx[1])):
        if not isinstance(state, Tensor):
            raise InputTypeError(f"hx: expected {name} to be a tensor, got {type(state).__name__}; pass None for zeros")
        check_layout(f"hx: {name}", state)
        if state.shape != expected:
            raise InputError(
                f"hx: expected {name} of shape {expected}, got {tuple(state.shape)}; a cell's states have no "
                f"dimension of layers"
            )
        check_state_type(name, state, input, is_cell=name == "c")
    return hx[0], hx[1]


def check_reset(reset: Any, input: Tensor) -> Tensor:
    """Check which rows begin anew: bool, the input's shape without its features.

    Raises:
        TypeError: not a bool tensor. ValueError: wrong shape or device.
    """
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        got = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset: expected a bool tensor, one flag a row, got {got}; convert with reset.bool()")
    check_layout("reset", reset)
    expected = input.shape[:-1]
    if reset.dim() != len(expected) or any(a != b for a, b in zip(reset.shape, expected, strict=True)):
        raise ValueError(f"reset: expected shape {tuple(expected)}, one flag a row, got {tuple(reset.shape)}")
    if reset.device != input.device:
        raise ValueError(f"reset: expected device {input.device}, the input's, got {reset.device}; move it there")
    return reset


def check_sequence(sequence: Any, seed: Any, generator: Any, draws: bool) -> None:
    """Check that a sequence is one, decides the masks alone, and has a seed where masks are drawn.

    Raises:
        TypeError: not a ``CellSequence``. ValueError: beside a seed or generator, a step out of range, no seed.
    """
    from fusedreg.cell import CellSequence  # here, because fusedreg.cell imports this module

    if not isinstance(sequence, CellSequence):
        raise TypeError(
            f"sequence: expected what cell.begin() returns, got {type(sequence).__name__}; a seed goes into seed="
        )
    if seed is not None or generator is not None:
        given = "seed" if seed is not None else "generator"
        raise ValueError(f"{given}: expected None beside a sequence, which has a seed, got both; pass it to cell.begin")
    step: Any = sequence.step  # inside torch.compile it may be a symbolic int
    if isinstance(step, (bool, float, Tensor)) or not (isinstance(step, int) or hasattr(step, "__index__")):
        raise TypeError(f"sequence: expected an int for its step, got {type(step).__name__}; pass sequence.at(step)")
    if not 0 <= step < WEIGHT:  # from there on the counter names masks of other families: see fusedreg.masks
        raise ValueError(f"sequence: expected a step in [0, {WEIGHT}), got {step}; count steps from 0")
    if draws and sequence.seed is None:
        raise ValueError(
            "sequence: expected one with a seed, since masks are drawn in training, got one that was begun in "
            "evaluation; begin it after cell.train()"
        )
