"""Gradient clipping: of the whole model, by component, or of all but some layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fusedreg.training.components import COMPONENTS, Component, check_components, classify, non_negative


class GradientNorms(NamedTuple):
    """Norms of gradients as they were before clipping: 0-dimensional tensors, read without waiting for a device.

    ``total`` is over everything that was to be clipped, ``components`` of each component of that.
    """

    total: Tensor
    components: dict[Component, Tensor]


def clip_gradients(
    model: nn.Module,
    max_norm: float | Mapping[str, float],
    *,
    components: Iterable[str] | None = None,
    exclude: nn.Module | Iterable[nn.Module] = (),
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> GradientNorms:
    """Scale gradients down, in place, so that their norm is at most ``max_norm`` (Pascanu et al. 2013).

    Call it after the whole backward and before the optimiser's step; with a ``GradScaler``, after ``unscale_``. It
    is never a part of the backward: a gradient clipped on its way back would be another function's gradient.

    Args:
        model: whose parameters' ``.grad`` are clipped; tied parameters count once.
        max_norm: of all the gradients together, as :func:`torch.nn.utils.clip_grad_norm_` has it; or by component
            (see :func:`~fusedreg.training.classify`), each clipped by its own norm and those left out not at all.
        components: restricts one common ``max_norm`` to these, ``["recurrent"]`` for instance.
        exclude: a module, or several, whose parameters are left alone: the output layer, say. A parameter that is
            tied to one of theirs is the same parameter, and left alone too.
        norm_type: 2, 1, ``inf`` and so on.
        error_if_nonfinite: raise where a norm is NaN or infinite. Waits for the device.
        foreach: as in :func:`torch.nn.utils.clip_grad_norm_`.

    Returns:
        The norms before clipping; what has no gradient is in none of them.

    Raises:
        ValueError: an unknown component, ``components`` beside a mapping, an excluded module that the model does not
            contain, a ``max_norm`` that is not positive. TypeError: not a module, not a number. RuntimeError: with
            ``error_if_nonfinite``; gradients are then as they were.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4)
        >>> lstm(torch.randn(5, 2, 3))[0].sum().backward()
        >>> norms = fusedreg.training.clip_gradients(lstm, 0.25, components=["recurrent"])
        >>> bool(lstm.weight_hh_l0.grad.norm() <= 0.25)
        True
    """
    limits = _limits(max_norm, components)
    excluded = _excluded(model, exclude)
    members: dict[Component, list[nn.Parameter]] = {}
    for found in classify(model):
        chosen = found.component in limits and id(found.parameter) not in excluded
        if chosen and found.parameter.grad is not None:
            members.setdefault(found.component, []).append(found.parameter)
    norms = {
        component: get_total_norm(
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            norm_type,
            error_if_nonfinite,
            foreach,
        )
        for component, parameters in members.items()
    }
    total = get_total_norm(list(norms.values()), norm_type, error_if_nonfinite, foreach) if norms else torch.zeros(())
    if isinstance(max_norm, Mapping):
        for component, parameters in members.items():
            clip_grads_with_norm_(parameters, limits[component], norms[component], foreach)
    else:
        chosen_parameters = [parameter for parameters in members.values() for parameter in parameters]
        clip_grads_with_norm_(chosen_parameters, max_norm, total, foreach)
    return GradientNorms(total, norms)


def _limits(max_norm: float | Mapping[str, float], components: Iterable[str] | None) -> dict[str, float]:
    if isinstance(max_norm, Mapping):
        if components is not None:
            raise ValueError(
                "components: expected None beside max_norm by component, got both; leave components out of the "
                "mapping that are not to be clipped"
            )
        check_components("max_norm", max_norm)
        return {name: non_negative(f"max_norm[{name!r}]", limit, above_zero=True) for name, limit in max_norm.items()}
    limit = non_negative("max_norm", max_norm, above_zero=True)
    if isinstance(components, str):
        raise TypeError(f"components: expected a sequence of names, got the string {components!r}; pass a list of it")
    chosen = COMPONENTS if components is None else tuple(components)
    check_components("components", chosen)
    return dict.fromkeys(chosen, limit)


def _excluded(model: nn.Module, exclude: nn.Module | Iterable[nn.Module]) -> set[int]:
    modules = [exclude] if isinstance(exclude, nn.Module) else list(exclude)
    if not modules:
        return set()
    inside = {id(module) for module in model.modules()}
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"exclude: expected modules, got {type(module).__name__}; pass model.decoder, for instance")
        if id(module) not in inside:
            raise ValueError(f"exclude: expected modules inside the model, got a {type(module).__name__} outside it")
    return {id(parameter) for module in modules for parameter in module.parameters()}
