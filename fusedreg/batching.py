"""``torch.vmap`` over the operators: however many samples there are, they are one call.

Rows of an LSTM have nothing to do with one another, so ``S`` samples of ``B`` rows are folded into one layer with
``S * B`` rows. Two things are still each sample's own. Its masks: the seed becomes ``(S, 2)``, by which each group of
``B`` rows draws as a call of its own would. And the gradients of the parameters, which samples share: with
``gradient_groups`` the backward gives them once for each group, which is what per-sample gradients
(``vmap(grad(...))``) are. Nested ``vmap`` folds again: groups of groups are groups.

What cannot be folded becomes models. The operators take ``M`` of them when the input is ``(M, T, B, I)``: every tensor
then has an axis of the models in front, results too, and ``result[m]`` is the operator of ``argument[m]``, bit for bit.
What models have in common is expanded, and not copied. So run

- parameters, or a norm's statistics, of each sample's own, as in an ensemble by ``torch.func.stack_module_state``;
- ``weight_dropout`` in training with a seed of each sample's own, which makes weights of each sample's own;
- a batch norm in training, whose statistics are those of a sample.

Both may be nested: samples are folded into the rows of models, and models of models are models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedreg.encoding import (
    DIFFERENTIABLE,
    GRADIENT_GROUPS,
    NUMBER_OF_TENSORS,
    TENSOR_ARGUMENTS,
    decode_options,
)
from fusedreg.layer import LayerOptions
from fusedreg.regularization import BatchNorm, LayerNorm

# The axis of the rows: of arguments, by name, of the gradients that come in, and of what the forward saves. What is not
# named here is common to all rows: parameters, and a norm's statistics.
_ROWS = {
    "input": 1,
    "initial_hidden": 0,
    "initial_cell": 0,
    "lengths": 0,
    "reset": 1,
    "hidden_probe": 1,
    "cell_probe": 1,
}
_ARGUMENT_ROWS = tuple(_ROWS.get(name) for name in TENSOR_ARGUMENTS)
_RESULT_ROWS = (1, 0, 0, 1)  # of output, final_hidden, final_cell, cells
_SAVED_ROWS = (1, 1, 1, 1)  # of cells, hidden, gates, input_gates; three statistics follow
_SEED = TENSOR_ARGUMENTS.index("seed")
_INPUT_RANK = 3  # of (T, B, I); of models, one more

PARAMETERS = frozenset(position for position in DIFFERENTIABLE if _ARGUMENT_ROWS[position] is None)
"""Positions of the parameters among the tensor arguments: what has a gradient and no rows."""


def forward_rule(operators: Any, info: Any, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """The vmap rule of a forward operator's ``autograd.Function``.

    Args:
        operators: the pair, a :class:`fusedreg.differentiation.Operators`.
        info, in_dims, arguments: as ``torch.autograd.Function.vmap`` is given them.

    Returns:
        The results, and the axis of the samples in each.
    """
    tensors, dims = arguments[:NUMBER_OF_TENSORS], in_dims[:NUMBER_OF_TENSORS]
    rates, encoded, norm_eps = arguments[NUMBER_OF_TENSORS:]
    options, _ = decode_options(rates, encoded, norm_eps)
    samples, models = info.batch_size, _sizes_of_models(tensors[0], dims[0])
    if not _can_fold(dims, options, samples):
        return _as_models(operators.layer, samples, models, in_dims, arguments)
    results = operators.layer.apply(*_fold_arguments(tensors, dims, samples, len(models)), rates, encoded, norm_eps)
    rows = _after(len(models), (*_RESULT_ROWS[:3], *_SAVED_ROWS, *_statistics_rows(options)))
    return _together(_unfold(result, axis, samples) for result, axis in zip(results, rows, strict=True))


def backward_rule(operators: Any, info: Any, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """The vmap rule of a backward operator's ``autograd.Function``; see :func:`forward_rule`."""
    first_saved = len(_RESULT_ROWS) + NUMBER_OF_TENSORS
    tensors, dims = arguments[len(_RESULT_ROWS) : first_saved], in_dims[len(_RESULT_ROWS) : first_saved]
    saved, saved_dims = arguments[first_saved:-4], in_dims[first_saved:-4]
    rates, encoded, norm_eps, needed = arguments[-4:]
    options, _ = decode_options(rates, encoded, norm_eps)
    samples, models = info.batch_size, _sizes_of_models(tensors[0], dims[0])
    saved_rows = (*_SAVED_ROWS, *_statistics_rows(options))
    own_statistics = any(dim is not None and axis is None for dim, axis in zip(saved_dims, saved_rows, strict=True))
    if own_statistics or not _can_fold(dims, options, samples):
        return _as_models(operators.layer_backward, samples, models, in_dims, arguments)
    inner = max(1, encoded[GRADIENT_GROUPS])  # where a vmap inside this one has folded already
    encoded = [*encoded]
    encoded[GRADIENT_GROUPS] = samples * inner
    results = operators.layer_backward.apply(
        *_fold_all(arguments, in_dims, _after(len(models), _RESULT_ROWS), samples),
        *_fold_arguments(tensors, dims, samples, len(models)),
        *_fold_all(saved, saved_dims, _after(len(models), saved_rows), samples),
        rates,
        encoded,
        norm_eps,
        needed,
    )
    gradients: list[tuple[Tensor, int | None]] = []
    for position, wanted, gradient in zip(DIFFERENTIABLE, needed, results, strict=True):
        axis = _ARGUMENT_ROWS[position]
        if wanted and axis is None:  # a parameter's, by group: a single group has no axis
            groups = (samples,) if inner == 1 else (samples, inner)
            shape = tensors[position].shape
            gradients.append((gradient.reshape(*models, *groups, *shape[len(models) :]), len(models)))
        else:
            gradients.append(_unfold(gradient, None if axis is None else axis + len(models), samples))
    return _together(gradients)


