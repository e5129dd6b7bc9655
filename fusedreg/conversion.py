"""From torch's modules and back: ``from_torch`` and ``to_torch`` of :class:`fusedreg.LSTM` and ``LSTMCell``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fusedreg.regularization import Regularization

if TYPE_CHECKING:
    from fusedreg.cell import LSTMCell
    from fusedreg.modules import LSTM

_Module = TypeVar("_Module", bound="LSTM")
_Cell = TypeVar("_Cell", bound="LSTMCell")

_HYPERPARAMETERS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
)


def from_torch(cls: type[_Module], module: nn.LSTM, options: Mapping[str, Any]) -> _Module:
    """See :meth:`fusedreg.LSTM.from_torch`."""
    if not isinstance(module, nn.LSTM):
        raise TypeError(
            f"module: expected a torch.nn.LSTM, got {type(module).__name__}; a state_dict loads with load_state_dict"
        )
    _check_plain(module, "module")
    result = without_weights(cls, module, options)
    _copy_weights(module, result)
    return result


def without_weights(cls: type[_Module], module: nn.LSTM, options: Mapping[str, Any]) -> _Module:
    """What :meth:`fusedreg.LSTM.from_torch` makes, before the weights, which hold anything; ``module`` is only read."""
    arguments = {name: getattr(module, name) for name in _HYPERPARAMETERS}
    if "regularization" in options and options["regularization"] is not None and options["regularization"].dropout:
        del arguments["dropout"]
    stored = next(module.parameters())  # and not by name: reading a parametrised weight computes it
    # On "meta" nothing is drawn, so that a conversion does not move torch's generator.
    result = cls(**{**arguments, **options}, device="meta", dtype=stored.dtype)
    result.to_empty(device=stored.device)
    result.reset_norm()
    return result.train(module.training)


def to_torch(module: LSTM) -> nn.LSTM:
    """See :meth:`fusedreg.LSTM.to_torch`."""
    _check_plain(module, "module")
    regularization = module.regularization
    _check_off_in_evaluation(regularization)
    arguments = {name: getattr(module, name) for name in _HYPERPARAMETERS}
    rates = {regularization.layer_rate("dropout", layer, module.num_layers) for layer in range(module.num_layers - 1)}
    if len(rates) > 1:
        raise ValueError(
            f"to_torch: expected one dropout for all layers, got {module.dropout}; assign module.dropout a float first"
        )
    arguments["dropout"] = rates.pop() if rates else 0.0
    weight: Tensor = module.weight_ih_l0  # type: ignore[assignment]
    result = nn.LSTM(**arguments, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    _copy_weights(module, result)
    return result.train(module.training)


def cell_from_torch(cls: type[_Cell], module: nn.LSTMCell, options: Mapping[str, Any]) -> _Cell:
    """See :meth:`fusedreg.LSTMCell.from_torch`."""
    if not isinstance(module, nn.LSTMCell):
        raise TypeError(
            f"module: expected a torch.nn.LSTMCell, got {type(module).__name__}; a state_dict loads with "
            f"load_state_dict"
        )
    _check_plain(module, "module")
    result = cell_without_weights(cls, module, options)
    _copy_weights(module, result)
    return result


def cell_without_weights(cls: type[_Cell], module: nn.LSTMCell, options: Mapping[str, Any]) -> _Cell:
    """What :meth:`fusedreg.LSTMCell.from_torch` makes, before the weights, as :func:`without_weights`."""
    stored = next(module.parameters())
    sizes = module.input_size, module.hidden_size, module.bias
    result = cls(*sizes, device="meta", dtype=stored.dtype, **options)
    result.to_empty(device=stored.device)
    result.reset_norm()
    return result.train(module.training)


def cell_to_torch(module: LSTMCell) -> nn.LSTMCell:
    """See :meth:`fusedreg.LSTMCell.to_torch`."""
    _check_plain(module, "module")
    _check_off_in_evaluation(module.regularization)
    weight: Tensor = module.weight_ih
    sizes = module.input_size, module.hidden_size, module.bias
    result = nn.LSTMCell(*sizes, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    _copy_weights(module, result)
    return result.train(module.training)


def _check_off_in_evaluation(regularization: Regularization) -> None:
    for name in ("norm", "zoneout_hidden", "zoneout_cell", "cell_dropout"):
        value = getattr(regularization, name)
        if value and any(value if isinstance(value, tuple) else (value,)):
            remedy = (
                "torch's module has no place for its parameters"
                if name == "norm"
                else "it acts in evaluation too: assign a regularization without it first"
            )
            raise ValueError(f"to_torch: expected {name} to be off, got {name}={value!r}; {remedy}")


def _check_plain(module: nn.Module, argument: str) -> None:
    if is_parametrized(module):
        raise ValueError(
            f"{argument}: expected plain weights, got parametrisations of {sorted(module.parametrizations)}; bake them "  # type: ignore[arg-type]
            f"in with torch.nn.utils.parametrize.remove_parametrizations first"
        )


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in source.named_parameters(recurse=False):
            copy = getattr(target, name)
            copy.copy_(parameter)
            copy.requires_grad_(parameter.requires_grad)
