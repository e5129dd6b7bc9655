"""Names and shapes of an LSTM's parameters and buffers, and their grouping by layer and direction.

The first come under ``torch.nn.LSTM``'s names and in its order; what a normalisation adds comes after all of them:
``norm_{input,recurrent,cell}_{weight,bias}_l{k}[_reverse]``, and for a batch norm the buffers
``running_{input,recurrent,cell}_{mean,var}_l{k}[_reverse]`` and ``num_batches_tracked_l{k}[_reverse]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fusedreg.layer import LayerParameters
from fusedreg.regularization import BatchNorm, LayerNorm

SITES = ("input", "recurrent", "cell")
_TORCH_FIELDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


@dataclass(frozen=True)
class Architecture:
    """The sizes of an LSTM: ``nn.LSTM``'s hyperparameters that decide which parameters there are.

    Args:
        input_size, hidden_size, num_layers, bias, bidirectional, proj_size: as in :class:`torch.nn.LSTM`.
        norm: a :class:`~fusedreg.BatchNorm`, a :class:`~fusedreg.LayerNorm` or ``None``.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    proj_size: int = 0
    norm: BatchNorm | LayerNorm | None = None

    @property
    def num_directions(self) -> int:
        """``D``: 2 with ``bidirectional``, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        """``P``: the size of ``h`` and of the output of one direction."""
        return self.proj_size or self.hidden_size

    def places(self) -> Iterator[tuple[int, int]]:
        """Every ``(layer, direction)``, in ``nn.LSTM``'s order."""
        for layer in range(self.num_layers):
            for direction in range(self.num_directions):
                yield layer, direction

    def torch_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Field to shape, of the parameters that ``nn.LSTM`` has too, in its order."""
        gates = 4 * self.hidden_size
        features = self.input_size if layer == 0 else self.state_size * self.num_directions
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (gates, features), "weight_hh": (gates, self.state_size)}
        if self.bias:
            shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, self.hidden_size)
        return shapes

    def norm_shapes(self) -> dict[str, tuple[int, ...]]:
        """Field to shape, of the parameters that the normalisation adds to each layer and direction.

        Batch norm has no shift on the input and recurrent terms: that is ``bias_ih + bias_hh``.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for site in SITES:
            if self.norm is not None and getattr(self.norm, site):
                size = self.hidden_size if site == "cell" else 4 * self.hidden_size
                shapes[f"norm_{site}_weight"] = (size,)
                if site == "cell" or isinstance(self.norm, LayerNorm):
                    shapes[f"norm_{site}_bias"] = (size,)
        return shapes

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every parameter, in order: ``nn.LSTM``'s own, then the normalisation's."""
        own = {
            field + suffix(layer, direction): shape
            for layer, direction in self.places()
            for field, shape in self.torch_shapes(layer).items()
        }
        added = {
            field + suffix(layer, direction): shape
            for layer, direction in self.places()
            for field, shape in self.norm_shapes().items()
        }
        return own | added

    def group_names(self) -> tuple[tuple[str | None, ...], ...]:
        """For each layer and direction, the names that fill a ``LayerParameters``; ``None`` for what is absent."""
        groups = []
        for layer, direction in self.places():
            present = self.torch_shapes(layer) | self.norm_shapes()
            names = [
                field + suffix(layer, direction) if field in present else None for field in LayerParameters._fields
            ]
            while names[-1] is None:  # the fields' defaults say the same
                names.pop()
            groups.append(tuple(names))
        return tuple(groups)


def suffix(layer: int, direction: int) -> str:
    """What a layer's and direction's names end with: ``_l0``, ``_l0_reverse``, and so on."""
    return f"_l{layer}" + ("_reverse" if direction else "")


def infer_architecture(
    parameters: Sequence[Tensor] | Mapping[str, Tensor],
    num_layers: int,
    bidirectional: bool,
    norm: BatchNorm | LayerNorm | None,
) -> tuple[Architecture, dict[str, Tensor]]:
    """Read the sizes off the parameters of a functional call, and give the parameters their names.

    Args:
        parameters: a flat sequence in the order of ``Architecture.parameter_shapes``, or a mapping by name.
        num_layers, bidirectional, norm: what cannot be read off.

    Returns:
        The architecture and the parameters by name. Their shapes have been checked.

    Raises:
        TypeError, ValueError: naming the parameter, the expected shape and the one that came.
    """
    cells = num_layers * (2 if bidirectional else 1)
    if isinstance(parameters, Mapping):
        named = dict(parameters)
        missing = [name for name in ("weight_ih_l0", "weight_hh_l0") if name not in named]
        if missing:
            raise ValueError(
                f"parameters: expected {missing[0]!r} among the names, got {sorted(named)}; pass nn.LSTM's names, for "
                f"instance dict(module.named_parameters())"
            )
        weight_ih, weight_hh = named["weight_ih_l0"], named["weight_hh_l0"]
        bias, projected = named.get("bias_ih_l0") is not None, named.get("weight_hr_l0") is not None
    else:
        flat = list(parameters)
        added = len(Architecture(1, 1, norm=norm).norm_shapes())
        count = len(flat) // cells - added if len(flat) % cells == 0 else 0
        if count not in (2, 3, 4, 5):
            raise ValueError(
                f"parameters: expected 2 to 5 tensors (weights, biases, projection) and {added} of the normalisation "
                f"for each of {cells} layers and directions, got {len(flat)} tensors; pass list(module.parameters())"
            )
        bias, projected = count >= 4, count in (3, 5)
        weight_ih, weight_hh = flat[0], flat[1]
    for name, weight in (("weight_ih_l0", weight_ih), ("weight_hh_l0", weight_hh)):
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"parameters: expected {name} to be a tensor, got {type(weight).__name__}; pass nn.LSTM's parameters"
            )
        if weight.dim() != 2 or weight.shape[0] % 4 != 0:
            raise ValueError(
                f"parameters: expected {name} of shape (4 * hidden_size, features), got {tuple(weight.shape)}; stack "
                f"the gates in the order i, f, g, o"
            )
    proj_size = int(weight_hh.shape[1]) if projected else 0
    architecture = Architecture(
        int(weight_ih.shape[1]), int(weight_hh.shape[0]) // 4, num_layers, bias, bidirectional, proj_size, norm
    )
    shapes = architecture.parameter_shapes()
    if not isinstance(parameters, Mapping):
        named = dict(zip(shapes, flat, strict=True))
    for name, shape in shapes.items():
        value = named.get(name)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"parameters: expected {name} to be a tensor of shape {shape}, got {type(value).__name__}; pass every "
                f"parameter of every layer and direction"
            )
        if tuple(value.shape) != shape:
            raise ValueError(
                f"parameters: expected {name} of shape {shape}, got {tuple(value.shape)}; the sizes are read off "
                f"weight_ih_l0 and weight_hh_l0"
            )
        if value.dtype != weight_ih.dtype or value.device != weight_ih.device:
            raise ValueError(
                f"parameters: expected {name} of {weight_ih.dtype} on {weight_ih.device} as weight_ih_l0, got "
                f"{value.dtype} on {value.device}; convert all parameters to one type and device"
            )
    return architecture, named


def grouped(architecture: Architecture, named: Mapping[str, Tensor]) -> list[LayerParameters]:
    """The parameters by layer and direction."""
    return [
        LayerParameters(*(None if name is None else named[name] for name in names))  # type: ignore[arg-type]
        for names in architecture.group_names()
    ]