def run_by_model(
    function: Callable[[Sequence[Tensor | None]], tuple[Tensor, ...]], tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """A function of one model's tensors for each model, in plain torch.

    Args:
        function: of as many tensors as there are, absent ones ``None`` as they are here.
        tensors: with an axis of the models in front.

    Returns:
        The results, with an axis of the models in front.
    """
    return _map_present(function, tensors, (0,) * len(tensors), 0)


def run_by_group(
    function: Callable[[Sequence[Tensor | None]], tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    own: Collection[int],
    results: Sequence[int],
    groups: int,
) -> tuple[Tensor, ...]:
    """A layer in plain torch, each group of rows by itself: what gradients by group are the gradients of.

    Args:
        function: of the tensor arguments.
        tensors: the first of ``TENSOR_ARGUMENTS``, of all rows together.
        own: places of those that come with an axis of the groups in front.
        results: which of output, final hidden, final cell and cells ``function`` returns.
        groups: how many, dividing the rows.

    Returns:
        The results, of all rows together again.

    Raises:
        RuntimeError: masks are drawn from one seed for all groups, which does not say how a group draws by itself.
    """
    split, dims = list(tensors), [0 if place in own else None for place in range(len(tensors))]
    for place, tensor in enumerate(tensors):
        axis = 0 if place == _SEED else _ARGUMENT_ROWS[place]
        if tensor is None or axis is None:
            continue
        if place == _SEED and (tensor.dim() != 2 or tensor.shape[0] % groups):
            raise RuntimeError(
                f"seed: expected rows of (seed, first step) for each of {groups} gradient groups in a double backward, "
                f"got shape {tuple(tensor.shape)}; pass one (seed, 0) a group"
            )
        split[place], dims[place] = tensor.unflatten(axis, (groups, tensor.shape[axis] // groups)), axis
    rows = tuple(_RESULT_ROWS[result] for result in results)
    together = _map_present(function, split, dims, rows)
    return tuple(value.flatten(axis, axis + 1) for value, axis in zip(together, rows, strict=True))


def _map_present(
    function: Callable[[Sequence[Tensor | None]], tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    in_dims: Sequence[int | None],
    out_dims: int | tuple[int, ...],
) -> tuple[Tensor, ...]:
    """``torch.vmap`` of a function of tensors some of which are ``None``."""
    present = {place: tensor for place, tensor in enumerate(tensors) if tensor is not None}

    def of_sample(*chosen: Tensor) -> tuple[Tensor, ...]:
        full: list[Tensor | None] = [None] * len(tensors)
        for place, tensor in zip(present, chosen, strict=True):
            full[place] = tensor
        return function(full)

    mapped = torch.vmap(of_sample, in_dims=tuple(in_dims[place] for place in present), out_dims=out_dims)
    results: tuple[Tensor, ...] = mapped(*present.values())
    return results


def _sizes_of_models(input: Tensor, dim: int | None) -> tuple[int, ...]:
    """The sizes of a sample's axes before ``(T, B, I)``: ``(M,)`` where it has models, else nothing."""
    shape = [size for axis, size in enumerate(input.shape) if axis != dim]
    return tuple(shape[:-_INPUT_RANK])


def _as_models(
    function: Any, samples: int, models: tuple[int, ...], in_dims: Sequence[Any], arguments: Sequence[Any]
) -> Any:
    """One call with a model for each sample, or for each of its models."""

    def prepared(argument: Any, dim: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        every = argument.expand(samples, *argument.shape) if dim is None else argument.movedim(dim, 0)
        return every.flatten(0, len(models))

    results = function.apply(*(prepared(*pair) for pair in zip(arguments, in_dims, strict=True)))
    return tuple(result.unflatten(0, (samples, *models)) for result in results), (0,) * len(results)


def _can_fold(dims: Sequence[Any], options: LayerOptions, samples: int) -> bool:
    if samples == 0:  # groups of rows must be there
        return False
    for place, (dim, axis) in enumerate(zip(dims, _ARGUMENT_ROWS, strict=True)):
        if dim is not None and axis is None and place != _SEED:
            return False
    if options.training and isinstance(options.norm, BatchNorm):
        return False
    return dims[_SEED] is None or not options.training or options.weight_dropout == 0.0


def _after(axes: int, rows: Sequence[int | None]) -> tuple[int | None, ...]:
    """The axes of the rows behind those of the models."""
    return tuple(None if axis is None else axis + axes for axis in rows)


def _statistics_rows(options: LayerOptions) -> tuple[int | None, ...]:
    """Layer norm's are ``(T, 2, B)``; a batch norm's, in evaluation, belong to the steps alone."""
    return (2 if isinstance(options.norm, LayerNorm) else None,) * 3


def _fold_arguments(tensors: Sequence[Any], dims: Sequence[Any], samples: int, axes: int) -> list[Any]:
    """``axes``: how many of models stand in front."""
    folded = _fold_all(tensors, dims, _after(axes, _ARGUMENT_ROWS), samples)
    if tensors[_SEED] is not None:
        folded[_SEED] = _fold_seed(tensors[_SEED], dims[_SEED], samples, axes)
    return folded


def _fold_all(tensors: Sequence[Any], dims: Sequence[Any], rows: Sequence[int | None], samples: int) -> list[Any]:
    """Each tensor that has rows with all samples' rows, sample by sample; the others as they are.

    ``rows`` may be shorter than the rest: the first tensors are meant.
    """
    return [
        tensor if tensor is None or axis is None else _fold(tensor, dim, axis, samples)
        for tensor, dim, axis in zip(tensors, dims, rows)  # noqa: B905
    ]


def _fold(tensor: Tensor, dim: int | None, axis: int, samples: int) -> Tensor:
    """``(…, B, …)``, for each sample or for all of them, as ``(…, S * B, …)``."""
    if tensor.dim() - (dim is not None) <= axis:  # of shape (0,), by which operators return nothing
        return tensor
    if dim is None:
        tensor = tensor.unsqueeze(axis)
        tensor = tensor.expand(*tensor.shape[:axis], samples, *tensor.shape[axis + 1 :])
    else:
        tensor = tensor.movedim(dim, axis)
    return tensor.flatten(axis, axis + 1)


def _fold_seed(seed: Tensor, dim: int | None, samples: int, axes: int) -> Tensor:
    """Rows of (seed, first step): one a sample, or, where a seed is such rows already, each sample's after another."""
    single = seed.dim() - (dim is not None) == axes
    if dim is None:
        seed = seed.unsqueeze(axes).expand(*seed.shape[:axes], samples, *seed.shape[axes:])
    else:
        seed = seed.movedim(dim, axes)
    if single:
        seed = torch.stack((seed, torch.zeros_like(seed)), -1).unsqueeze(-2)
    return seed.flatten(axes, axes + 1)


def _unfold(result: Tensor, axis: int | None, samples: int) -> tuple[Tensor, int | None]:
    """A result with the samples split off its rows again, and their axis; ``None`` where they have it in common."""
    if axis is None or result.dim() <= axis:
        return result, None
    return result.unflatten(axis, (samples, result.shape[axis] // samples)), axis


def _together(results: Iterable[tuple[Tensor, int | None]]) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    values, axes = zip(*results, strict=True)
    return values, axes
