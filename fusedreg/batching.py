"""``torch.vmap`` over the operators: samples are folded into rows, and all of them run in one call.

Rows of an LSTM have nothing to do with one another, so ``S`` samples of ``B`` rows are one call with ``S * B`` rows.
Two things are still each sample's own. Its masks: the seed becomes ``(S, 2)``, by which each group of ``B`` rows draws
as a call of its own would. And the gradients of the parameters, which samples share: with ``gradient_groups`` the
backward gives them once for each group, which is what per-sample gradients (``vmap(grad(...))``) are.

Nested ``vmap`` folds again: groups of groups are groups. What cannot be folded runs in a loop of calls, one a sample,
with the same results:

- parameters, or a norm's statistics, of each sample's own, as in an ensemble by ``torch.func.stack_module_state``;
- ``weight_dropout`` in training with a seed of each sample's own, which makes weights of each sample's own;
- a batch norm in training, whose statistics are those of a sample.
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
    if not _can_fold(dims, options):
        return loop_over_samples(operators.layer, info, in_dims, arguments)
    samples = info.batch_size
    results = operators.layer.apply(*_fold_arguments(tensors, dims, samples), rates, encoded, norm_eps)
    rows = (*_RESULT_ROWS[:3], *_SAVED_ROWS, *_statistics_rows(options))
    return _together(_unfold(result, axis, samples) for result, axis in zip(results, rows, strict=True))


def backward_rule(operators: Any, info: Any, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """The vmap rule of a backward operator's ``autograd.Function``; see :func:`forward_rule`."""
    first_saved = len(_RESULT_ROWS) + NUMBER_OF_TENSORS
    tensors, dims = arguments[len(_RESULT_ROWS) : first_saved], in_dims[len(_RESULT_ROWS) : first_saved]
    saved, saved_dims = arguments[first_saved:-4], in_dims[first_saved:-4]
    rates, encoded, norm_eps, needed = arguments[-4:]
    options, _ = decode_options(rates, encoded, norm_eps)
    saved_rows = (*_SAVED_ROWS, *_statistics_rows(options))
    own_statistics = any(dim is not None and axis is None for dim, axis in zip(saved_dims, saved_rows, strict=True))
    if own_statistics or not _can_fold(dims, options):
        return loop_over_samples(operators.layer_backward, info, in_dims, arguments)
    samples = info.batch_size
    inner = max(1, encoded[GRADIENT_GROUPS])  # where a vmap inside this one has folded already
    encoded = [*encoded]
    encoded[GRADIENT_GROUPS] = samples * inner
    results = operators.layer_backward.apply(
        *_fold_all(arguments, in_dims, _RESULT_ROWS, samples),
        *_fold_arguments(tensors, dims, samples),
        *_fold_all(saved, saved_dims, saved_rows, samples),
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
            gradients.append((gradient.reshape(*groups, *tensors[position].shape), 0))
        else:
            gradients.append(_unfold(gradient, axis, samples))
    return _together(gradients)


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
    present = {place: tensor for place, tensor in enumerate(split) if tensor is not None}

    def of_group(*chosen: Tensor) -> tuple[Tensor, ...]:
        full: list[Tensor | None] = [None] * len(tensors)
        for place, tensor in zip(present, chosen, strict=True):
            full[place] = tensor
        return function(full)

    rows = tuple(_RESULT_ROWS[result] for result in results)
    mapped = torch.vmap(of_group, in_dims=tuple(dims[place] for place in present), out_dims=rows)
    together = mapped(*present.values())
    return tuple(value.flatten(axis, axis + 1) for value, axis in zip(together, rows, strict=True))


def loop_over_samples(function: Any, info: Any, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """One call a sample, with the masks that a loop draws: what cannot be folded."""
    results = []
    for sample in range(info.batch_size):
        chosen = [
            argument.select(dim, sample) if isinstance(argument, Tensor) and isinstance(dim, int) else argument
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(function.apply(*chosen))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _can_fold(dims: Sequence[Any], options: LayerOptions) -> bool:
    for place, (dim, axis) in enumerate(zip(dims, _ARGUMENT_ROWS, strict=True)):
        if dim is not None and axis is None and place != _SEED:
            return False
    if options.training and isinstance(options.norm, BatchNorm):
        return False
    return dims[_SEED] is None or not options.training or options.weight_dropout == 0.0


def _statistics_rows(options: LayerOptions) -> tuple[int | None, ...]:
    """Layer norm's are ``(T, 2, B)``; a batch norm's, in evaluation, belong to the steps alone."""
    return (2 if isinstance(options.norm, LayerNorm) else None,) * 3


def _fold_arguments(tensors: Sequence[Any], dims: Sequence[Any], samples: int) -> list[Any]:
    folded = _fold_all(tensors, dims, _ARGUMENT_ROWS, samples)
    if tensors[_SEED] is not None:
        folded[_SEED] = _fold_seed(tensors[_SEED], dims[_SEED], samples)
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


def _fold_seed(seed: Tensor, dim: int | None, samples: int) -> Tensor:
    """Rows of (seed, first step): one a sample, or, where a seed is such rows already, each sample's after another."""
    if dim is not None:
        seed = seed.movedim(dim, 0)
    if seed.dim() - (dim is not None) == 0:
        seed = torch.stack((seed, torch.zeros_like(seed)), -1).unsqueeze(-2)
    if dim is None:
        seed = seed.expand(samples, *seed.shape)
    return seed.flatten(0, 1)


def _unfold(result: Tensor, axis: int | None, samples: int) -> tuple[Tensor, int | None]:
    """A result with the samples split off its rows again, and their axis; ``None`` where they have it in common."""
    if axis is None or result.dim() <= axis:
        return result, None
    return result.unflatten(axis, (samples, result.shape[axis] // samples)), axis


def _together(results: Iterable[tuple[Tensor, int | None]]) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    values, axes = zip(*results, strict=True)
    return values, axes
