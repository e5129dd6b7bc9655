"""Back-propagation length drawn for each batch, with the learning rate scaled to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from fusedreg.training.components import non_negative


class RandomLength:
    """Draws how many steps the next piece has, so that no step of the data is always a piece's last.

    With ``L`` the length asked for: ``N(L, deviation²)`` with probability ``1 - shortened``, else
    ``N(L/2, deviation²)``, rounded towards 0 and at least ``minimum`` (Merity et al. 2018, section 5; the least length
    is their code's). A shorter piece has fewer terms in its gradient's mean, so the paper scales its learning rate by
    drawn / ``L``: :func:`scaled_learning_rate`.

    Args:
        length: L, 70 in the paper.
        deviation: of the normal distribution, 5 in the paper.
        shortened: probability of half the length, .05 in the paper.
        minimum: least length.
        generator: draws; default: torch's, on the CPU.

    Attributes:
        last: what was drawn last; the length asked for, before any.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, fusedreg
        >>> draw = fusedreg.training.RandomLength(70, generator=torch.Generator().manual_seed(1))
        >>> [draw() for _ in range(3)], draw.scale == draw.last / 70
        ([70, 80, 75], True)
    """

    def __init__(
        self,
        length: int = 70,
        *,
        deviation: float = 5.0,
        shortened: float = 0.05,
        minimum: int = 5,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in (("length", length), ("minimum", minimum)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if non_negative("shortened", shortened) > 1.0:
            raise ValueError(f"shortened: expected a probability in [0, 1], got {shortened!r}")
        self.length = length
        self.deviation = non_negative("deviation", deviation)
        self.shortened = float(shortened)
        self.minimum = minimum
        self.generator = generator
        self.last = length

    def __call__(self) -> int:
        """Draw the next length."""
        halved = float(torch.rand((), generator=self.generator)) < self.shortened
        mean = self.length / 2 if halved else float(self.length)
        drawn = mean + self.deviation * float(torch.randn((), generator=self.generator))
        self.last = max(self.minimum, int(drawn))
        return self.last

    @property
    def scale(self) -> float:
        """What the learning rate is multiplied with for the length drawn last."""
        return self.last / self.length


@contextlib.contextmanager
def scaled_learning_rate(optimizer: Optimizer, scale: float) -> Iterator[None]:
    """Within the block, every learning rate of the optimiser is ``scale`` times its own.

    Args:
        optimizer: its groups' ``lr`` are as they were afterwards, also where the block raises.
        scale: drawn length / length asked for, as the paper has it; for the last piece of a stream, which may be cut
            short, the piece's own length counts.

    Raises:
        ValueError, TypeError: ``scale`` is not a non-negative number.

    Example:
        >>> import torch, fusedreg
        >>> optimizer = torch.optim.SGD(fusedreg.LSTM(3, 4).parameters(), lr=30.0)
        >>> with fusedreg.training.scaled_learning_rate(optimizer, 35 / 70):
        ...     optimizer.param_groups[0]["lr"]
        15.0
    """
    scale = non_negative("scale", scale)
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * scale
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
