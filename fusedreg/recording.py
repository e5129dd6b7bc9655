"""How a forward lets itself be watched: what ``LSTM._recorder`` is asked, and what it is shown.

A module's ``_recorder`` is ``None``, and then nothing happens. :mod:`fusedreg.inspect` puts one there for the length of
a ``with`` block. At each call :func:`fusedreg.functional.run` asks it for a recording of that call; before each layer
the recording gives the probes whose gradients it wants, and after each layer it is shown what the layer was given and
what came of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedreg.layer import LayerOptions, LayerParameters, LayerResult, Probes, RunningStatistics
from fusedreg.packed import pack_like


class Layout(NamedTuple):
    """How the caller laid the input out, so that what is seen inside can be given back in the same way."""

    batched: bool = True
    batch_first: bool = False
    packed: PackedSequence | None = None
    packed_lengths: Tensor | None = None

    def restore(self, value: Tensor) -> Any:
        """``value (T, B, …)``, in the caller's layout."""
        if self.packed is not None and self.packed_lengths is not None:
            return pack_like(value, self.packed_lengths, self.packed)
        if not self.batched:
            return value.squeeze(1)
        return value.transpose(0, 1) if self.batch_first else value


class LayerCall(NamedTuple):
    """The arguments of one ``lstm_layer`` call, time first and batched."""

    input: Tensor
    initial_hidden: Tensor | None
    initial_cell: Tensor | None
    parameters: LayerParameters
    options: LayerOptions
    lengths: Tensor | None
    reset: Tensor | None
    seed: Tensor | None
    running: RunningStatistics | None


class Recording(Protocol):
    """One call of a module, layer by layer."""

    def probes(self, call: LayerCall) -> Probes | None:
        """What is to be differentiated in this layer besides its own arguments; ``None`` for nothing."""

    def seen(self, call: LayerCall, result: LayerResult) -> None:
        """The layer has run."""


class Recorder(Protocol):
    """What stands in ``LSTM._recorder``."""

    def begin(self, layout: Layout) -> Recording:
        """A call begins."""
