"""``replace_lstms``: every ``nn.LSTM`` and ``nn.LSTMCell`` inside a model replaced by this library's, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, transfer_parametrizations_and_params

from fusedreg.cell import LSTMCell
from fusedreg.cell_checks import check_output_is_asked_for
from fusedreg.conversion import cell_without_weights, without_weights
from fusedreg.modules import LSTM

TorchModule = nn.LSTM | nn.LSTMCell

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

    A module that stands under several names is one: it is listed under the first, and stays one under all of them.

    Attributes:
        replaced: the name of each module that was replaced, and what it became.
        left: the name of each ``nn.LSTM`` and ``nn.LSTMCell`` that stayed, and why.
        names: of each module that was found, all the names, by the first.
    """

    replaced: Mapping[str, LSTM | LSTMCell] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        cells = sum(isinstance(module, LSTMCell) for module in self.replaced.values())
        counts = [f"{len(self.replaced) - cells} nn.LSTM"] if len(self.replaced) > cells or not cells else []
        counts += [f"{cells} nn.LSTMCell"] if cells else []
        lines = [f"replaced {' and '.join(counts)}, left {len(self.left)}"]
        lines += [f"  {', '.join(self.names[name])}: {module}" for name, module in self.replaced.items()]
        lines += [f"  {', '.join(self.names[name])}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace_lstms(
    model: nn.Module,
    options: Mapping[str, Any] | Callable[[str, Any], Mapping[str, Any] | None] | None = None,
    *,
    skip: Iterable[str] = (),
) -> Replacements:
    """Replace each ``nn.LSTM`` inside ``model`` by a :class:`fusedreg.LSTM`, and each ``nn.LSTMCell`` by a
    :class:`fusedreg.LSTMCell`, in place.

    The parameters are the same objects, so that an optimiser made before goes on, and so are weights that several
    modules share. Hooks, parametrisations, attributes that the program has set, the mode and the state dict's names go
    along, and a module that stands under several names is one afterwards too. Either every module is replaced that was
    not to be skipped, or none is and an error names those that cannot be.

    Args:
        model: is changed. Where it is an ``nn.LSTM`` or ``nn.LSTMCell`` itself there is nothing to put another one
            into: use :meth:`fusedreg.LSTM.from_torch` or :meth:`fusedreg.LSTMCell.from_torch`.
        options: keyword arguments of :class:`fusedreg.LSTM` and :class:`fusedreg.LSTMCell` that torch's do not have
            (regularisers, ``recompute``, ``backend``) for all of them; or a function of a module's (first) name and the
            module that gives those for this one, or ``None`` to leave it. Default: none, which computes what was
            computed before.
        skip: names, as ``model.named_modules()`` gives them, of modules to be left. One of several names is enough.

    Returns:
        What was replaced and what was left, and why; print it.

    Raises:
        ValueError: some module cannot be replaced (it is of a class derived from torch's, it is scripted, its weights
            are changed by an old-style ``weight_norm`` or by pruning, it has buffers, modules or methods that torch's
            has not, a hyperparameter is out of range, an option is not one of a cell or gives it an output besides
            ``h``, a norm would have to be parametrised), a name to be skipped is not there, or ``model`` is such a
            module itself. Nothing has been changed then. TypeError: ``model`` is no module, ``options`` no mapping.

    Example:
        >>> import torch, fusedreg
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LSTM(4, 5))
        >>> print(fusedreg.replace_lstms(model, {"zoneout_cell": 0.2}))
        replaced 1 nn.LSTM, left 0
          1: LSTM(4, 5, zoneout_cell=0.2)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, TorchModule):
        plain = _torch_class(model).__name__
        raise ValueError(
            f"model: expected a module with an nn.{plain} inside, got an nn.{plain} itself, which cannot be replaced "
            f"in place; use fusedreg.{plain}.from_torch(model)"
        )
    found = _find(model)
    skipped = set([skip] if isinstance(skip, str) else skip)
    if unknown := skipped - {name for _, names in found for name in names}:
        raise ValueError(
            f"skip: expected names of nn.LSTM or nn.LSTMCell modules, got {sorted(unknown)}; there are "
            f"{sorted(name for _, names in found for name in names) or 'none'}"
        )
    made: dict[str, tuple[TorchModule, LSTM | LSTMCell]] = {}
    left: dict[str, str] = {}
    refused: dict[str, str] = {}
    for module, names in found:
        name = names[0]
        if skipped.intersection(names):
            left[name] = "as asked for by skip"
            continue
        own = options(name, module) if callable(options) else {} if options is None else options
        if own is None:
            left[name] = "as asked for by options"
        elif not isinstance(own, Mapping):
            raise TypeError(
                f"options: expected keyword arguments of fusedreg.LSTM by name, or a function that returns them or "
                f"None, got {type(own).__name__}; pass for instance {{'zoneout_cell': 0.2}}"
            )
        elif (reason := _reason_against(module)) is not None:
            refused[name] = reason
        else:
            try:
                made[name] = module, _without_weights(module, own)
            except (ValueError, TypeError) as error:
                refused[name] = str(error)
    by_first = {names[0]: names for _, names in found}
    if refused:
        raise ValueError(
            "replace_lstms: nothing was replaced, since some modules cannot be; pass skip=... to leave them, or "
            "change them first:"
            + "".join(f"\n  {', '.join(by_first[name])}: {reason}" for name, reason in refused.items())
        )
    for first, (module, result) in made.items():
        _move(module, result)
        for name in by_first[first]:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._modules[last] = result
    return Replacements({name: result for name, (_, result) in made.items()}, left, by_first)


def _find(model: nn.Module) -> list[tuple[TorchModule, tuple[str, ...]]]:
    """Each of torch's modules inside a model, once, with all the names it stands under."""
    found: dict[int, tuple[TorchModule, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TorchModule) or _is_scripted(module):
            found.setdefault(id(module), (module, []))[1].append(name)
    return [(module, tuple(names)) for module, names in found.values()]


def _is_scripted(module: Any) -> bool:
    """Whether it was one of torch's modules before ``torch.jit.script``: then it is of no class of torch's any more."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    weights = {"LSTM": "weight_hh_l0", "LSTMCell": "weight_hh"}
    return hasattr(module, weights.get(getattr(module, "original_name", ""), ""))


def _torch_class(module: TorchModule) -> type[TorchModule]:
    return nn.LSTM if isinstance(module, nn.LSTM) else nn.LSTMCell


def _without_weights(module: TorchModule, options: Mapping[str, Any]) -> LSTM | LSTMCell:
    result: LSTM | LSTMCell
    if isinstance(module, nn.LSTM):
        result = without_weights(LSTM, module, options)
    else:
        result = cell_without_weights(LSTMCell, module, options)
        # Its program calls it as nn.LSTMCell is called, and so will not ask for an output besides h.
        check_output_is_asked_for(result.regularization.layer_options(0, 1, 0, True, False, False))
    torchs = _torch_class(module)
    if taken := [name for name in _attributes(module) if hasattr(result, name) and not hasattr(torchs, name)]:
        raise ValueError(f"its attribute {taken[0]} means something else here; give it another name")
    return result


def _attributes(module: TorchModule) -> dict[str, Any]:
    """What a program has put on the module that torch does not."""
    plain = _torch_class(module)(1, 1, device="meta")
    return {name: value for name, value in module.__dict__.items() if name not in plain.__dict__}


def _reason_against(module: TorchModule) -> str | None:
    """Why a module cannot be replaced, with the remedy; ``None`` where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: replace it in the model that was scripted"
    plain = type(module).__mro__[1] if is_parametrized(module) else type(module)
    torchs = _torch_class(module)
    if plain is not torchs:
        return f"{plain.__name__} is derived from nn.{torchs.__name__}, and what it adds is unknown here"
    expected = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    if isinstance(module, nn.LSTM):
        expected = {name for names in module._all_weights for name in names}
    own = {*module._parameters, *getattr(module, "parametrizations", ())}
    if own != expected:
        changed = ", ".join(sorted(own ^ expected))
        return (
            f"its parameters are not nn.{torchs.__name__}'s own (they differ by {changed}), as after "
            "torch.nn.utils.weight_norm or pruning: undo that first (remove_weight_norm, prune.remove), or use "
            "torch.nn.utils.parametrizations"
        )
    if added := sorted({*module._buffers, *module._modules} - {"parametrizations"}):
        return f"it has buffers or modules that nn.{torchs.__name__} has not ({', '.join(added)}): move them elsewhere"
    # What to flatten is nothing here, so that may be somebody's own.
    if own_methods := [name for name in _attributes(module) if hasattr(torchs, name) and name != "flatten_parameters"]:
        return (
            f"its {own_methods[0]} is not nn.{torchs.__name__}'s own, as after .compile() or another library's "
            "wrapper: undo that first, and do it again afterwards"
        )
    return None


def _move(module: TorchModule, result: LSTM | LSTMCell) -> None:
    """Hand the parameters, parametrisations, hooks and a program's own attributes over."""
    for name in module._parameters:
        result._parameters[name] = module._parameters[name]
    if is_parametrized(module):
        _move_parametrizations(module, result)
    for name in _HOOKS:
        if name in module.__dict__:
            result.__dict__[name] = module.__dict__[name]
    result.__dict__.update(_attributes(module))


def _move_parametrizations(module: TorchModule, result: LSTM | LSTMCell) -> None:
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
