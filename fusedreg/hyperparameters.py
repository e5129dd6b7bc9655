"""The checks of what a module is made with: hyperparameters, with the error types of ``nn.LSTM``, and options."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

from fusedreg.parameters import Architecture
from fusedreg.regularization import Regularization
from fusedreg.validation import DTYPES, InputTypeError, check_flag, check_size


def check_dropout(value: Any) -> None:
    """Check the kind of value that ``dropout`` is, with the error type of ``nn.LSTM``; its range is checked later.

    Raises:
        ValueError: neither a number nor a sequence of them.
    """
    numeric = isinstance(value, (numbers.Real, Sequence)) and not isinstance(value, (bool, str, bytes))
    if not numeric:
        raise ValueError(
            f"dropout: expected a number in [0, 1), or one a layer, got {value!r} of type {type(value).__name__}; pass "
            f"a float"
        )


def check_dtype(dtype: Any) -> None:
    """Check the type of a model's parameters.

    Raises:
        InputTypeError: not a real floating type that there is arithmetic for.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputTypeError(
            f"dtype: expected torch.float32, float64, bfloat16 or float16, got {dtype!r}; leave it out for the default"
        )


def check_architecture(architecture: Architecture, batch_first: Any) -> None:
    """Check a model's hyperparameters, with the error types of ``nn.LSTM``.

    Raises:
        TypeError, ValueError: naming the hyperparameter.
    """
    check_flag("bias", architecture.bias)
    check_flag("batch_first", batch_first)
    check_flag("bidirectional", architecture.bidirectional)
    check_size("input_size", architecture.input_size, 1)
    check_size("hidden_size", architecture.hidden_size, 1)
    check_size("num_layers", architecture.num_layers, 1)
    check_size("proj_size", architecture.proj_size, 0)
    if architecture.proj_size >= architecture.hidden_size:
        raise ValueError(
            f"proj_size: expected less than hidden_size={architecture.hidden_size}, got {architecture.proj_size}; "
            f"pass 0 for no projection"
        )


def merge_regularization(regularization: Any, fields: Regularization) -> Regularization:
    """The regularisers of a constructor: those given as one value, or those given one by one.

    Args:
        regularization: a :class:`~fusedreg.Regularization` or ``None``.
        fields: what was given by name. Only ``dropout``, ``nn.LSTM``'s own, may stand beside the other.

    Raises:
        TypeError: not a ``Regularization``. ValueError: given both ways.
    """
    if regularization is None:
        return fields
    if not isinstance(regularization, Regularization):
        raise TypeError(
            f"regularization: expected a fusedreg.Regularization or None, got {type(regularization).__name__}; pass "
            f"fusedreg.Regularization(...) or its fields by name"
        )
    changed = fields.changed()
    changed.pop("dropout", None)
    dropout = fields.dropout or regularization.dropout
    if changed or regularization.dropout not in (0.0, dropout):
        both = ", ".join(sorted(changed) or ["dropout"])
        raise ValueError(f"regularization: expected None beside {both}, got both; put {both} into the Regularization")
    return dataclasses.replace(regularization, dropout=dropout)
