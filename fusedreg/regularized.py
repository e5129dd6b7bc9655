"""What :class:`fusedreg.LSTM` and :class:`fusedreg.LSTMCell` have in common: options, initial values, the seed used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusedreg import running_statistics
from fusedreg.refusals import Refusals
from fusedreg.regularization import BatchNorm, Regularization


def _exporting() -> bool:
    return torch.compiler.is_exporting()


# dynamo runs a function with this mark while it traces. What it answers itself, up to torch 2.11, is that everything
# it compiles is exported.
_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


class RegularizedModule(Refusals, nn.Module):
    """A module with a :class:`~fusedreg.Regularization`. Not for users."""

    hidden_size: int
    _regularization: Regularization
    _last_seed: Tensor | None = None
    _derived: tuple[str, ...] = ()  # attributes that `_prepare` makes of the others: neither pickled nor copied

    def _prepare(self) -> None:
        """Bring what is derived from the options up to date."""
        raise NotImplementedError

    def _check(self, regularization: Regularization) -> None:
        """Raise unless these options fit the module."""
        raise NotImplementedError

    @property
    def regularization(self) -> Regularization:
        """The regularisers in force. Assign another one to change rates between calls; ``norm`` stays as made."""
        return self._regularization

    @regularization.setter
    def regularization(self, value: Regularization) -> None:
        if not isinstance(value, Regularization):
            raise TypeError(
                f"regularization: expected a fusedreg.Regularization, got {type(value).__name__}; make one with "
                f"dataclasses.replace(module.regularization, ...)"
            )
        if value.norm != self._regularization.norm:
            raise ValueError(
                f"regularization: expected norm={self._regularization.norm!r}, which the parameters were made for, "
                f"got norm={value.norm!r}; make a new {type(self).__name__} to change the normalisation"
            )
        self._check(value)
        self._regularization = value
        self._prepare()

    @property
    def last_seed(self) -> Tensor | None:
        """The seed of the last call that drew masks, a 0-dimensional int64 tensor on its device, or ``None``.

        ``module(input, seed=module.last_seed)`` draws the same masks again. ``None`` before the first such call, and
        after one inside a ``torch.func`` transform (``vmap``, ``grad``), whose tensors end with it: draw the seed
        outside (:func:`fusedreg.seeds.draw_seed`) and pass it. Also available after a compiled call; with CUDA graphs
        it is memory that the next replay overwrites, so clone it. Neither part of the ``state_dict`` nor pickled or
        copied.

        Example:
            >>> import torch, fusedreg
            >>> lstm, input = fusedreg.LSTM(3, 4, hidden_dropout=0.5), torch.randn(5, 2, 3)
            >>> output = lstm(input).output
            >>> torch.equal(lstm(input, seed=lstm.last_seed).output, output)
            True
        """
        return self._last_seed

    def _remember_seed(self, seed: Tensor | None, given: Any) -> None:
        """Keep the seed of a call that drew masks; an exported program has nowhere to keep it.

        Of a tensor that the caller has ``given``, and may count up in place, a copy.
        """
        if _exporting():
            return
        if torch._C._are_functorch_transforms_active():
            seed = None
        self._last_seed = seed.clone() if seed is not None and seed is given else seed

    def reset_parameters(self) -> None:
        """Draw the weights as torch's module does; gains, shifts and running statistics get their initial values."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters(recurse=False):
            if not name.startswith("norm_"):
                nn.init.uniform_(parameter, -bound, bound)
        self.reset_norm()

    def reset_norm(self) -> None:
        """Give the norm's gains and shifts their initial values, and forget a batch norm's running statistics."""
        norm = self._regularization.norm
        gain = norm.weight_init if isinstance(norm, BatchNorm) else 1.0
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("norm_"):
                nn.init.constant_(parameter, gain if "_weight" in name else 0.0)
        running_statistics.reset_buffers(dict(self.named_buffers(recurse=False)))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in (*self._derived, "_last_seed"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()
