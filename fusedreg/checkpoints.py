"""Weights from other libraries' LSTMs, under ``nn.LSTM``'s names and in its order of gates.

Each function returns a state dict for :class:`fusedreg.LSTM` (or ``torch.nn.LSTM``) and changes nothing it is given.
A library with one bias gives ``bias_ih``; ``bias_hh`` is then zero. In training both receive the same gradient, so
their sum moves twice as far in a step as the one bias did.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedreg.parameters import suffix

# How the gates are stacked, and where each of i, f, g, o stands.
_KERAS_GATES = (0, 1, 2, 3)  # i, f, c (our g), o
_HASTE_GATES = (0, 2, 1, 3)  # i, g, f, o
_RAW = re.compile(r"(?P<path>.*?)(?:(?P<module>module)\.)?(?P<name>weight_hh_l\d+(?:_reverse)?)_raw")


def from_keras(weights: Sequence[Sequence[Any]], *, bidirectional: bool = False) -> dict[str, Tensor]:
    """Weights of a stack of Keras ``LSTM`` layers.

    Keras keeps ``kernel (I, 4H)``, ``recurrent_kernel (H, 4H)`` and one ``bias (4H,)``, and stacks the gates i, f, c,
    o, where c is our g.

    Args:
        weights: ``layer.get_weights()`` of each layer from the first on; of a ``Bidirectional`` wrapper, which lists
            the forward layer's and then the backward layer's.
        bidirectional: whether each entry is such a wrapper's. Its ``merge_mode`` has to be ``"concat"``.

    Returns:
        A state dict, float32 unless the arrays are of another floating-point type.

    Raises:
        ValueError: an entry has another number of arrays, or they do not fit each other.

    Example:
        >>> import numpy, fusedreg
        >>> layer = [numpy.zeros((3, 16)), numpy.zeros((4, 16)), numpy.zeros(16)]
        >>> sorted(fusedreg.checkpoints.from_keras([layer]))
        ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
    """
    directions = 2 if bidirectional else 1
    state: dict[str, Tensor] = {}
    for layer, arrays in enumerate(weights):
        each, rest = divmod(len(arrays), directions)
        if rest or each not in (2, 3):
            raise ValueError(
                f"weights[{layer}]: expected kernel, recurrent kernel and, where there is one, bias"
                f"{', forward and then backward' if bidirectional else ''}, got {len(arrays)} arrays; pass "
                f"layer.get_weights()"
            )
        for direction in range(directions):
            tensors = [torch.as_tensor(array) for array in arrays[direction * each : (direction + 1) * each]]
            state |= _transposed(f"weights[{layer}]", tensors, _KERAS_GATES, suffix(layer, direction))
    return state


def from_haste(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a Haste ``LSTM`` (``haste_pytorch.LSTM``), which has one layer.

    Haste keeps ``kernel (I, 4H)``, ``recurrent_kernel (H, 4H)`` and one ``bias (4H,)``, and stacks the gates i, g, f,
    o.

    Args:
        state: ``module.state_dict()``.

    Raises:
        ValueError: other entries than these three, or of shapes that do not fit each other.

    Example:
        >>> import torch, fusedreg
        >>> state = {"kernel": torch.zeros(3, 16), "recurrent_kernel": torch.zeros(4, 16), "bias": torch.zeros(16)}
        >>> fusedreg.LSTM(3, 4).load_state_dict(fusedreg.checkpoints.from_haste(state))
        <All keys matched successfully>
    """
    names = ("kernel", "recurrent_kernel", "bias")
    if set(state) != set(names):
        raise ValueError(f"state: expected the entries {', '.join(names)}, got {', '.join(sorted(state)) or 'none'}")
    return _transposed("state", [state[name] for name in names], _HASTE_GATES, suffix(0, 0))


def from_awd_lstm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model whose LSTMs are wrapped by AWD-LSTM's ``WeightDrop``.

    The wrapper keeps the recurrent weight as ``weight_hh_l0_raw`` and puts a dropped copy under ``weight_hh_l0``; the
    wrapped LSTM stands under ``module``. Here the raw weight gets its name back, dropped copies go, and ``module.`` is
    taken out of the names of what is wrapped. Everything else stays as it is.

    Args:
        state: of the whole model or of one wrapper.

    Raises:
        ValueError: no raw recurrent weight is there.

    Example:
        >>> import torch, fusedreg
        >>> raw, other = torch.zeros(16, 4), torch.zeros(16, 3)
        >>> state = {"rnns.0.module.weight_hh_l0_raw": raw, "rnns.0.module.weight_ih_l0": other}
        >>> sorted(fusedreg.checkpoints.from_awd_lstm(state))
        ['rnns.0.weight_hh_l0', 'rnns.0.weight_ih_l0']
    """
    raw: dict[str, str] = {}  # the new name of each raw weight
    wrappers: set[str] = set()
    for name in state:
        if match := _RAW.fullmatch(name):
            wrappers.add(match["path"])
            raw[name] = match["path"] + match["name"]
    if not raw:
        raise ValueError(
            "state: expected names such as weight_hh_l0_raw, which AWD-LSTM's WeightDrop gives, got "
            f"{', '.join(sorted(state)) or 'none'}"
        )
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        new = raw.get(name)
        if new is None:
            new = name
            for path in wrappers:
                if name.startswith(path + "module."):
                    new = path + name[len(path) + len("module.") :]
            if new in raw.values():
                continue  # the dropped copy
        result[new] = value
    return result


def _transposed(argument: str, tensors: Sequence[Tensor], gates: Sequence[int], ending: str) -> dict[str, Tensor]:
    """Kernel, recurrent kernel and maybe a bias, all with the gates along the last axis, as ``nn.LSTM`` has them."""
    kernel, recurrent = tensors[:2]
    width = recurrent.shape[-1]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    expected = [(*kernel.shape[:1], width), (width // 4, width), (width,)][: len(tensors)]
    if width % 4 or shapes != expected:
        raise ValueError(f"{argument}: expected shapes (I, 4H), (H, 4H) and (4H,), got {shapes}")

    def reordered(tensor: Tensor) -> Tensor:
        parts = tensor.chunk(4, -1)
        return torch.cat([parts[gate] for gate in gates], -1)

    result = {"weight_ih": reordered(kernel).t().contiguous(), "weight_hh": reordered(recurrent).t().contiguous()}
    if len(tensors) == 3:
        result["bias_ih"] = reordered(tensors[2])
        result["bias_hh"] = torch.zeros_like(result["bias_ih"])
    return {name + ending: value for name, value in result.items()}
