"""The operators' kernels: one layer in one direction, forward and backward, under the schema of all backends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedreg.backends.triton.backward import layer_backward
from fusedreg.backends.triton.before_loop import input_product, masked_input, masked_weight, summed_bias
from fusedreg.backends.triton.checks import check_arguments, check_backward, check_models, check_saved
from fusedreg.backends.triton.forward_loop import forward_loop
from fusedreg.backends.triton.input_norm import input_statistics, normalised
from fusedreg.backends.triton.layout import Arguments, ForwardResults, Layer, LoopInputs, loop_inputs, make_layer
from fusedreg.encoding import NUMBER_OF_TENSORS, TENSOR_ARGUMENTS
from fusedreg.fakes import backward_fake, forward_fake
from fusedreg.schemas import INCOMING, SAVED


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """``fusedreg::triton_lstm_layer_forward``: the arguments and results of :mod:`fusedreg.schemas`."""
    if arguments[0].dim() == 4:
        return _by_model(_forward, forward_fake(*arguments), arguments, TENSOR_ARGUMENTS)
    return _forward(*arguments)


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """``fusedreg::triton_lstm_layer_backward``: the arguments and results of :mod:`fusedreg.schemas`."""
    if arguments[len(INCOMING)].dim() == 4:
        names = (*INCOMING, *TENSOR_ARGUMENTS, *SAVED)
        return _by_model(_backward, backward_fake(*arguments), arguments, names)
    return _backward(*arguments)


def _by_model(
    operator: Callable[..., tuple[Tensor, ...]],
    results: tuple[Tensor, ...],
    arguments: Sequence[Any],
    names: Sequence[str],
) -> tuple[Tensor, ...]:
    """Models one after another, of tensors that all have an axis of models in front.

    A model's results are copied into their place. Written there they might stand at an address that 16 does not divide,
    for which Triton compiles a kernel anew.
    """
    models = results[0].shape[0]
    check_models(dict(zip(names, arguments)), models)  # noqa: B905
    for model in range(models):
        own = [argument[model] if isinstance(argument, Tensor) else argument for argument in arguments]
        for together, result in zip(results, operator(*own), strict=True):
            together[model].copy_(result)
    return results


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    check_arguments(Arguments(*arguments[:NUMBER_OF_TENSORS]), *arguments[NUMBER_OF_TENSORS:-1])
    results = forward_fake(*arguments)  # empty tensors, here on a real device
    if results[0].shape[1] == 0:
        return tuple(value.zero_() for value in results)
    with launching(results[0].device):
        layer = make_layer(arguments)
        wanted = ForwardResults(*(value if value.numel() > 0 else None for value in results))
        forward_loop(layer, before_loop(layer, wanted), wanted)
    return results


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, rates, options = Arguments(*arguments[4 : 4 + NUMBER_OF_TENSORS]), *arguments[-4:-2]
    check_arguments(tensors, rates, options)
    check_saved(tensors, arguments[4 + NUMBER_OF_TENSORS : -4], options)
    check_backward(tensors, options, arguments[-1])
    with launching(arguments[4].device):
        return layer_backward(*arguments)


@contextlib.contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Launch on the tensors' device, and keep a surrounding autocast out of the products."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        yield


def before_loop(layer: Layer, results: ForwardResults) -> LoopInputs:
    """Everything that does not wait for the recurrence; writes the results that belong to the input's term."""
    product = input_product(layer, masked_input(layer))
    terms = product
    if results.input_gates is not None:
        results.input_gates.copy_(product)
    if layer.flags.norm_input:
        statistics = input_statistics(layer, product)
        if results.input_statistics is not None:
            results.input_statistics.copy_(statistics)
        terms = normalised(layer, product, statistics, product)
    return loop_inputs(layer, masked_weight(layer), terms, summed_bias(layer))
