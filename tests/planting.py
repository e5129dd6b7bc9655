"""Putting errors into the reference, to see whether a check catches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fusedreg import reference
from fusedreg.layer import LayerParameters, LayerResult
from fusedreg.masks import LayerMasks
from fusedreg.regularization import Regularization
from fusedreg.testing import (
    LayerArguments,
    LayerCase,
    LayerImplementation,
)

PLAIN = LayerCase("plain", dtype=torch.float64)


def case_of(**options: Any) -> LayerCase:
    return replace(PLAIN, regularization=Regularization(**options))


def call(implement: LayerImplementation, case: LayerCase, arguments: LayerArguments, **changed: Any) -> LayerResult:
    """The layer without a backward. ``changed`` replaces arguments."""
    used = arguments._replace(**changed)
    return implement(
        *used[:4], case.options, lengths=used.lengths, reset=used.reset, seed=used.seed, running=used.running
    )


def changing_masks(change: Callable[[LayerMasks], LayerMasks]) -> LayerImplementation:
    """The reference with other masks than the counter contract's."""

    def implement(*arguments: Any, **keywords: Any) -> LayerResult:
        right = reference.layer_masks
        with mock.patch.object(reference, "layer_masks", lambda *a, **k: change(right(*a, **k))):
            return reference.lstm_layer(*arguments, **keywords)

    return implement


def changing_options(change: Callable[[Any], dict[str, Any]]) -> LayerImplementation:
    """The reference told other options than the caller's."""

    def implement(x: Tensor, h: Any, c: Any, parameters: LayerParameters, options: Any, **keywords: Any) -> LayerResult:
        return reference.lstm_layer(x, h, c, parameters, replace(options, **change(options)), **keywords)

    return implement


def changing_result(change: Callable[[LayerResult], LayerResult]) -> LayerImplementation:
    return lambda *arguments, **keywords: change(reference.lstm_layer(*arguments, **keywords))


def changing_weight(change: Callable[[Tensor], Tensor]) -> LayerImplementation:
    """The reference with another recurrent weight."""

    def implement(x: Tensor, h: Any, c: Any, parameters: LayerParameters, options: Any, **keywords: Any) -> LayerResult:
        parameters = parameters._replace(weight_hh=change(parameters.weight_hh))
        return reference.lstm_layer(x, h, c, parameters, options, **keywords)

    return implement


def with_backward_of(other: LayerImplementation) -> LayerImplementation:
    """The reference's values with another implementation's gradients."""

    def implement(*arguments: Any, **keywords: Any) -> LayerResult:
        right, wrong = reference.lstm_layer(*arguments, **keywords), other(*arguments, **keywords)
        parts = [
            two if one is None else two + (one - two).detach() for one, two in zip(right[:4], wrong[:4], strict=True)
        ]
        return LayerResult(*parts, right.statistics)

    return implement


class Backward(torch.autograd.Function):
    """The identity, with a backward that does what ``rule(grad, buffer)`` says to a buffer kept from the forward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.rule, ctx.buffer = rule, torch.ones_like(value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.rule(grads[0], ctx.buffer), None
