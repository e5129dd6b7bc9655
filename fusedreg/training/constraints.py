"""Constraints that hold after each step of the optimiser: norms of units, spectra of the gates' recurrent weights.

All act in place, under ``no_grad``, and leave what already meets them bit for bit as it was. A frozen parameter is left
alone, a tied one is treated once, and one that is parametrised is refused: what stands behind it is another matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedreg.training.components import Component, Place, find_lstms, non_negative, numbers_by_component, places

_CONSTRAINED: tuple[Component, ...] = ("kernel", "recurrent")
GATES = ("i", "f", "g", "o")


class _Weight(NamedTuple):
    name: str
    place: Place
    module: nn.Module
    value: nn.Parameter


def max_norm_(model: nn.Module, limit: float | Mapping[str, float]) -> None:
    """Scale every unit's incoming weights down to a norm of at most ``limit``, each gate and component by itself.

    A row of ``weight_ih`` or ``weight_hh`` is what one unit's gate receives: ``w ← w · min(1, limit / ‖w‖)``
    (Srebro and Shraibman 2005; Hinton et al. 2012; Srivastava et al. 2014, section 5.1). With a projection, the rows
    of ``weight_hr`` count as recurrent too.

    Args:
        model: an LSTM, a cell, or a model with some inside; of other layers nothing is changed
            (:class:`torch.nn.Embedding` has a ``max_norm`` of its own).
        limit: for ``"kernel"`` and ``"recurrent"``, or one number for both.

    Raises:
        ValueError: another component, a limit that is not positive, no LSTM, a parametrised weight. TypeError: not a
            module, not a number.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4)
        >>> fusedreg.training.max_norm_(lstm, {"recurrent": 0.5})
        >>> bool((lstm.weight_hh_l0.norm(dim=1) <= 0.5 + 1e-6).all())
        True
    """
    limits = numbers_by_component("limit", limit, _CONSTRAINED)
    for component, number in limits.items():
        non_negative(f"limit[{component!r}]", number, above_zero=True)
    with torch.no_grad():
        for weight in _weights(model, tuple(limits)):
            norms = torch.linalg.vector_norm(_wide(weight.value), dim=1, keepdim=True)
            _scale(weight.value, norms, limits[weight.place.component])


def cap_spectral_norm_(model: nn.Module, limit: float | Mapping[str, float]) -> dict[str, Tensor]:
    """Scale each gate's block of ``W_hh`` down to a largest singular value of at most ``limit``, exactly, by its SVD.

    ``W^k ← W^k · min(1, limit / σ₁(W^k))`` for ``k`` of i, f, g, o. At an SVD of four ``(H, P)`` matrices a layer this
    is slow for large layers: :class:`SpectralNormCap` follows the singular vectors from step to step instead.

    Args:
        model: an LSTM, a cell, or a model with some inside.
        limit: for all gates, or by gate: ``{"f": 1.0, "g": 0.9}``, those left out without one.

    Returns:
        By weight's name, ``(4,)``: the largest singular values before, in the order i, f, g, o.

    Raises:
        ValueError: another gate, a limit that is not positive, no LSTM, a parametrised weight, NaN or Inf in
            a weight. TypeError: not a module, not a number.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 8)
        >>> before = fusedreg.training.cap_spectral_norm_(lstm, 0.5)["weight_hh_l0"]
        >>> bool((torch.linalg.matrix_norm(lstm.weight_hh_l0.detach().view(4, 8, 8), 2) <= 0.5 + 1e-6).all())
        True
    """
    limits = _gate_limits(limit)
    measured = {}
    with torch.no_grad():
        weights = _weights(model, ("recurrent",), blocks=True)
        _check_finite({weight.name: weight.value for weight in weights})
        for weight in weights:
            blocks = _blocks(weight.value)
            measured[weight.name] = torch.linalg.svdvals(_wide(blocks))[:, 0]
            _scale(blocks, measured[weight.name][:, None, None], limits)
    return measured


def cap_spectral_radius_(model: nn.Module, limit: float | Mapping[str, float]) -> dict[str, Tensor]:
    """Scale each gate's block of ``W_hh`` down to a spectral radius of at most ``limit``, exactly.

    The radius is the largest absolute eigenvalue: what decides whether powers of the matrix fade or grow, where the
    largest singular value bounds a single step. With a projection the recurrence multiplies ``W_hh^k W_hr``, so that
    product's radius is capped, by scaling ``W_hh^k``.

    Args:
        model: an LSTM, a cell, or a model with some inside.
        limit: for all gates, or by gate: ``{"f": 1.0, "g": 0.9}``, those left out without one.

    Returns:
        By weight's name, ``(4,)``: the radii before, in the order i, f, g, o.

    Raises:
        ValueError: another gate, a limit that is not positive, no LSTM, a parametrised weight, NaN or Inf in
            a weight. TypeError: not a module, not a number.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 8)
        >>> _ = fusedreg.training.cap_spectral_radius_(lstm, 0.1)
        >>> radii = torch.linalg.eigvals(lstm.weight_hh_l0.detach().view(4, 8, 8)).abs().amax(-1)
        >>> bool((radii <= 0.1 + 1e-6).all())
        True
    """
    limits = _gate_limits(limit)
    measured = {}
    with torch.no_grad():
        weights = _weights(model, ("recurrent",), blocks=True)
        recurrences = {weight.name: _recurrence(weight) for weight in weights}
        _check_finite(recurrences)
        for weight in weights:
            measured[weight.name] = torch.linalg.eigvals(recurrences[weight.name]).abs().amax(-1)
            _scale(_blocks(weight.value), measured[weight.name][:, None, None], limits)
    return measured


class SpectralNormCap:
    """:func:`cap_spectral_norm_` by power iteration, for every step of a training.

    The singular vectors are found once, exactly, and then followed: from one step to the next they hardly turn, so
    that one iteration of ``v ← WᵀW v / ‖WᵀW v‖`` a call is enough (Miyato et al. 2018). The estimate ``‖W v‖`` is
    never above the largest singular value, so that after a call this may still be a little over the limit.

    Args:
        model: an LSTM, a cell, or a model with some inside, that is changed at each call.
        limit: for all gates, or by gate, those left out without one.
        iterations: at each call.

    Returns:
        A call returns what :func:`cap_spectral_norm_` does.

    Raises:
        ValueError, TypeError: as :func:`cap_spectral_norm_`.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 8)
        >>> cap = fusedreg.training.SpectralNormCap(lstm, 0.5)
        >>> norms = cap()  # after each optimizer.step()
    """

    def __init__(self, model: nn.Module, limit: float | Mapping[str, float], *, iterations: int = 1) -> None:
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations: expected a positive int, got {iterations!r}")
        self.model = model
        self.limits = _gate_limits(limit)
        self.iterations = iterations
        with torch.no_grad():
            weights = _weights(model, ("recurrent",), blocks=True)
            _check_finite({weight.name: weight.value for weight in weights})
            self._vectors = {
                weight.name: torch.linalg.svd(_wide(_blocks(weight.value)), full_matrices=False).Vh[:, 0]
                for weight in weights
            }

    def __call__(self) -> dict[str, Tensor]:
        """Scale the blocks down where they are above the limit."""
        measured = {}
        with torch.no_grad():
            for weight in _weights(self.model, ("recurrent",), blocks=True):
                blocks = _blocks(weight.value)
                wide = _wide(blocks)
                vector = self._vectors[weight.name].to(wide.device)[..., None]
                for _ in range(self.iterations):
                    image = wide.mT @ (wide @ vector)
                    length = torch.linalg.vector_norm(image, dim=1, keepdim=True)
                    # A block of zeros has no direction: the vector stays.
                    vector = torch.where(length > 0, image / length, vector)
                self._vectors[weight.name] = vector[..., 0]
                measured[weight.name] = torch.linalg.vector_norm(wide @ vector, dim=(1, 2))
                _scale(blocks, measured[weight.name][:, None, None], self.limits)
        return measured


def _weights(model: nn.Module, components: tuple[Component, ...], *, blocks: bool = False) -> list[_Weight]:
    """The matrices to be constrained, each once; with ``blocks`` only ``weight_hh``. All, or an error: never some."""
    found: list[_Weight] = []
    seen: set[int] = set()
    for name, module in find_lstms(model):
        for place in places(module):
            if place.component not in components or (blocks and place.field != "weight_hh"):
                continue
            value = module._parameters.get(place.name)
            full_name = f"{name}.{place.name}" if name else place.name
            if value is None:
                raise ValueError(
                    f"model: expected {full_name} to be a plain parameter, got a parametrised one; put the constraint "
                    f"into the parametrisation (torch.nn.utils.parametrizations.spectral_norm, for instance)"
                )
            if id(value) not in seen and value.requires_grad:
                seen.add(id(value))
                found.append(_Weight(full_name, place, module, value))
    return found


def _blocks(weight: Tensor) -> Tensor:
    """``(4, H, P)``, a view: the gates in the order i, f, g, o."""
    return weight.view(4, -1, weight.shape[1])


def _recurrence(weight: _Weight) -> Tensor:
    """What each gate multiplies into the state at every step: ``(4, H, H)``, or ``(4, P, P)`` with a projection."""
    blocks = _wide(_blocks(weight.value))
    projection = getattr(weight.module, weight.place.name.replace("weight_hh", "weight_hr"), None)
    # Of W_hr W_hh^k, which has the eigenvalues of W_hh^k W_hr, but for zeros.
    return blocks if projection is None else _wide(projection) @ blocks


def _check_finite(matrices: Mapping[str, Tensor]) -> None:
    """Check before a decomposition: of a matrix with NaN, LAPACK's ends some processes.

    Raises:
        ValueError: NaN or Inf somewhere, naming the weight.
    """
    for name, matrix in matrices.items():
        if not bool(matrix.isfinite().all()):
            raise ValueError(
                f"model: expected finite recurrent weights, got NaN or Inf in {name}; fusedreg.inspect.NonFinite says "
                f"where it comes from"
            )


def _wide(tensor: Tensor) -> Tensor:
    """16-bit values as float32, in which there are decompositions."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _scale(values: Tensor, measured: Tensor, limit: float | list[float]) -> None:
    """Multiply by limit / measured where that is below 1; a factor of 1 changes no bit."""
    limits = measured.new_tensor(limit).reshape(-1, *[1] * (measured.dim() - 1))
    factor = torch.where(measured > limits, limits / measured, 1.0)
    values.copy_(_wide(values) * factor)


def _gate_limits(limit: float | Mapping[str, float]) -> list[float]:
    if not isinstance(limit, Mapping):
        return [non_negative("limit", limit, above_zero=True)] * 4
    for gate in limit:
        if gate not in GATES:
            raise ValueError(f"limit: expected gates out of i, f, g, o, got {gate!r}")
    given = {gate: non_negative(f"limit[{gate!r}]", number, above_zero=True) for gate, number in limit.items()}
    return [given.get(gate, float("inf")) for gate in GATES]
