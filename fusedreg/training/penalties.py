"""Terms to add to a loss: L1 and L2 of weights by component, L1 and L2 of activations, AR and TAR.

All are plain torch, differentiable, and read nothing but what they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedreg.training.components import non_negative, numbers_by_component, uses_of_weights
from fusedreg.training.padding import check_not_packed_twice, check_output, is_time_first, valid_steps


def l1_penalty(model: nn.Module, strength: float | Mapping[str, float]) -> Tensor:
    """``Σ strength · |w|`` over the weights of each component: to be added to the loss.

    On recurrent weights it holds ``W_hh``'s largest singular value down, below 1 where it is strong, and memory then
    fades with it (Pascanu et al. 2013); see the page on training.

    Args:
        model: any model; tied weights count once, and a parametrised weight as the model uses it.
        strength: by component (see :func:`~fusedreg.training.classify`), or one number for all.

    Returns:
        A 0-dimensional tensor, of the weights' type but float32 at least.

    Raises:
        ValueError: an unknown component, a negative number. TypeError: not a module, not a number.

    Example:
        >>> import torch, fusedreg
        >>> lstm = torch.nn.LSTM(3, 4)
        >>> penalty = fusedreg.training.l1_penalty(lstm, {"recurrent": 0.5})
        >>> torch.testing.assert_close(penalty, 0.5 * lstm.weight_hh_l0.abs().sum())
    """
    return _weight_penalty(model, strength, 1)


def l2_penalty(model: nn.Module, strength: float | Mapping[str, float]) -> Tensor:
    """``Σ strength · w²`` over the weights of each component: to be added to the loss.

    This is the coupled form: its gradient ``2 · strength · w`` goes through the optimiser with the loss's own, and an
    adaptive optimiser divides it by its running variance. :func:`~fusedreg.training.parameter_groups` is for the
    decoupled form. What it does to recurrent weights is :func:`l1_penalty`'s.

    Args:
        model: any model; tied weights count once, and a parametrised weight as the model uses it.
        strength: by component (see :func:`~fusedreg.training.classify`), or one number for all.

    Returns:
        A 0-dimensional tensor, of the weights' type but float32 at least.

    Raises:
        ValueError: an unknown component, a negative number. TypeError: not a module, not a number.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4)
        >>> penalty = fusedreg.training.l2_penalty(lstm, {"kernel": 0.5})
        >>> torch.testing.assert_close(penalty, 0.5 * lstm.weight_ih_l0.square().sum())
    """
    return _weight_penalty(model, strength, 2)


def _weight_penalty(model: nn.Module, strength: float | Mapping[str, float], power: int) -> Tensor:
    strengths = numbers_by_component("strength", strength)
    terms = [
        strengths[component] * _wide(weight).abs().pow(power).sum()
        for component, weight in uses_of_weights(model)
        if strengths.get(component)
    ]
    if not terms:
        like = next(model.parameters(), torch.zeros(()))
        return _wide(like).new_zeros(())
    device = terms[0].device
    return torch.stack([term.to(device) for term in terms]).sum()


def _wide(tensor: Tensor) -> Tensor:
    """16-bit values as float32: a sum of many squares would lose most of them."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def activity_l1(
    output: Tensor | PackedSequence,
    strength: float,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
) -> Tensor:
    """``strength`` times the mean of ``|h|`` over valid steps, rows and units.

    Args:
        output: ``(T, B, F)``, ``(B, T, F)`` with ``batch_first``, ``(T, F)``, or a ``PackedSequence``.
        strength: the factor.
        lengths: ``(B,)``; padding may hold anything, and no gradient reaches it.
        batch_first: the output's layout.

    Example:
        >>> import torch, fusedreg
        >>> fusedreg.training.activity_l1(torch.tensor([[[1.0, -3.0]]]), 0.5)
        tensor(1.)
    """
    return non_negative("strength", strength) * _mean(output, lengths, batch_first, 1)


def activity_l2(
    output: Tensor | PackedSequence,
    strength: float,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
) -> Tensor:
    """``strength`` times the mean of ``h²`` over valid steps, rows and units.

    Args:
        output: ``(T, B, F)``, ``(B, T, F)`` with ``batch_first``, ``(T, F)``, or a ``PackedSequence``.
        strength: the factor.
        lengths: ``(B,)``; padding may hold anything, and no gradient reaches it.
        batch_first: the output's layout.

    Example:
        >>> import torch, fusedreg
        >>> fusedreg.training.activity_l2(torch.tensor([[[1.0, -3.0]]]), 0.5)
        tensor(2.5000)
    """
    return non_negative("strength", strength) * _mean(output, lengths, batch_first, 2)


