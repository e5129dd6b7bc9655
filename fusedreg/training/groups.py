"""Parameter groups for an optimiser with decoupled weight decay, by component."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fusedreg.training.components import COMPONENTS, by_identity, numbers_by_component


def parameter_groups(
    model: nn.Module,
    weight_decay: float | Mapping[str, float],
    *,
    learning_rate: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with a weight decay for each component, for ``AdamW`` or another torch optimiser.

    AdamW's decay is decoupled (Loshchilov and Hutter 2019): ``w ← w - lr · weight_decay · w`` beside the step, so
    that it is not divided by Adam's running variance as the gradient of an L2 penalty would be. In ``SGD``, and in
    ``Adam``, the same groups are an L2 penalty.

    Args:
        model: any model. Each of its parameters is in exactly one group, tied ones once and frozen ones too, so that
            they can be unfrozen later.
        weight_decay: by component (see :func:`~fusedreg.training.classify`), or one number for all. A component that
            is left out is not decayed.
        learning_rate: by component, where it differs from the optimiser's own.

    Returns:
        One group a component that the model has: ``params``, ``weight_decay``, ``component``, and ``lr`` where given.

    Raises:
        ValueError: an unknown component, a negative number. TypeError: not a module, not a number.

    Example:
        >>> import torch, fusedreg
        >>> groups = fusedreg.training.parameter_groups(
        ...     fusedreg.LSTM(3, 4), weight_decay={"kernel": 1e-4, "recurrent": 1e-5, "bias": 0}
        ... )
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
        >>> [(group["component"], group["weight_decay"]) for group in optimizer.param_groups]
        [('kernel', 0.0001), ('recurrent', 1e-05), ('bias', 0.0)]
    """
    decays = numbers_by_component("weight_decay", weight_decay)
    rates = numbers_by_component("learning_rate", learning_rate or {})
    members: dict[str, list[nn.Parameter]] = {}
    component_of = by_identity(model)
    for parameter in model.parameters():
        members.setdefault(component_of[id(parameter)], []).append(parameter)
    groups: list[dict[str, Any]] = []
    for component in COMPONENTS:
        if component in members:
            group = {"params": members[component], "weight_decay": decays.get(component, 0.0), "component": component}
            groups.append(group | ({"lr": rates[component]} if component in rates else {}))
    return groups
