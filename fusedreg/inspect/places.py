"""Which LSTMs a model has, and how what is inside them is called: module, layer, direction, gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fusedreg.cell import LSTMCell
from fusedreg.layer import LayerParameters
from fusedreg.modules import LSTM
from fusedreg.parameters import suffix

GATES = ("i", "f", "g", "o")
"""Input, forget, cell and output gate: the order of the four blocks of each ``4H`` parameter."""


class Place(NamedTuple):
    """One layer and direction of one LSTM of a model. ``module`` is its name there, ``""`` for the model itself."""

    module: str
    layer: int
    direction: int

    @property
    def label(self) -> str:
        """``encoder.l0_reverse``: the module's name and its parameters' suffix."""
        own = suffix(self.layer, self.direction)[1:]
        return f"{self.module}.{own}" if self.module else own


def find_lstms(model: nn.Module, skip: Iterable[str] = (), *, refuse_cells: bool = True) -> dict[str, LSTM | nn.LSTM]:
    """Every :class:`fusedreg.LSTM` and ``nn.LSTM`` of a model by its name, each once.

    Args:
        model: an LSTM, or a module with some inside.
        skip: names of LSTMs and cells to leave out.
        refuse_cells: raise where there are cells besides, which would go unseen.

    Raises:
        TypeError: not a module. ValueError: there is none, there is a cell, or a name to be skipped is not there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, (LSTM, nn.LSTM))}
    cells = [name for name, module in model.named_modules() if isinstance(module, (LSTMCell, nn.LSTMCell))]
    skipped = set([skip] if isinstance(skip, str) else skip)
    if unknown := skipped - found.keys() - set(cells):
        there = sorted([*found, *cells])
        raise ValueError(f"skip: expected names of LSTMs, got {sorted(unknown)}; there are {there or 'none'}")
    if refuse_cells and (unseen := [name for name in cells if name not in skipped]):
        names = ", ".join(name or "the model itself" for name in unseen)
        raise ValueError(
            f"model: expected LSTMs over whole sequences, got a cell at {names}, whose steps are calls that nobody "
            f"here can put together; use fusedreg.LSTM, which computes the same from the same weights, or pass "
            f"skip={unseen!r}"
        )
    kept = {name: module for name, module in found.items() if name not in skipped}
    if not kept:
        raise ValueError(
            f"model: expected a fusedreg.LSTM or an nn.LSTM, or a module with one inside, got {type(model).__name__} "
            f"with {'none but those to be skipped' if found else 'none'}"
        )
    return kept


def places(
    model: nn.Module, skip: Iterable[str] = (), *, refuse_cells: bool = True
) -> Iterator[tuple[Place, LSTM | nn.LSTM]]:
    """Every layer and direction of every LSTM, in the model's order and then ``nn.LSTM``'s; as :func:`find_lstms`."""
    for name, module in find_lstms(model, skip, refuse_cells=refuse_cells).items():
        for layer in range(module.num_layers):
            for direction in range(2 if module.bidirectional else 1):
                yield Place(name, layer, direction), module


def layer_tensors(module: LSTM | nn.LSTM, place: Place) -> dict[str, Tensor]:
    """The parameters of one layer and direction by field, as a call reads them: parametrised ones computed.

    In evaluation, for some parametrisations change what they keep whenever they are read in training.
    """
    end = suffix(place.layer, place.direction)
    kept = getattr(module, "parametrizations", None) if is_parametrized(module) else None
    parts = list(kept.modules()) if isinstance(kept, nn.Module) else []
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        own = {field: getattr(module, field + end, None) for field in LayerParameters._fields}
    finally:
        for part, training in zip(parts, modes, strict=True):
            part.training = training
    return {field: value for field, value in own.items() if value is not None}


def by_gate(field: str, value: Tensor) -> dict[str, Tensor]:
    """A parameter's four blocks by gate; under ``""`` the whole of one that belongs to no gate.

    Those are the projection ``weight_hr`` and the cell norm's gain and shift.
    """
    if field == "weight_hr" or field.startswith("norm_cell"):
        return {"": value}
    return dict(zip(GATES, value.chunk(4), strict=True))
