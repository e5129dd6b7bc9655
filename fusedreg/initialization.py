"""Initial values that help an LSTM to remember: a forget bias, orthogonal recurrent weights.

Both work on :class:`fusedreg.LSTM` and on :class:`torch.nn.LSTM` alike, in place, and return the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def _groups(module: nn.Module) -> Iterator[list[str]]:
    """The names of the parameters of each layer and direction."""
    names = getattr(module, "_all_weights", None)
    if names is None or getattr(module, "mode", None) != "LSTM":
        raise TypeError(
            f"module: expected a fusedreg.LSTM or a torch.nn.LSTM, got {type(module).__name__}; pass the layer itself, "
            f"not the model that holds it"
        )
    return iter(names)


def set_forget_bias(module: Module, value: float = 1.0) -> Module:
    """Set the forget gate's bias, which is the *sum* of ``bias_ih`` and ``bias_hh``, to ``value``.

    A forget gate near 1 lets gradients pass from the start (Gers et al. 2000; Jozefowicz et al. 2015: 1). Setting
    both biases to 1 by hand, as is often seen, makes it 2.

    Args:
        module: a :class:`fusedreg.LSTM` or :class:`torch.nn.LSTM` with biases.
        value: of the sum; ``bias_hh``'s part becomes 0.

    Returns:
        ``module``.

    Raises:
        TypeError: not an LSTM. ValueError: it has no biases.

    Example:
        >>> import fusedreg
        >>> lstm = fusedreg.initialization.set_forget_bias(fusedreg.LSTM(3, 4))
        >>> (lstm.bias_ih_l0 + lstm.bias_hh_l0)[4:8].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    groups = list(_groups(module))
    if not module.bias:
        raise ValueError("module: expected biases, got bias=False; make it with bias=True")
    hidden_size = int(module.hidden_size)  # type: ignore[arg-type]
    with torch.no_grad():
        for names in groups:
            bias_ih, bias_hh = (getattr(module, name) for name in names if name.startswith("bias_"))
            bias_ih[hidden_size : 2 * hidden_size] = value
            bias_hh[hidden_size : 2 * hidden_size] = 0.0
    return module


def orthogonal_recurrent(module: Module, gain: float = 1.0, generator: torch.Generator | None = None) -> Module:
    """Make each gate's recurrent matrix orthogonal, times ``gain`` (Saxe et al. 2014).

    Each of the four ``(H, P)`` blocks of ``weight_hh`` is drawn on its own: an orthogonal ``(4H, P)`` matrix would
    make its gates' norms depend on each other.

    Args:
        module: a :class:`fusedreg.LSTM` or :class:`torch.nn.LSTM`.
        gain: scale of the orthogonal matrices.
        generator: draws them; default: torch's.

    Returns:
        ``module``.

    Raises:
        TypeError: not an LSTM.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.initialization.orthogonal_recurrent(fusedreg.LSTM(3, 4))
        >>> block = lstm.weight_hh_l0[:4]
        >>> torch.allclose(block @ block.t(), torch.eye(4), atol=1e-5)
        True
    """
    for names in _groups(module):
        weight: Tensor = getattr(module, next(name for name in names if name.startswith("weight_hh")))
        with torch.no_grad():
            for block in weight.chunk(4):
                wide = block.dtype if block.dtype in (torch.float32, torch.float64) else torch.float32
                drawn = torch.empty(block.shape, dtype=wide, device=block.device)
                block.copy_(nn.init.orthogonal_(drawn, gain, generator))
    return module
