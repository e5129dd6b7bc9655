"""Averaged SGD that begins when the validation loss stops falling: NT-ASGD's trigger, and the average itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Rule = Literal["released", "paper"]


class NonMonotonicTrigger:
    """Says when to begin averaging: the trigger of NT-ASGD (Merity, Keskar and Socher 2018, algorithm 1).

    After ``t`` validations with losses ``l_0 … l_{t-1}`` the next one, ``v``, triggers where ``t > patience`` and::

        released:   v > min(l_0 … l_{t-patience-1})     no better than the best, the latest ones left aside
        paper:      v > min(l_{t-patience} … l_{t-1})   no better than the best of the latest

    ``"released"`` is what the authors' code does, with which their results were made: a loss must have stayed above an
    old best for a while. ``"paper"`` is the printed algorithm, which fires sooner. Once triggered it stays so.

    Args:
        patience: n, 5 in the paper.
        rule: which of the two.

    Attributes:
        triggered: whether it has. losses: all that were given.

    Raises:
        ValueError: ``patience`` below 1, another rule. TypeError: ``patience`` is not an int.

    Example:
        >>> import fusedreg
        >>> trigger = fusedreg.training.NonMonotonicTrigger(patience=2)
        >>> [trigger.step(loss) for loss in (5.0, 4.0, 4.2, 4.1, 4.3)]
        [False, False, False, False, True]
    """

    def __init__(self, patience: int = 5, *, rule: Rule = "released") -> None:
        if isinstance(patience, bool) or not isinstance(patience, int):
            raise TypeError(f"patience: expected an int, got {patience!r} of type {type(patience).__name__}")
        if patience < 1:
            raise ValueError(f"patience: expected at least 1, got {patience}")
        if rule not in get_args(Rule):
            raise ValueError(f"rule: expected 'released' or 'paper', got {rule!r}")
        self.patience = patience
        self.rule = rule
        self.losses: list[float] = []
        self.triggered = False

    def step(self, loss: float | Tensor) -> bool:
        """Take a validation's loss (or perplexity: only the order matters), and say whether to average from now on.

        Raises:
            ValueError: the loss is NaN, of which nothing can be said. TypeError: it is not one number.
        """
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = float(loss.detach())
        if isinstance(loss, (Tensor, str)) or not hasattr(loss, "__float__"):
            got = (
                f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r} of type {type(loss).__name__}"
            )
            raise TypeError(f"loss: expected a number, got {got}; pass the mean over the validation set")
        value = float(loss)
        if math.isnan(value):
            raise ValueError("loss: expected a number, got NaN; training has diverged")
        if len(self.losses) > self.patience:
            old, latest = self.losses[: -self.patience], self.losses[-self.patience :]
            self.triggered = self.triggered or value > min(old if self.rule == "released" else latest)
        self.losses.append(value)
        return self.triggered

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self.losses), "triggered": self.triggered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.losses = list(state["losses"])
        self.triggered = bool(state["triggered"])


class ParameterAverage:
    """The mean of parameters over steps, kept beside them: ``1/(k-T+1) · Σ_{i=T}^k w_i`` (Polyak and Juditsky 1992).

    :meth:`update` after each step of the optimiser, from the trigger on; :meth:`applied` for evaluation. The means are
    float32 at least. Running statistics of a batch norm are not averaged: they belong to the last weights.

    Args:
        parameters: a module, or parameters; tied ones are averaged once.

    Attributes:
        count: of updates.

    Raises:
        TypeError, ValueError: neither a module nor parameters; none.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(3, 4)
        >>> average = fusedreg.training.ParameterAverage(lstm)
        >>> average.update()
        >>> with average.applied():
        ...     output, _ = lstm.eval()(torch.randn(5, 2, 3))
    """

    def __init__(self, parameters: nn.Module | Iterable[nn.Parameter]) -> None:
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        self.parameters = list({id(parameter): parameter for parameter in given}.values())
        if not all(isinstance(parameter, Tensor) for parameter in self.parameters):
            raise TypeError("parameters: expected a module or parameters; pass model.parameters(), without names")
        if not self.parameters:
            raise ValueError("parameters: expected at least one, got none; an iterator can be read once only")
        self.means: list[Tensor] = []
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters into the mean."""
        self.count += 1
        if self.count == 1:
            self.means = [_wide(parameter.detach()).clone() for parameter in self.parameters]
            return
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            mean.lerp_(parameter.to(mean.dtype), 1.0 / self.count)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters are their means, in place; afterwards what they were, to the bit.

        Raises:
            RuntimeError: there has been no update.
        """
        if self.count == 0:
            raise RuntimeError("ParameterAverage: expected an update() before applied(), got none")
        with torch.no_grad():
            before = [parameter.detach().clone() for parameter in self.parameters]
            for parameter, mean in zip(self.parameters, self.means, strict=True):
                parameter.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the count, and the means in the parameters' order."""
        return {"count": self.count, "means": [mean.clone() for mean in self.means]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: means of other shapes than the parameters'.
        """
        shapes = [tuple(mean.shape) for mean in state["means"]]
        expected = [tuple(parameter.shape) for parameter in self.parameters] if state["count"] else []
        if shapes != expected:
            raise ValueError(f"state: expected means of shapes {expected}, got {shapes}")
        self.count = int(state["count"])
        self.means = [
            mean.to(device=parameter.device, dtype=_wide(parameter).dtype, copy=True)
            for mean, parameter in zip(state["means"], self.parameters, strict=bool(state["count"]))
        ]


def _wide(tensor: Tensor) -> Tensor:
    """16-bit values as float32: a mean over thousands of steps would stop moving."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
