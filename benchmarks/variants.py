"""Turns a :class:`~benchmarks.registry.Variant` into something that can be called and differentiated.

The only file that knows how each implementation is built. What cannot be built here says why, and the table shows it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.eager import EagerLSTM
from benchmarks.registry import Case, Mode, Variant


class Unavailable(Exception):  # noqa: N818  (an outcome, not an error)
    """This variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case: ``values (T, B, I)``, ``grad_output (T, B, D·H)``, ``reset (T, B)`` or ``None``.

    ``state``: ``h_0`` and ``c_0``, ``(L·D, B, H)`` each, where they are passed.
    """

    values: Tensor
    grad_output: Tensor
    reset: Tensor | None
    state: tuple[Tensor, Tensor] | None = None

    def double(self) -> Inputs:
        """The same numbers in float64, without resets."""
        state = None if self.state is None else (self.state[0].double(), self.state[1].double())
        return Inputs(self.values.detach().double().requires_grad_(), self.grad_output.double(), None, state)


@dataclass(frozen=True)
class Runnable:
    """A module with its inputs. Calling :meth:`run` does the work of one measurement and keeps nothing."""

    module: nn.Module
    inputs: Inputs
    takes_reset: bool
    tier: str = ""

    def output(self, **keywords: Any) -> Tensor:
        """The output sequence; records a graph if gradients are on."""
        if self.takes_reset and self.inputs.reset is not None:
            keywords["reset"] = self.inputs.reset
        state = () if self.inputs.state is None else (self.inputs.state,)
        output = self.module(self.inputs.values, *state, **keywords)[0]
        assert isinstance(output, Tensor)
        return output

    def gradients(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the input and of every parameter."""
        return torch.autograd.grad(output, [self.inputs.values, *self.module.parameters()], self.inputs.grad_output)

    def run(self, mode: Mode) -> None:
        """One inference call, or one forward and backward."""
        with forced_tier(self.tier):
            if mode == "training":
                self.gradients(self.output())
            else:
                with torch.no_grad():
                    self.output()


@contextlib.contextmanager
def forced_tier(tier: str) -> Iterator[None]:
    """Run fusedreg's CUDA kernels in ``tier`` within the block, or as they choose where it is empty.

    Raises :class:`Unavailable` where the tier cannot run what is asked of it.
    """
    if not tier:
        yield
        return
    set_tier = torch.ops.fusedreg._set_cuda_tier
    if not set_tier(tier):
        raise Unavailable(f"this version of fusedreg has no tier {tier!r}")
    try:
        yield
    except RuntimeError as error:
        # The choice of a tier says so in these words; anything else is a failure.
        if "tier: " not in str(error):
            raise
        raise Unavailable(str(error)) from error
    finally:
        set_tier("auto")


def make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Reproducible inputs of unit variance, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(case.steps, case.batch_size, case.input_size, generator=generator)
    width = case.hidden_size * case.directions
    grad_output = torch.randn(case.steps, case.batch_size, width, generator=generator)
    reset = None
    if case.reset_rate > 0.0:
        reset = (torch.rand(case.steps, case.batch_size, generator=generator) < case.reset_rate).to(device)
    state = None
    if case.initial_state:
        shape = (case.num_layers * case.directions, case.batch_size, case.hidden_size)
        hidden, cell = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        state = hidden, cell
    return Inputs(values.to(device, dtype).requires_grad_(), grad_output.to(device, dtype), reset, state)


def fusedreg_class(name: str) -> Any:
    """A public class of the package by name. Raises :class:`Unavailable` with the reason where there is none."""
    try:
        return getattr(importlib.import_module("fusedreg"), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"fusedreg.{name} cannot be imported: {error}") from error


def fusedreg_keywords(variant: Variant, case: Case) -> dict[str, Any]:
    """The keywords of ``fusedreg.LSTM`` for a variant."""
    keywords: dict[str, Any] = dict(variant.rates)
    if variant.norm == "batch":
        keywords["norm"] = fusedreg_class("BatchNorm")(max_steps=case.steps)
    elif variant.norm == "layer":
        keywords["norm"] = fusedreg_class("LayerNorm")()
    if variant.recompute:
        keywords["recompute"] = True
    return keywords


def require_backend(backend: str) -> None:
    """Raise :class:`Unavailable` with the reason unless fusedreg's ``backend`` can run here."""
    try:
        from fusedreg import backends
    except ImportError as error:
        raise Unavailable(f"fusedreg cannot be imported: {error}") from error
    if backend not in backends.BACKENDS:
        raise Unavailable(f"this version of fusedreg has no backend {backend!r}")
    available = backends.availability(backend)
    if not available:
        raise Unavailable(f"fusedreg's backend {backend!r} cannot be used here: {available.reason}")


@functools.lru_cache(maxsize=1)
def _template(input_size: int, hidden_size: int, num_layers: int, bidirectional: bool) -> nn.LSTM:
    """The weights of a case. Drawing tens of millions takes longer than copying them."""
    torch.manual_seed(1)
    return nn.LSTM(input_size, hidden_size, num_layers, bidirectional=bidirectional)


def _torchrl(case: Case) -> nn.Module:
    from benchmarks.peers import TorchRLLSTM

    try:
        return TorchRLLSTM(case.input_size, case.hidden_size, case.num_layers)
    except (ImportError, RuntimeError, TypeError) as error:
        raise Unavailable(f"TorchRL's Triton LSTM cannot be used here: {error}") from error


def make_module(variant: Variant, case: Case, *, backend: str = "auto") -> nn.Module:
    """The module of ``variant`` on the CPU in float32, with the same initial weights for every variant.

    ``backend`` is fusedreg's, and by name, so that never a fallback is timed. Raises :class:`Unavailable` where the
    variant cannot be built.
    """
    sizes = (case.input_size, case.hidden_size, case.num_layers)
    template = _template(*sizes, case.bidirectional)
    if variant.implementation == "torch":
        return copy.deepcopy(template)
    module: nn.Module
    if variant.implementation == "fusedreg":
        require_backend(backend)
        keywords = fusedreg_keywords(variant, case)
        module = fusedreg_class("LSTM")(*sizes, bidirectional=case.bidirectional, backend=backend, **keywords)
    elif variant.implementation == "torchrl":
        module = _torchrl(case)
    else:
        rates: dict[str, Any] = dict(variant.rates)
        module = EagerLSTM(
            *sizes,
            bidirectional=case.bidirectional,
            norm=variant.norm,
            max_steps=case.steps,
            compiled=variant.implementation == "compiled",
            **rates,
        )
    module.load_state_dict(template.state_dict(), strict=variant.norm is None)
    return module


def make_runnable(variant: Variant, case: Case, inputs: Inputs, mode: Mode, *, backend: str = "") -> Runnable:
    """``variant`` ready to run on the device and in the dtype of ``inputs``, in training or evaluation mode.

    ``backend``: fusedreg's where the variant does not name one, or ``""`` for the one that is named as the device.
    """
    backend = chosen_backend(variant, backend, inputs.values.device.type)
    module = make_module(variant, case, backend=backend).to(inputs.values.device, inputs.values.dtype)
    module.train(mode == "training")
    return Runnable(module, inputs, takes_reset=variant.implementation != "torch", tier=variant.tier)


def chosen_backend(variant: Variant, backend: str, device: str) -> str:
    """fusedreg's backend by name: the variant's own, the run's, or the one that is named as the device."""
    return variant.backend or backend or torch.device(device).type
