"""Which part of a model each parameter is: kernel, recurrent, bias, norm, embedding or other.

Decided by the module that holds a parameter and the place it has there, never by the look of a name. What is found
here is what :func:`~fusedreg.training.parameter_groups`, the penalties, the constraints and the clipping go by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fusedreg.cell import LSTMCell
from fusedreg.modules import LSTM
from fusedreg.parameters import Architecture, suffix

Component = Literal["kernel", "recurrent", "bias", "norm", "embedding", "other"]

COMPONENTS: tuple[Component, ...] = get_args(Component)

# A parameter that is used in several places counts as the first of these that any of its uses has: one that is
# multiplied with h at every step is recurrent, whatever else it is.
_PRECEDENCE: tuple[Component, ...] = ("recurrent", "kernel", "norm", "bias", "embedding", "other")

_OF_FIELD: dict[str, Component] = {
    "weight_ih": "kernel",
    "weight_hh": "recurrent",
    "weight_hr": "recurrent",
    "bias_ih": "bias",
    "bias_hh": "bias",
}
_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)
_WITH_BIAS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Place:
    """One parameter of an LSTM or LSTM cell: what it is called there, and its layer and direction.

    ``field`` is the name without the layer: ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh``, ``weight_hr``,
    ``norm_input_weight`` and so on.
    """

    name: str
    field: str
    layer: int
    direction: int

    @property
    def component(self) -> Component:
        """``kernel``, ``recurrent``, ``bias`` or ``norm``."""
        return _OF_FIELD.get(self.field, "norm")


@dataclass(frozen=True, eq=False)
class Classified:
    """A parameter of a model, and what it is.

    Attributes:
        parameter: the parameter itself.
        component: ``"kernel"``, ``"recurrent"``, ``"bias"``, ``"norm"``, ``"embedding"`` or ``"other"``.
        names: every name it has in the model, more than one where modules share it.
    """

    parameter: nn.Parameter
    component: Component
    names: tuple[str, ...]


def places(module: nn.Module) -> list[Place]:
    """The parameters that an LSTM or LSTM cell has by its own account; none of any other module."""
    if isinstance(module, (LSTM, nn.LSTM)):
        architecture = module.architecture if isinstance(module, LSTM) else _architecture(module)
        return [
            Place(field + suffix(layer, direction), field, layer, direction)
            for layer, direction in architecture.places()
            for field in (*architecture.torch_shapes(layer), *architecture.norm_shapes())
        ]
    if isinstance(module, (LSTMCell, nn.LSTMCell)):
        norm = module.regularization.norm if isinstance(module, LSTMCell) else None
        architecture = Architecture(module.input_size, module.hidden_size, bias=module.bias, norm=norm)
        fields = (*architecture.torch_shapes(0), *architecture.norm_shapes())
        return [Place(field, field, 0, 0) for field in fields]
    return []


def _architecture(module: nn.LSTM) -> Architecture:
    return Architecture(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        module.bidirectional,
        module.proj_size,
    )


def classify(model: nn.Module) -> list[Classified]:
    """Every parameter of a model once, in the order of ``model.parameters()``, with its component.

    Of LSTMs and LSTM cells, this library's and torch's: ``weight_ih`` is ``"kernel"``, ``weight_hh`` and the
    projection ``weight_hr`` are ``"recurrent"`` (both are multiplied into ``h`` at every step), the biases
    ``"bias"``, a norm's gains and shifts ``"norm"``. Of torch's other layers: an embedding's table is
    ``"embedding"``, the bias of a linear or convolutional layer ``"bias"``, what a norm layer has ``"norm"``.
    Everything else is ``"other"``: weights of linear layers, and whatever a module of the user's own holds.

    What stands behind a parametrised weight (``torch.nn.utils.parametrize``, the old ``weight_norm`` and
    ``spectral_norm``, pruning) is what the weight itself would be. A parameter that several modules share comes once;
    where it plays different parts, the first of recurrent, kernel, norm, bias, embedding and other decides.

    Args:
        model: any module, an LSTM itself included.

    Raises:
        TypeError: not a module.

    Example:
        >>> import torch, fusedreg
        >>> model = torch.nn.ModuleDict({"lstm": fusedreg.LSTM(3, 4), "head": torch.nn.Linear(4, 2)})
        >>> [(found.names[0], found.component) for found in fusedreg.training.classify(model)]
        [('lstm.weight_ih_l0', 'kernel'), ('lstm.weight_hh_l0', 'recurrent'), ('lstm.bias_ih_l0', 'bias'), \
('lstm.bias_hh_l0', 'bias'), ('head.weight', 'other'), ('head.bias', 'bias')]
    """
    component = by_identity(model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        Classified(parameter, component[id(parameter)], tuple(names[id(parameter)])) for parameter in model.parameters()
    ]


def by_identity(model: nn.Module) -> dict[int, Component]:
    """The component of each parameter, by its ``id``: :func:`classify` without the names, for what runs every step.

    Raises:
        TypeError: not a module.
    """
    check_model(model)
    found: dict[int, Component] = {}
    for module in model.modules():
        for component, parameter in _uses(module):
            before = found.get(id(parameter), component)
            found[id(parameter)] = min(before, component, key=_PRECEDENCE.index)
        for own in module._parameters.values():
            if own is not None:
                found.setdefault(id(own), "other")
    return found


def _uses(module: nn.Module) -> Iterator[tuple[Component, nn.Parameter]]:
    """What each parameter that serves this module itself, not one inside it, is there."""
    for place in places(module):
        for parameter in behind(module, place.name):
            yield place.component, parameter
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        for parameter in behind(module, "weight"):
            yield "embedding", parameter
    elif isinstance(module, _NORMS):
        for name in ("weight", "bias"):
            for parameter in behind(module, name):
                yield "norm", parameter
    elif isinstance(module, _WITH_BIAS):
        for parameter in behind(module, "bias"):
            yield "bias", parameter


def behind(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that a module's tensor ``name`` is made of: itself, or what its parametrisation keeps."""
    own = module._parameters.get(name)
    if own is not None:
        return [own]
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())  # type: ignore[index,union-attr]
    # The old-style weight_norm, spectral_norm and prune keep theirs in the module, under names made from this one,
    # and are themselves found among the hooks.
    made = [f"{name}_{ending}" for ending in ("g", "v", "orig")]
    for hook in module._forward_pre_hooks.values():
        if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return [kept for one in made if (kept := module._parameters.get(one)) is not None]
    return []


