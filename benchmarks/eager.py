"""The eager baseline: an LSTM loop in plain torch operators with the same regularisers, written to be fast.

It is what a careful user writes today, not the specification (that is ``fusedreg/reference.py``): the input
product is hoisted out of the loop, masks come from ``torch.rand`` for all steps at once, a step takes as few
operators as torch allows, and no list is indexed where ``unbind`` gives a cheaper backward.

Parameters carry ``torch.nn.LSTM``'s names, so a ``state_dict`` of one loads into the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, Tensor]
MOMENTUM, EPSILON, INITIAL_GAIN = 0.1, 1e-5, 0.1


class StepConstants(NamedTuple):
    """What every step of one layer and direction shares. ``weight_hh`` is transposed: ``(H, 4H)``."""

    weight_hh: Tensor
    hidden_mask: Tensor | None
    zoneout_hidden: float
    zoneout_cell: float
    training: bool
    norm: Literal["batch", "layer"] | None
    recurrent_weight: Tensor | None
    recurrent_bias: Tensor | None
    cell_weight: Tensor | None
    cell_bias: Tensor | None


class StepInputs(NamedTuple):
    """What one step has of its own: its input gates, masks, resets and rows of the running statistics."""

    gates: Tensor
    zone_hidden: Tensor | None
    zone_cell: Tensor | None
    keep: Tensor | None
    recurrent_statistics: State | None
    cell_statistics: State | None


def _normalize(
    values: Tensor, constants: StepConstants, weight: Tensor | None, bias: Tensor | None, statistics: State | None
) -> Tensor:
    """Batch or layer norm of one step's ``(B, width)`` values."""
    if constants.norm == "layer":
        return functional.layer_norm(values, values.shape[-1:], weight, bias, EPSILON)
    mean, variance = statistics if statistics is not None else (None, None)
    return functional.batch_norm(values, mean, variance, weight, bias, constants.training, MOMENTUM, EPSILON)


