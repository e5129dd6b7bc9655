"""Watchers of LSTMs: put on for a ``with`` block, several at a time, and taken off as they were put on.

A watcher changes nothing in what a module computes. It cannot watch what is compiled or transformed, and says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fusedreg import functional
from fusedreg.layer import LayerResult, Probes, compute_dtype
from fusedreg.modules import LSTM
from fusedreg.parameters import Architecture, grouped
from fusedreg.recording import LayerCall, Layout, Recording
from fusedreg.regularization import Regularization

if TYPE_CHECKING:
    from typing_extensions import Self

# Told of the gradient that reached a probe: "hidden" or "cell", and (T, B, ·) by position in the input.
GradientListener = Callable[[str, Tensor], None]


class Watch(Protocol):
    """What a watcher makes of one call of a module. ``differentiates``: whether it listens to gradients."""

    differentiates: bool

    def gradient_listener(self, call: LayerCall) -> GradientListener:
        """Whom to tell the gradients of a layer that is about to run."""

    def seen(self, call: LayerCall, result: LayerResult) -> None:
        """A layer has run."""


class Watcher:
    """A context manager that watches some modules' calls. Derived classes say what a call becomes: :meth:`_watch`.

    Args:
        modules: by name. What an ``nn.LSTM`` computes is computed once more after its call, step by step, to be seen.
    """

    def __init__(self, modules: dict[str, LSTM | nn.LSTM]) -> None:
        self._modules = modules
        self._undo: list[Callable[[], None]] = []

    def _watch(self, name: str, layout: Layout) -> Watch:
        """A call of the module of that name begins."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self._undo:
            raise RuntimeError(f"{type(self).__name__}: expected to be entered once at a time; it is active already")
        for name, module in self._modules.items():
            if isinstance(module, LSTM):
                self._undo.append(_put_on(module, self, name))
            else:
                recorders = _Recorders([(self, name)])
                hook = module.register_forward_hook(functools.partial(_replay, recorders), with_kwargs=True)
                self._undo.append(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        while self._undo:
            self._undo.pop()()


def _put_on(module: LSTM, watcher: Watcher, name: str) -> Callable[[], None]:
    """Watch a module, beside those who watch it already; gives what takes the watcher off again."""
    recorders = module._recorder
    if not isinstance(recorders, _Recorders):
        recorders = module._recorder = _Recorders([])
    entry = (watcher, name)
    recorders.watchers.append(entry)

    def take_off() -> None:
        recorders.watchers.remove(entry)
        if not recorders.watchers:
            del module._recorder  # the class's own None shows again

    return take_off


def _replay(recorders: _Recorders, module: nn.LSTM, arguments: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
    """Show an ``nn.LSTM``'s call to its watchers: the same numbers, by the reference."""
    if module.training and module.dropout > 0 and module.num_layers > 1:
        raise RuntimeError(
            f"fusedreg.inspect: expected an nn.LSTM whose masks can be known, got dropout={module.dropout} in "
            "training, with masks that are drawn where nobody sees them; call module.eval() first, or replace the "
            "module by fusedreg.replace_lstms(model), whose masks are known"
        )
    architecture = Architecture(
        module.input_size, module.hidden_size, module.num_layers, module.bias, module.bidirectional, module.proj_size
    )
    plan = functional.make_plan(architecture, Regularization(), training=False, batch_first=module.batch_first)
    parameters = {name: getattr(module, name) for name in module._flat_weights_names}
    input, hx = (*arguments, named.get("hx"))[:2] if arguments else (named["input"], named.get("hx"))
    with torch.no_grad():
        functional.run(
            plan, input, hx, grouped(architecture, parameters), None, None, None, None, None, "reference", recorders
        )


class _Recorders:
    """The watchers of one module: what stands in its ``_recorder``."""

    def __init__(self, watchers: list[tuple[Watcher, str]]) -> None:
        self.watchers = watchers

    def begin(self, layout: Layout) -> Recording:
        names = ", ".join(type(watcher).__name__ for watcher, _ in self.watchers)
        remedy = f"call the plain module inside the block, and leave the block ({names}) for this"
        if torch.compiler.is_compiling():
            raise RuntimeError(f"fusedreg.inspect: expected a call in eager mode, got one that is compiled; {remedy}")
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"fusedreg.inspect: expected a plain call, got one under a torch.func transform, whose tensors mean "
                f"nothing outside of it; {remedy}"
            )
        return _Recording([watcher._watch(name, layout) for watcher, name in self.watchers])

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a watched module is not watched."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Recording:
    """One call of one module, for all of its watchers."""

    def __init__(self, watches: list[Watch]) -> None:
        self._watches = watches
        self._listening = [watch for watch in watches if watch.differentiates] if torch.is_grad_enabled() else []

    def probes(self, call: LayerCall) -> Probes | None:
        """Zeros that take no memory, with a hook that hands their gradients on."""
        if not self._listening:
            return None
        listeners = [watch.gradient_listener(call) for watch in self._listening]
        steps, rows = call.input.shape[:2]
        hidden_size, output_size = call.parameters.weight_ih.shape[0] // 4, call.parameters.weight_hh.shape[1]
        dtype = call.input.dtype
        made = []
        for state, size, own in (("hidden", output_size, dtype), ("cell", hidden_size, compute_dtype(dtype))):
            probe = torch.zeros((), dtype=own, device=call.input.device).expand(steps, rows, size).requires_grad_()
            probe.register_post_accumulate_grad_hook(_hand_over(state, listeners))
            made.append(probe)
        return made[0], made[1]

    def seen(self, call: LayerCall, result: LayerResult) -> None:
        for watch in self._watches:
            watch.seen(call, result)


def _hand_over(state: str, listeners: list[GradientListener]) -> Callable[[Tensor], None]:
    """A hook that takes what a backward left at a probe: the tensor itself, so that it is neither copied nor kept."""

    def hook(probe: Tensor) -> None:
        gradient, probe.grad = probe.grad, None
        if gradient is not None:
            for listener in listeners:
                listener(state, gradient.detach())

    return hook