def uses_of_weights(model: nn.Module) -> Iterator[tuple[Component, Tensor]]:
    """Every weight of a model once, as its module uses it: the result of a parametrisation, not what is behind it.

    A weight that plays several parts has the component that :func:`classify` gives it.
    """
    component = by_identity(model)
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        made = getattr(module, "parametrizations", {}) if parametrize.is_parametrized(module) else {}
        hidden = {id(parameter) for name in made for parameter in behind(module, name)}
        for name in made:
            kept = behind(module, name)
            if kept and seen.isdisjoint(map(id, kept)):
                seen.update(map(id, kept))
                yield component[id(kept[0])], getattr(module, name)
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen | hidden:
                seen.add(id(parameter))
                yield component[id(parameter)], parameter


def find_lstms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The LSTMs and LSTM cells of a model, with their names.

    Raises:
        TypeError: not a module. ValueError: there is none.
    """
    check_model(model)
    found = [(name, module) for name, module in model.named_modules() if places(module)]
    if not found:
        raise ValueError(
            f"model: expected a fusedreg.LSTM, an nn.LSTM or a cell of these inside, got {type(model).__name__} "
            f"without one; pass the module that holds the LSTM"
        )
    return found


def check_model(model: object) -> None:
    """Check that it is a module.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the module, not its parameters"
        )


def check_components(argument: str, names: Iterable[object], allowed: tuple[Component, ...] = COMPONENTS) -> None:
    """Check names of components.

    Raises:
        ValueError: an unknown one, naming the argument.
    """
    for name in names:
        if name not in allowed:
            raise ValueError(f"{argument}: expected components out of {', '.join(allowed)}, got {name!r}")


def numbers_by_component(
    argument: str, value: float | Mapping[str, float], allowed: tuple[Component, ...] = COMPONENTS
) -> dict[Component, float]:
    """A number for each component: a mapping's, or one number for all that are allowed.

    Raises:
        ValueError: an unknown component, or a number that is negative or not finite. TypeError: not a number.
    """
    given: Mapping[str, float] = value if isinstance(value, Mapping) else dict.fromkeys(allowed, value)
    check_components(argument, given, allowed)
    return {name: non_negative(f"{argument}[{name!r}]", number) for name, number in given.items()}  # type: ignore[misc]


def non_negative(argument: str, value: object, *, above_zero: bool = False) -> float:
    """Check a number that must not be negative, nor zero where ``above_zero``.

    Raises:
        TypeError: not a number. ValueError: out of range, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {value!r} of type {type(value).__name__}; pass a float")
    if not 0.0 <= value < float("inf") or (above_zero and value == 0.0):
        kind = "a positive" if above_zero else "a non-negative"
        raise ValueError(f"{argument}: expected {kind} finite number, got {value!r}")
    return float(value)