def _zone(rate: float, mask: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """Zoneout: the old value where the mask says so, or the expectation in evaluation."""
    if mask is not None:
        return torch.where(mask, old, new)
    return torch.lerp(new, old, rate) if rate > 0.0 else new


def step(inputs: StepInputs, hidden: Tensor, cell: Tensor, constants: StepConstants) -> State:
    """One step of the recurrence: ``(B, H)`` states in, ``(B, H)`` states out."""
    if inputs.keep is not None:
        hidden, cell = hidden * inputs.keep, cell * inputs.keep
    dropped = hidden if constants.hidden_mask is None else hidden * constants.hidden_mask
    if constants.norm is None:
        gates = torch.addmm(inputs.gates, dropped, constants.weight_hh)
    else:
        recurrent = dropped @ constants.weight_hh
        gates = inputs.gates + _normalize(
            recurrent, constants, constants.recurrent_weight, constants.recurrent_bias, inputs.recurrent_statistics
        )
    size = cell.shape[1]
    # i and f are neighbours: one sigmoid for both.
    input_gate, forget_gate = gates[:, : 2 * size].sigmoid().chunk(2, 1)
    candidate, output_gate = gates[:, 2 * size : 3 * size].tanh(), gates[:, 3 * size :].sigmoid()
    new_cell = torch.addcmul(forget_gate * cell, input_gate, candidate)
    shown = new_cell
    if constants.norm is not None:
        shown = _normalize(new_cell, constants, constants.cell_weight, constants.cell_bias, inputs.cell_statistics)
    new_hidden = output_gate * shown.tanh()
    return (
        _zone(constants.zoneout_hidden, inputs.zone_hidden, hidden, new_hidden),
        _zone(constants.zoneout_cell, inputs.zone_cell, cell, new_cell),
    )


def _dropout_mask(rate: float, *shape: int, like: Tensor) -> Tensor:
    """Zeros with probability ``rate``, else ``1 / (1 - rate)``."""
    return (torch.rand(shape, device=like.device) >= rate).to(like.dtype).mul_(1.0 / (1.0 - rate))


class EagerLSTM(nn.Module):
    """An LSTM of ``num_layers`` layers as a Python loop, time first, without projection or ragged batches.

    Rates are probabilities of dropping; ``norm="batch"`` keeps statistics for each of ``max_steps`` steps, and
    ``norm="layer"`` is Ba et al.'s. ``compiled=True`` compiles the step with ``torch.compile``.

    >>> lstm = EagerLSTM(5, 8, zoneout_cell=0.5, hidden_dropout=0.2)
    >>> output, (hidden, cell) = lstm(torch.randn(7, 3, 5))
    >>> output.shape
    torch.Size([7, 3, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout_hidden: float = 0.0,
        zoneout_cell: float = 0.0,
        norm: Literal["batch", "layer"] | None = None,
        max_steps: int = 0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bidirectional, self.norm, self.max_steps = bidirectional, norm, max_steps
        self.dropout, self.input_dropout, self.hidden_dropout = dropout, input_dropout, hidden_dropout
        self.output_dropout, self.weight_dropout = output_dropout, weight_dropout
        self.zoneout_hidden, self.zoneout_cell = zoneout_hidden, zoneout_cell
        self._step: Callable[[StepInputs, Tensor, Tensor, StepConstants], State] = (
            torch.compile(step) if compiled else step
        )
        bound = 1.0 / math.sqrt(hidden_size)
        for layer in range(num_layers):
            features = input_size if layer == 0 else hidden_size * (2 if bidirectional else 1)
            for suffix in self._suffixes(layer):
                shapes: dict[str, tuple[int, ...]] = {
                    "weight_ih": (4 * hidden_size, features),
                    "weight_hh": (4 * hidden_size, hidden_size),
                    "bias_ih": (4 * hidden_size,),
                    "bias_hh": (4 * hidden_size,),
                }
                for name, shape in shapes.items():
                    self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))
                self._add_norm(suffix)

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def _add_norm(self, suffix: str) -> None:
        if self.norm is None:
            return
        for site, width in (("input", 4), ("recurrent", 4), ("cell", 1)):
            width *= self.hidden_size
            gain = INITIAL_GAIN if self.norm == "batch" else 1.0
            self.register_parameter(f"norm_{site}_weight{suffix}", nn.Parameter(torch.full((width,), gain)))
            if self.norm == "layer" or site == "cell":
                self.register_parameter(f"norm_{site}_bias{suffix}", nn.Parameter(torch.zeros(width)))
            if self.norm == "batch":
                self.register_buffer(f"running_{site}_mean{suffix}", torch.zeros(self.max_steps, width))
                self.register_buffer(f"running_{site}_var{suffix}", torch.ones(self.max_steps, width))

    def _get(self, name: str) -> Tensor | None:
        value = getattr(self, name, None)
        return value if isinstance(value, Tensor) else None

    def _need(self, name: str) -> Tensor:
        value = getattr(self, name)
        assert isinstance(value, Tensor)
        return value

    def forward(self, input: Tensor, hx: State | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """``input (T, B, I)``, states ``(L·D, B, H)``, ``reset (T, B)`` bool → ``(T, B, D·H)`` and the last states."""
        directions = 2 if self.bidirectional else 1
        batch = input.shape[1]
        hiddens: list[Tensor] = []
        cells: list[Tensor] = []
        values = input
        for layer in range(self.num_layers):
            outputs = []
            for direction, suffix in enumerate(self._suffixes(layer)):
                if hx is None:
                    state = (input.new_zeros(batch, self.hidden_size), input.new_zeros(batch, self.hidden_size))
                else:
                    state = (hx[0][layer * directions + direction], hx[1][layer * directions + direction])
                output, (hidden, cell) = self._direction(values, state, suffix, direction == 1, reset)
                outputs.append(output)
                hiddens.append(hidden)
                cells.append(cell)
            values = outputs[0] if directions == 1 else torch.cat(outputs, 2)
            if self.training and self.dropout > 0.0 and layer < self.num_layers - 1:
                values = values * _dropout_mask(self.dropout, *values.shape, like=values)
        return values, (torch.stack(hiddens), torch.stack(cells))

    def _input_gates(self, values: Tensor, suffix: str) -> Tensor:
        """The hoisted input product with both biases, normalised where a norm is on: ``(T, B, 4H)``."""
        bias = self._need("bias_ih" + suffix) + self._need("bias_hh" + suffix)
        weight = self._need("weight_ih" + suffix)
        if self.norm is None:
            return functional.linear(values, weight, bias)
        product = functional.linear(values, weight)
        gain, shift = self._need("norm_input_weight" + suffix), self._get("norm_input_bias" + suffix)
        if self.norm == "layer":
            return functional.layer_norm(product, gain.shape, gain, shift, EPSILON) + bias
        steps, rows = product.shape[:2]
        mean, variance = self._need("running_input_mean" + suffix), self._need("running_input_var" + suffix)
        if not self.training:
            scale = gain * torch.rsqrt(variance[:steps].unsqueeze(1) + EPSILON)
            return torch.addcmul(bias, product - mean[:steps].unsqueeze(1), scale)
        batch_variance, batch_mean = torch.var_mean(product, 1, correction=0, keepdim=True)
        with torch.no_grad():
            mean[:steps].lerp_(batch_mean.squeeze(1), MOMENTUM)
            variance[:steps].lerp_(batch_variance.squeeze(1) * (rows / max(rows - 1, 1)), MOMENTUM)
        return torch.addcmul(bias, product - batch_mean, gain * torch.rsqrt(batch_variance + EPSILON))

    def _statistics(self, site: str, suffix: str, steps: int) -> list[State | None]:
        if self.norm != "batch":
            return [None] * steps
        mean, variance = self._need(f"running_{site}_mean{suffix}"), self._need(f"running_{site}_var{suffix}")
        return list(zip(mean[:steps].unbind(0), variance[:steps].unbind(0), strict=True))

    def _zone_masks(self, rate: float, like: Tensor, steps: int) -> list[Tensor] | list[None]:
        if not self.training or rate <= 0.0:
            return [None] * steps
        return list((torch.rand((steps, *like.shape), device=like.device) < rate).unbind(0))

    def _direction(
        self, values: Tensor, state: State, suffix: str, reverse: bool, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        """One layer in one direction over the whole sequence."""
        steps, rows, features = values.shape
        hidden, cell = state
        active = self.training
        if active and self.input_dropout > 0.0:
            values = values * _dropout_mask(self.input_dropout, rows, features, like=values)
        if reverse:
            values = values.flip(0)
        weight_hh = self._need("weight_hh" + suffix)
        if active and self.weight_dropout > 0.0:
            weight_hh = weight_hh * _dropout_mask(self.weight_dropout, *weight_hh.shape, like=weight_hh)
        hidden_mask = None
        if active and self.hidden_dropout > 0.0:
            hidden_mask = _dropout_mask(self.hidden_dropout, rows, self.hidden_size, like=hidden)
        constants = StepConstants(
            weight_hh.t(),
            hidden_mask,
            self.zoneout_hidden,
            self.zoneout_cell,
            active,
            self.norm,
            self._get("norm_recurrent_weight" + suffix),
            self._get("norm_recurrent_bias" + suffix),
            self._get("norm_cell_weight" + suffix),
            self._get("norm_cell_bias" + suffix),
        )
        keeps: list[Tensor] | list[None] = [None] * steps
        if reset is not None:
            keeps = list((~reset).to(values.dtype).unsqueeze(2).unbind(0))
        per_step = zip(
            self._input_gates(values, suffix).unbind(0),
            self._zone_masks(self.zoneout_hidden, hidden, steps),
            self._zone_masks(self.zoneout_cell, cell, steps),
            keeps,
            self._statistics("recurrent", suffix, steps),
            self._statistics("cell", suffix, steps),
            strict=True,
        )
        outputs = []
        for items in per_step:
            hidden, cell = self._step(StepInputs(*items), hidden, cell, constants)
            outputs.append(hidden)
        output = torch.stack(outputs)
        if reverse:
            output = output.flip(0)
        if active and self.output_dropout > 0.0:
            output = output * _dropout_mask(self.output_dropout, rows, self.hidden_size, like=output)
        return output, (hidden, cell)
