"""What memory safety needs of an operator's arguments: anyone can call an operator, and a kernel believes its sizes.

:mod:`fusedreg.validation` has checked the arguments of those who come by :func:`fusedreg.functional.lstm`; the index
of running statistics is limited in the kernels, and lengths are clamped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedreg.backends.triton.layout import Arguments
from fusedreg.encoding import DIFFERENTIABLE, NORM_BATCH, NORM_LAYER, NORM_NONE, SAVE_GATES, SAVE_NOTHING

_NAME = "fusedreg::triton_lstm_layer"
_MOST_ELEMENTS = 2**31 - 1024  # so that the last tile ends below 2**31 too
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(name: str, value: Tensor, like: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype == dtype and value.shape == shape and value.device == like.device:
        return
    raise RuntimeError(
        f"{_NAME}: {name}: expected {dtype} of shape {shape} on {like.device}, got {value.dtype} of shape "
        f"{tuple(value.shape)} on {value.device}; call fusedreg.LSTM, which passes what is needed"
    )


def check_models(tensors: Mapping[str, Any], models: int) -> None:
    """That every tensor has an axis of the models in front; those that are ``None`` have none."""
    for name, value in tensors.items():
        if value is not None and (value.dim() == 0 or value.shape[0] != models):
            raise RuntimeError(
                f"{_NAME}: {name}: expected an axis of {models} models in front, as input (M, T, B, I) has, got shape "
                f"{tuple(value.shape)}; expand it where models have it in common"
            )


def check_arguments(tensors: Arguments, rates: Sequence[float], options: Sequence[int]) -> None:
    """Types, sizes and devices of the 27 tensors, and how many rates and options there are."""
    input, weight_hh = tensors.input, tensors.weight_hh
    if len(rates) != 9 or len(options) != 15:
        raise RuntimeError(
            f"{_NAME}: rates, options: expected 9 and 15 numbers, got {len(rates)} and {len(options)}; take them from "
            "fusedreg.ops.encode_options"
        )
    if input.dim() != 3 or input.dtype not in _DTYPES or input.shape[0] == 0 or weight_hh.dim() != 2:
        raise RuntimeError(
            f"{_NAME}: input, weight_hh: expected (T, B, I) with T > 0 in float32, bfloat16 or float16, and (4H, P), "
            f"got {tuple(input.shape)} in {input.dtype} and {tuple(weight_hh.shape)}; call fusedreg.LSTM"
        )
    size = weight_hh.shape[0] // 4
    if tensors.weight_hr is None and weight_hh.shape[1] != size:
        raise RuntimeError(
            f"{_NAME}: weight_hr: expected (P, H) with weight_hh (4H, P) of shape {tuple(weight_hh.shape)}, got None; "
            "call fusedreg.LSTM"
        )
    _check_sizes(input, weight_hh)
    expected = _expected(tensors, options)
    required = {"weight_ih", "weight_hh", *_of_norms(tensors, options, expected)}
    if options[2] and any(rate > 0.0 for rate in rates):
        required.add("seed")
    for name, (dtype, shape) in expected.items():
        value = getattr(tensors, name)
        if value is not None:
            _check(name, value, input, dtype, shape)
        elif name in required:
            raise RuntimeError(f"{_NAME}: {name}: expected a tensor with these options, got None; call fusedreg.LSTM")
    if tensors.seed is not None and tensors.seed.dim() != 0:
        _check_groups("seed", tensors.seed.shape[0], tensors, options)


def _check_sizes(input: Tensor, weight_hh: Tensor) -> None:
    """Within a step elements are counted in 32 bits; steps and rows are handed over in as many."""
    (steps, rows, _), (gates, width) = input.shape, weight_hh.shape
    sizes = {"4 H P": gates * width, "B H": rows * (gates // 4), "T": steps}
    for name, size in sizes.items():
        if size > _MOST_ELEMENTS:
            raise RuntimeError(
                f"{_NAME}: input, weight_hh: expected {name} to be at most {_MOST_ELEMENTS}, got {size} of "
                f"T = {steps}, B = {rows}, H = {gates // 4}, P = {width}: these kernels count a step's elements in 32 "
                "bits; split the batch or the sequence, or use backend='reference'"
            )


def _expected(tensors: Arguments, options: Sequence[int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of everything but what belongs to a norm."""
    (steps, rows, features), (gates, width) = tensors.input.shape, tensors.weight_hh.shape
    size, storage = gates // 4, tensors.input.dtype
    return {
        "weight_ih": (storage, (4 * size, features)),
        "weight_hh": (storage, (4 * size, width)),
        "bias_ih": (storage, (4 * size,)),
        "bias_hh": (storage, (4 * size,)),
        "weight_hr": (storage, (width, size)),
        "initial_hidden": (storage, (rows, width)),
        "initial_cell": (torch.float32, (rows, size)),
        "lengths": (torch.int64, (rows,)),
        "reset": (torch.bool, (steps, rows)),
        "seed": (torch.int64, () if tensors.seed is None or tensors.seed.dim() == 0 else (tensors.seed.shape[0], 2)),
        "hidden_probe": (storage, (steps, rows, width)),
        "cell_probe": (torch.float32, (steps, rows, size)),
    }


