"""``replace_lstms``: every ``torch.nn.LSTM`` inside a model replaced by a :class:`fusedreg.LSTM`, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, transfer_parametrizations_and_params

from fusedreg.conversion import without_weights
from fusedreg.modules import LSTM

# Everything through which a program watches or alters a module from outside. The dictionaries themselves move, so
# that a handle which the program holds still removes its hook.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Replacements:
    """What :func:`replace_lstms` did.

    Attributes:
        replaced: the name of each module that was replaced, and what it became. A module that stands under several
            names is one replacement, listed under each.
        left: the name of each ``nn.LSTM`` that stayed, and why.
    """

    replaced: Mapping[str, LSTM] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} nn.LSTM, left {len(self.left)}"]
        lines += [f"  {name}: {module}" for name, module in self.replaced.items()]
        lines += [f"  {name}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace_lstms(
    model: nn.Module,
    options: Mapping[str, Any] | Callable[[str, nn.LSTM], Mapping[str, Any] | None] | None = None,
    *,
    skip: Iterable[str] = (),
) -> Replacements:
    """Replace each ``nn.LSTM`` inside ``model`` by a :class:`fusedreg.LSTM`, in place.

    The parameters are the same objects, so that an optimiser made before goes on, and so are weights that several
    modules share. Hooks, parametrisations, the mode and the state dict's names go along. Either every module is
    replaced that was not to be skipped, or none is and an error names those that cannot be.

    Args:
        model: is changed. Where it is an ``nn.LSTM`` itself there is nothing to put another one into: use
            :meth:`fusedreg.LSTM.from_torch`.
        options: keyword arguments of :class:`fusedreg.LSTM` that ``nn.LSTM`` does not have (regularisers,
            ``recompute``, ``backend``) for all of them; or a function of a module's name and the module that gives
            those for this one, or ``None`` to leave it. Default: none, which computes what was computed before.
        skip: names, as ``model.named_modules()`` gives them, of modules to be left.

    Returns:
        What was replaced and what was left, and why; print it.

    Raises:
        ValueError: some module cannot be replaced (it is of a class derived from ``nn.LSTM``, it is scripted, its
            weights are changed by an old-style ``weight_norm`` or by pruning, a hyperparameter is out of
            range, a norm would have to be parametrised), a name to be skipped is not there, or ``model`` is an
            ``nn.LSTM``. Nothing has been changed then. TypeError: ``model`` is no module.

    Example:
        >>> import torch, fusedreg
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LSTM(4, 5))
        >>> print(fusedreg.replace_lstms(model, {"zoneout_cell": 0.2}))
        replaced 1 nn.LSTM, left 0
          1: LSTM(4, 5, zoneout_cell=0.2)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.LSTM):
        raise ValueError(
            "model: expected a module with an nn.LSTM inside, got an nn.LSTM itself, which cannot be replaced in "
            "place; use fusedreg.LSTM.from_torch(model)"
        )
    found = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.LSTM)
    }
    skipped = set([skip] if isinstance(skip, str) else skip)
    if unknown := skipped - found.keys():
        raise ValueError(
            f"skip: expected names of nn.LSTM modules, got {sorted(unknown)}; there are {sorted(found) or 'none'}"
        )
    made: dict[int, LSTM] = {}
    left: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, module in found.items():
        if name in skipped:
            left[name] = "as asked for by skip"
            continue
        own = options(name, module) if callable(options) else options or {}
        if own is None:
            left[name] = "as asked for by options"
        elif (reason := _reason_against(module)) is not None:
            refused[name] = reason
        elif id(module) not in made:
            try:
                made[id(module)] = without_weights(LSTM, module, own)
            except (ValueError, TypeError) as error:
                refused[name] = str(error)
    if refused:
        raise ValueError(
            "replace_lstms: nothing was replaced, since some modules cannot be; pass skip=... to leave them, or "
            "change them first:" + "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        )
    for module in {id(module): module for module in found.values()}.values():
        if id(module) in made:
            _move(module, made[id(module)])
    replaced = {name: made[id(module)] for name, module in found.items() if name not in left}
    for name, replacement in replaced.items():
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent)._modules[last] = replacement
    return Replacements(replaced, left)


def _reason_against(module: nn.LSTM) -> str | None:
    """Why a module cannot be replaced, with the remedy; ``None`` where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: replace it in the model that was scripted"
    plain = type(module).__mro__[1] if is_parametrized(module) else type(module)
    if plain is not nn.LSTM:
        return f"{plain.__name__} is derived from nn.LSTM, and what it adds is unknown here"
    expected = {name for names in module._all_weights for name in names}
    own = {*module._parameters, *getattr(module, "parametrizations", ())}
    if own != expected:
        changed = ", ".join(sorted(own ^ expected))
        return (
            f"its parameters are not nn.LSTM's own (they differ by {changed}), as after torch.nn.utils.weight_norm or "
            "pruning: undo that first (remove_weight_norm, prune.remove), or use torch.nn.utils.parametrizations"
        )
    return None


def _move(module: nn.LSTM, result: LSTM) -> None:
    """Hand the parameters, parametrisations and hooks over."""
    for name in module._parameters:
        result._parameters[name] = module._parameters[name]
    if is_parametrized(module):
        _move_parametrizations(module, result)
    for name in _HOOKS:
        if name in module.__dict__:
            result.__dict__[name] = module.__dict__[name]


def _move_parametrizations(module: nn.LSTM, result: LSTM) -> None:
    """Hand the parametrisations over as they are.

    Registering one runs it both ways, and some keep what they saw (a power iteration, a base): so it runs on the
    weight's present value, in evaluation, and what it keeps is put back afterwards.
    """
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    parts = list(parametrizations.modules())
    modes = [part.training for part in parts]
    kept = [
        {name: (value, value.clone()) for name, value in part._buffers.items() if value is not None} for part in parts
    ]
    parametrizations.eval()
    for name in parametrizations:
        value: torch.Tensor = getattr(module, name)
        result._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    transfer_parametrizations_and_params(module, result)
    for part, training, buffers in zip(parts, modes, kept, strict=True):
        part.training = training
        for name, (buffer, value) in buffers.items():
            part._buffers[name] = buffer.copy_(value)
    result.train(module.training)
