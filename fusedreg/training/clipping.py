"""Gradient clipping: of the whole model, by component, or of all but some layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from fusedreg.training.components import COMPONENTS, Component, by_identity, check_components, non_negative


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
            contain, a ``max_norm`` or ``norm_type`` that is not positive. TypeError: not a module, not a
            number. RuntimeError: with ``error_if_nonfinite``. Gradients are then as they were.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4)
        >>> lstm(torch.randn(5, 2, 3))[0].sum().backward()
        >>> norms = fusedreg.training.clip_gradients(lstm, 0.25, components=["recurrent"])
        >>> bool(lstm.weight_hh_l0.grad.norm() <= 0.25)
        True
    """
    limits = _limits(max_norm, components)
    _check_norm_type(norm_type)
    excluded = _excluded(model, exclude)
    component = by_identity(model)
    members: dict[Component, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        chosen = component[id(parameter)]
        if chosen in limits and parameter.grad is not None and id(parameter) not in excluded:
            members.setdefault(chosen, []).append(parameter)
    everything = [parameter for parameters in members.values() for parameter in parameters]
    each = _norms(everything, norm_type, foreach)
    remaining = iter(each)
    norms = {name: _joined([next(remaining) for _ in parameters], norm_type) for name, parameters in members.items()}
    total = _joined(each, norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        found = {name: float(norm) for name, norm in norms.items()}
        raise RuntimeError(
            f"clip_gradients: expected finite gradients, got norms {found}; leave this step out, or pass "
            f"error_if_nonfinite=False"
        )
    if isinstance(max_norm, Mapping):
        for name, parameters in members.items():
            clip_grads_with_norm_(parameters, limits[name], norms[name], foreach)
    elif everything:
        clip_grads_with_norm_(everything, max_norm, total, foreach)
    return GradientNorms(total, norms)


def _norms(parameters: list[nn.Parameter], norm_type: float, foreach: bool | None) -> list[Tensor]:
    """The norm of each gradient, in one call where ``foreach`` allows it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if foreach is False or not gradients:
        return [torch.linalg.vector_norm(gradient, norm_type) for gradient in gradients]
    return list(torch._foreach_norm(gradients, norm_type))


def _joined(norms: list[Tensor], norm_type: float) -> Tensor:
    """The norm of everything together, from the norms of its parts, on the first one's device."""
    if not norms:
        return torch.zeros(())
    joined: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    return joined


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


def _check_norm_type(norm_type: object) -> None:
    if isinstance(norm_type, bool) or not isinstance(norm_type, (int, float)):
        raise TypeError(f"norm_type: expected a number, got {norm_type!r} of type {type(norm_type).__name__}; pass 2.0")
    if not norm_type > 0.0:  # NaN too
        raise ValueError(f"norm_type: expected a number above 0, got {norm_type!r}; 2.0 is the Euclidean norm")


def _excluded(model: nn.Module, exclude: nn.Module | Iterable[nn.Module]) -> set[int]:
    if not isinstance(exclude, (nn.Module, Iterable)):
        raise TypeError(
            f"exclude: expected a module or several, got {type(exclude).__name__}; leave exclude out to clip everything"
        )
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