def _of_norms(
    tensors: Arguments, options: Sequence[int], expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> set[str]:
    """Adds what belongs to the norms, and says what of it has to be there."""
    size, storage, kind = tensors.weight_hh.shape[0] // 4, tensors.input.dtype, options[7]
    required: set[str] = set()
    for site, on, count in zip(("input", "recurrent", "cell"), options[8:11], (4 * size, 4 * size, size), strict=True):
        if kind == NORM_NONE or not on:
            continue
        expected[f"norm_{site}_weight"] = expected[f"norm_{site}_bias"] = (storage, (count,))
        required.add(f"norm_{site}_weight")
        if site == "cell" or kind == NORM_LAYER:
            required.add(f"norm_{site}_bias")
        if kind == NORM_BATCH:
            mean = getattr(tensors, f"running_{site}_mean")
            kept = 0 if mean is None else mean.shape[0]
            expected[f"running_{site}_mean"] = expected[f"running_{site}_var"] = (torch.float32, (kept, count))
            if mean is not None:
                required.add(f"running_{site}_var")
    if kind == NORM_BATCH:
        steps = tensors.input.shape[0]
        expected["running_index"] = expected["running_input_index"] = (torch.int64, (steps,))
    return required


def _check_groups(name: str, groups: int, tensors: Arguments, options: Sequence[int]) -> None:
    """Groups of consecutive rows, which share no statistics."""
    rows = tensors.input.shape[1]
    if groups < 1 or rows % groups:
        raise RuntimeError(
            f"{_NAME}: {name}: expected a number of groups that divides the {rows} rows, got {groups}; give each group "
            "as many rows"
        )
    if groups > 1 and options[2] and options[7] == NORM_BATCH:
        raise RuntimeError(
            f"{_NAME}: {name}: expected one group with a batch norm in training, whose statistics are over all rows, "
            f"got {groups}; call once a group"
        )


def check_backward(tensors: Arguments, options: Sequence[int], needed: Sequence[bool]) -> None:
    """What the backward is asked for besides: groups of gradients, gradients of what is there."""
    if options[14] > 1:
        _check_groups("options[14], gradient groups", options[14], tensors, options)
    if len(needed) != len(DIFFERENTIABLE):
        raise RuntimeError(
            f"{_NAME}_backward: needed: expected {len(DIFFERENTIABLE)} flags, got {len(needed)}; call fusedreg.LSTM"
        )
    if needed[5] and tensors.weight_hr is None:
        raise RuntimeError(f"{_NAME}_backward: needed: weight_hr is None and has no gradient; call fusedreg.LSTM")


def check_saved(tensors: Arguments, saved: Sequence[Tensor], options: Sequence[int]) -> None:
    """The seven tensors that the forward kept: ``cells``, ``hidden``, both gates' and three statistics."""
    input, (gate_rows, width) = tensors.input, tensors.weight_hh.shape
    size = gate_rows // 4
    steps, rows, _ = input.shape
    kind, (norm_input, norm_recurrent, norm_cell), save = options[7], options[8:11], options[13]
    if save == SAVE_NOTHING:
        raise RuntimeError(
            f"{_NAME}_backward: options: expected a forward that saved for the backward, got save = 0 (nothing); "
            "encode the options with SAVE_GATES"
        )
    gates = (steps, rows, 4 * size)
    kept = torch.int16 if input.dtype != torch.float32 and kind == NORM_NONE else torch.float32
    by_step = [(1 if options[11] else steps, 2, 4 * size), (steps, 2, 4 * size), (steps, 2, size)]
    statistics = by_step if kind == NORM_BATCH else [(steps, 2, rows)] * 3
    wanted = [
        ("cells", torch.float32, (steps, rows, size), True),
        ("hidden", input.dtype, (steps, rows, width), True),
        ("gates", kept, gates, save == SAVE_GATES),
        ("input_gates", torch.float32, gates, save == SAVE_GATES and kind != NORM_NONE),
        ("input_statistics", torch.float32, statistics[0], norm_input and kind != NORM_NONE),
        ("recurrent_statistics", torch.float32, statistics[1], norm_recurrent and kind != NORM_NONE),
        ("cell_statistics", torch.float32, statistics[2], norm_cell and kind != NORM_NONE),
    ]
    for (name, dtype, shape, present), value in zip(wanted, saved, strict=True):
        if present:
            _check(name, value, input, dtype, shape)
