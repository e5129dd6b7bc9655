"""Second derivatives and the compiler: every way of asking gives the right numbers or a clear error, never wrong ones.

Through a region that is compiled torch has none. Inside of one, where all of it is traced, and with compiled autograd
around eager code, they are there. (By torch.func inside of one: tests/test_compile.py.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from helpers import compiled
from torch import Tensor

import fusedreg

pytestmark = [compiled, pytest.mark.compile, pytest.mark.usefixtures("fresh_compiler")]

Gradients = Sequence[Tensor]
INPUT = torch.linspace(-1, 1, 12).view(2, 2, 3)


class Critic:
    """A model, and the gradients of a penalty on the norm of its own gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = fusedreg.LSTM(3, 2)  # masks would make the graphs larger, and none of it different
        self.parameters = list(self.module.parameters())

    def __call__(self, input: Tensor) -> Tensor:
        output: Tensor = self.module(input.sin()).output.exp()
        return output

    def penalty(self, input: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        (gradient,) = torch.autograd.grad((call or self)(input).square().sum(), input, create_graph=True)
        return gradient.square().sum()

    def of_penalty(self, input: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Gradients:
        return torch.autograd.grad(self.penalty(input, call), self.parameters)


def whole(function: Any, *, fullgraph: bool = True) -> Any:
    return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)


@contextlib.contextmanager
def traced_autograd() -> Iterator[None]:
    """What lets ``torch.autograd.grad`` into a graph."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("not run: needs a torch that traces torch.autograd.grad")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def compiled_autograd() -> Any:
    from torch._dynamo import compiled_autograd

    return compiled_autograd._enable(torch.compile(backend="aot_eager"))


def through_a_region(critic: Critic, input: Tensor) -> Gradients:
    return critic.of_penalty(input, whole(critic))


def across_graph_breaks(critic: Critic, input: Tensor) -> Gradients:
    return torch.autograd.grad(whole(critic.penalty, fullgraph=False)(input), critic.parameters)


def inside_untraced(critic: Critic, input: Tensor) -> Gradients:
    gradients: Gradients = whole(critic.of_penalty)(input)
    return gradients


def both_inside(critic: Critic, input: Tensor) -> Gradients:
    with traced_autograd():
        gradients: Gradients = whole(critic.of_penalty)(input)
    return gradients


def compiled_autograd_first(critic: Critic, input: Tensor) -> Gradients:
    with compiled_autograd():
        penalty = critic.penalty(input)
    return torch.autograd.grad(penalty, critic.parameters)


def compiled_autograd_second(critic: Critic, input: Tensor) -> Gradients:
    penalty = critic.penalty(input)
    with compiled_autograd():
        return torch.autograd.grad(penalty, critic.parameters)


def compiled_autograd_through_a_region(critic: Critic, input: Tensor) -> Gradients:
    with compiled_autograd():
        penalty = critic.penalty(input, whole(critic))
    return torch.autograd.grad(penalty, critic.parameters)


@pytest.mark.parametrize("way", [both_inside, compiled_autograd_first, compiled_autograd_second])
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_they_are_right(way: Callable[[Critic, Tensor], Gradients]) -> None:
    expected = Critic().of_penalty(INPUT.clone().requires_grad_())
    found = way(Critic(), INPUT.clone().requires_grad_())
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (through_a_region, "does not currently support double backward"),
        (across_graph_breaks, "does not currently support double backward"),
        (inside_untraced, r"torch.autograd.grad"),
        (compiled_autograd_through_a_region, "does not currently support higher order gradients"),
    ],
)
def test_they_are_refused(way: Callable[[Critic, Tensor], Gradients], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        way(Critic(), INPUT.clone().requires_grad_())


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    """``retain_graph`` needs the buffers that the compiler would give away."""
    critic, input = Critic(), INPUT.clone().requires_grad_()
    expected = torch.autograd.grad(critic(input).square().sum(), critic.parameters)
    with torch._functorch.config.patch(donated_buffer=False):
        total = whole(critic)(input).square().sum()
        for keep in (True, False):
            found = torch.autograd.grad(total, critic.parameters, retain_graph=keep)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