def activation_regularization(
    dropped: Tensor | PackedSequence,
    strength: float = 2.0,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
) -> Tensor:
    """AR: ``strength`` times the mean of ``(m ⊙ h)²``, the *dropped* output of the last layer.

    Merity, McCann and Socher 2017 (arXiv:1708.01009), in AWD-LSTM (Merity et al. 2018) with α = 2. The mean over all
    elements is the authors' code's, for which that α was chosen.

    Args:
        dropped: the last layer's output after its dropout: what :class:`~fusedreg.training.LockedDropout` returns, or
            what an LSTM with ``output_dropout`` does.
        strength: α.
        lengths, batch_first: as in :func:`activity_l2`.

    Example:
        >>> import torch, fusedreg
        >>> lstm, locked = fusedreg.LSTM(3, 4), fusedreg.training.LockedDropout(0.4)
        >>> output, _ = lstm(torch.randn(5, 2, 3))
        >>> dropped = locked(output)
        >>> loss = fusedreg.training.activation_regularization(dropped, 2.0)
        >>> loss = loss + fusedreg.training.temporal_activation_regularization(output, 1.0)
    """
    return activity_l2(dropped, strength, lengths=lengths, batch_first=batch_first)


def temporal_activation_regularization(
    undropped: Tensor | PackedSequence,
    strength: float = 1.0,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    batch_first: bool = False,
) -> Tensor:
    """TAR: ``strength`` times the mean of ``(h_{t+1} - h_t)²``, the *undropped* output of the last layer.

    Merity, McCann and Socher 2017 (arXiv:1708.01009), in AWD-LSTM with β = 1. An LSTM with ``output_dropout`` returns
    the dropped output alone: leave the last layer's rate 0 and drop after it with
    :class:`~fusedreg.training.LockedDropout`, as :class:`~fusedreg.training.AWDLSTM` does. The masks are distributed
    alike, and both outputs are at hand.

    Args:
        undropped: the last layer's output before its dropout.
        strength: β.
        lengths: ``(B,)``; only pairs of two valid steps count.
        reset: bool, ``(T, B)`` as the LSTM was given it: the pair that a reset separates does not count.
        batch_first: the layout of the output and of ``reset``.

    Returns:
        A 0-dimensional tensor; 0 where there is no pair.

    Raises:
        ValueError: lengths or resets of another shape.

    Example:
        >>> import torch, fusedreg
        >>> fusedreg.training.temporal_activation_regularization(torch.tensor([[1.0], [3.0]]))
        tensor(4.)
    """
    strength = non_negative("strength", strength)
    if isinstance(undropped, PackedSequence):
        check_not_packed_twice(lengths)
        undropped, lengths = nn.utils.rnn.pad_packed_sequence(undropped)
        batch_first = False
    check_output(undropped)
    time_axis = 0 if is_time_first(undropped, batch_first) else 1
    steps = undropped.shape[time_axis]
    difference = undropped.narrow(time_axis, 1, steps - 1) - undropped.narrow(time_axis, 0, steps - 1)
    valid = valid_steps(undropped, lengths, batch_first)
    counts = None if valid is None else valid.narrow(time_axis, 1, steps - 1)
    if reset is not None:
        if reset.shape != undropped.shape[:-1] or reset.dtype != torch.bool:
            raise ValueError(
                f"reset: expected bool of shape {tuple(undropped.shape[:-1])}, the output's without its features, got "
                f"{reset.dtype} of {tuple(reset.shape)}"
            )
        kept = ~reset.narrow(time_axis, 1, steps - 1)
        counts = kept if counts is None else counts & kept
    return strength * _mean_power(difference, counts, 2)


def _mean(output: Tensor | PackedSequence, lengths: Any, batch_first: bool, power: int) -> Tensor:
    if isinstance(output, PackedSequence):
        check_not_packed_twice(lengths)
        return _mean_power(output.data, None, power)
    return _mean_power(output, valid_steps(output, lengths, batch_first), power)


def _mean_power(values: Tensor, counts: Tensor | None, power: int) -> Tensor:
    """The mean over what counts; 0 where nothing does. Selected, since padding may hold NaN."""
    values = _wide(values)
    if counts is not None:
        values = torch.where(counts[..., None], values, 0.0)
    total = values.abs().sum() if power == 1 else values.square().sum()
    if counts is None:
        return total / max(values.numel(), 1)
    return total / (counts.sum() * values.shape[-1]).clamp(min=1)
