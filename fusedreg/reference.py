"""The law: one layer in one direction, as a readable loop in plain torch, differentiable to any order.

Every kernel computes what this file computes. For gate ``k`` of ``i, f, g, o``, at the step processed at ``s``::

    W̃_hh  = M_w ⊙ W_hh                                  once per call
    a^k    = (m_h^k ⊙ h_{s-1}) W̃_hh^kᵀ                   recurrent pre-activation
    r^k    = (m_x^k ⊙ x_t)    W_ih^kᵀ                    input pre-activation
    z      = N_a(a) + N_r(r) + (b_ih + b_hh)             no norm: N is the identity
    i,f,o  = σ(z_i), σ(z_f), σ(z_o);   g = tanh(z_g)
    c̃      = f ⊙ c_{s-1} + m_u ⊙ i ⊙ g                   then ⊙ m_c where cell_dropout is on
    h̃      = o ⊙ tanh(N_c(c̃))                            then · W_hrᵀ with proj_size
    c_s    = ζ_c ⊙ c_{s-1} + (1 - ζ_c) ⊙ c̃               zoneout
    h_s    = ζ_h ⊙ h_{s-1} + (1 - ζ_h) ⊙ h̃
    y_t    = m_y ⊙ h_s                                   m_y ⊙ h̃ with zoneout_output="candidate"

where ``t = s`` forward and ``t = len_b - 1 - s`` in reverse. Rows past their length keep their state and are
*selected* away, never multiplied by 0, so that padding may hold NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedreg.layer import (
    REVERSE,
    BatchStatistics,
    LayerOptions,
    LayerParameters,
    LayerResult,
    Probes,
    RunningStatistics,
    compute_dtype,
)
from fusedreg.masks import layer_masks
from fusedreg.regularization import BatchNorm, LayerNorm


def lstm_layer(
    input: Tensor,
    initial_hidden: Tensor | None,
    initial_cell: Tensor | None,
    parameters: LayerParameters,
    options: LayerOptions,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    seed: Tensor | None = None,
    running: RunningStatistics | None = None,
    probes: Probes | None = None,
    intermediates: dict[str, Tensor] | None = None,
) -> LayerResult:
    """Run one layer in one direction over a sequence.

    The gates, the cell and the statistics are float64 for float64 inputs and float32 for narrower ones; the carried
    ``h`` is rounded to the input's dtype at each step, since that is what is stored.

    Args:
        input: ``(T, B, I)``, any strides. Padding may hold anything.
        initial_hidden: ``(B, P)``, or ``None`` for zeros.
        initial_cell: ``(B, H)``, or ``None`` for zeros; may be float32 beside 16-bit inputs.
        parameters: weights, biases, gains and shifts.
        options: everything else that is not a tensor. ``recompute`` has no meaning here.
        lengths: ``(B,)`` int64, clamped to ``[0, T]``; ``None``: all rows have ``T`` steps.
        reset: ``(T, B)`` bool, by position: where true, the row's state is set to zero before that step.
        seed: 0-dimensional int64 tensor; ``None`` is enough where ``options.draws`` is false. Or ``(S, 2)`` with
            ``S`` dividing ``B``: rows of ``(seed, first_step)`` for ``S`` groups of consecutive rows, each of which
            draws as a call of its own would whose first step counts as step ``first_step``.
        running: population statistics for batch norm; ``None``: mean 0 and variance 1.
        probes: added to the carried ``h_s`` and to the cell, see :data:`fusedreg.layer.Probes`.
        intermediates: is given the ``preactivation`` ``z (T, B, 4H)``, the ``candidate_cell`` ``c̃``, and ``cell`` and
            ``hidden`` as they are carried, of every step at its position in the input, 0 in padding.

    Returns:
        A :class:`fusedreg.layer.LayerResult`, with ``final_cell`` and ``cells`` in the compute dtype.

    Example:
        >>> import torch
        >>> from fusedreg.layer import LayerOptions, LayerParameters
        >>> from fusedreg.reference import lstm_layer
        >>> parameters = LayerParameters(torch.ones(16, 3), torch.ones(16, 4))
        >>> lstm_layer(torch.ones(5, 2, 3), None, None, parameters, LayerOptions(training=False)).output.shape
        torch.Size([5, 2, 4])
    """
    with _no_autocast(input.device):
        others = (lengths, reset, seed, running, probes, intermediates)
        return _lstm_layer(input, initial_hidden, initial_cell, parameters, options, *others)


def _lstm_layer(
    input: Tensor,
    initial_hidden: Tensor | None,
    initial_cell: Tensor | None,
    parameters: LayerParameters,
    options: LayerOptions,
    lengths: Tensor | None,
    reset: Tensor | None,
    seed: Tensor | None,
    running: RunningStatistics | None,
    probes: Probes | None,
    intermediates: dict[str, Tensor] | None,
) -> LayerResult:
    steps, rows, input_size = input.shape
    storage, compute = input.dtype, compute_dtype(input.dtype)
    parameters = LayerParameters._make(None if value is None else value.to(compute) for value in parameters)
    hidden_size, output_size = parameters.weight_ih.shape[0] // 4, parameters.weight_hh.shape[1]
    order = _Order(steps, rows, lengths, options.direction == REVERSE, input.device)
    masks = layer_masks(
        seed,
        options,
        steps=steps,
        rows=rows,
        input_size=input_size,
        hidden_size=hidden_size,
        output_size=output_size,
    )
    norms = _Norms(options, parameters, order, running)

    # Before the loop: the input's term of every step, W̃_hh, and what is read step by step.
    x = order.select(order.reorder(input)).to(compute)
    x_gates = norms.input(_product(x, parameters.weight_ih, masks.input_dropout, options.input_dropout))
    for bias in (parameters.bias_ih, parameters.bias_hh):
        x_gates = x_gates if bias is None else x_gates + bias
    weight_hh = _dropped(parameters.weight_hh, masks.weight_dropout, options.weight_dropout)
    zoneout_hidden = _zoneout(order, masks.zoneout_hidden, options.zoneout_hidden)
    zoneout_cell = _zoneout(order, masks.zoneout_cell, options.zoneout_cell)
    update_masks = masks.update_dropout
    if update_masks is not None:
        per_step = options.update_mask == "step"
        update_masks = order.reorder(update_masks) if per_step else update_masks.expand(steps, -1, -1)
    if reset is not None:
        reset = order.reorder(reset)
    hidden_probe, cell_probe = (
        None if probe is None else order.select(order.reorder(probe)).to(compute) for probe in probes or (None, None)
    )

    hidden = input.new_zeros(rows, output_size, dtype=compute) if initial_hidden is None else initial_hidden.to(compute)
    cell = input.new_zeros(rows, hidden_size, dtype=compute) if initial_cell is None else initial_cell.to(compute)
    outputs, cells, seen = [], [], []
    for s in range(steps):
        previous_hidden, previous_cell = hidden, cell
        if reset is not None:
            previous_hidden = torch.where(reset[s].unsqueeze(-1), 0.0, previous_hidden)
            previous_cell = torch.where(reset[s].unsqueeze(-1), 0.0, previous_cell)

        a = _product(previous_hidden, weight_hh, masks.hidden_dropout, options.hidden_dropout)
        z = norms.recurrent(a, s) + x_gates[s]
        z_i, z_f, z_g, z_o = z.chunk(4, dim=-1)
        update = torch.sigmoid(z_i) * torch.tanh(z_g)
        if update_masks is not None:
            update = _dropped(update, update_masks[s], options.update_dropout)
        candidate_cell = torch.sigmoid(z_f) * previous_cell + update
        if options.cell_dropout > 0.0:  # not inverted: a scale would compound over the steps
            kept = 1.0 - options.cell_dropout if masks.cell_dropout is None else (~masks.cell_dropout).to(compute)
            candidate_cell = candidate_cell * kept
        read_cell = candidate_cell if cell_probe is None else candidate_cell + cell_probe[s]
        candidate = torch.sigmoid(z_o) * torch.tanh(norms.cell(read_cell, s))
        if parameters.weight_hr is not None:
            candidate = candidate @ parameters.weight_hr.t()

        new_cell = zoneout_cell(previous_cell, candidate_cell, s)
        new_cell = new_cell if cell_probe is None else new_cell + cell_probe[s]
        new_hidden = zoneout_hidden(previous_hidden, candidate, s)
        new_hidden = _rounded(new_hidden if hidden_probe is None else new_hidden + hidden_probe[s], storage)
        outputs.append(candidate if options.zoneout_output == "candidate" else new_hidden)
        hidden, cell = order.keep(new_hidden, hidden, s), order.keep(new_cell, cell, s)
        cells.append(cell)
        if intermediates is not None:
            seen.append((z, candidate_cell, cell, hidden))

    # After the loop: y, back at its position in the input, with 0 in padding.
    output = _dropped(torch.stack(outputs), masks.output_dropout, options.output_dropout)
    output = order.reorder(order.select(output))
    output = _dropped(output, masks.dropout, options.dropout).to(storage)
    if intermediates is not None:
        names = ("preactivation", "candidate_cell", "cell", "hidden")
        for name, values in zip(names, zip(*seen, strict=True), strict=True):
            intermediates[name] = order.reorder(order.select(torch.stack(values)))
    every_cell = order.reorder(order.select(torch.stack(cells))) if options.return_cells else None
    return LayerResult(output, hidden.to(storage), cell, every_cell, norms.statistics())


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The arithmetic's types are this file's business: a surrounding autocast must not narrow its products."""
    # Asked so because torch 2.11's compiler cannot trace torch.amp.is_autocast_available, and a meta device has none.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _dropped(value: Tensor, dropped: Tensor | None, rate: float) -> Tensor:
    """Inverted dropout: 0 where dropped, the rest scaled by 1/(1-rate); no mask, no change."""
    if dropped is None:
        return value
    return value * ((~dropped).to(value.dtype) * (1.0 / (1.0 - rate)))


def _product(value: Tensor, weight: Tensor, dropped: Tensor | None, rate: float) -> Tensor:
    """``(m ⊙ value) Wᵀ`` of ``value (…, B, N)``, ``weight (4H, N)``, and ``m (B, N)``, or untied ``(B, 4, N)``."""
    if dropped is None or dropped.dim() == 2:
        return _dropped(value, dropped, rate) @ weight.t()
    gates = [_dropped(value, dropped[:, k], rate) @ rows.t() for k, rows in enumerate(weight.chunk(4))]
    return torch.cat(gates, dim=-1)


def _rounded(value: Tensor, storage: torch.dtype) -> Tensor:
    """``value`` rounded to the storage dtype. Its gradient is not rounded: that is carried in the compute dtype."""
    if value.dtype == storage:
        return value
    return value + (value.to(storage).to(value.dtype) - value).detach()


def _zoneout(order: _Order, zoned: Tensor | None, rate: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    """How step ``s`` mixes the previous state with the candidate: by mask in training, by expectation otherwise."""
    if zoned is not None:
        zoned = order.reorder(zoned)
        return lambda previous, candidate, s: torch.where(zoned[s], previous, candidate)
    if rate > 0.0:
        return lambda previous, candidate, s: rate * previous + (1.0 - rate) * candidate
    return lambda previous, candidate, s: candidate


class _Order:
    """Which rows take part in the step processed at ``s``, and where in the input that step stands.

    ``valid (T, B)``, in processed order, is ``None`` where every row has every step.
    """

    def __init__(self, steps: int, rows: int, lengths: Tensor | None, reverse: bool, device: torch.device) -> None:
        self.steps, self.rows, self._reverse = steps, rows, reverse
        self.valid: Tensor | None = None
        self._position: Tensor | None = None
        if lengths is not None:
            lengths = lengths.clamp(0, steps)
            s = torch.arange(steps, device=device).unsqueeze(1)
            self.valid = s < lengths
            if reverse:
                # Padding stays where it is, which makes the reordering its own inverse.
                self._position = torch.where(self.valid, lengths - 1 - s, s)

    def reorder(self, value: Tensor) -> Tensor:
        """``(T, B, …)`` by position into processed order, or back again."""
        if not self._reverse:
            return value
        if self._position is None:
            return value.flip(0)
        position = self._position if value.dim() == 2 else self._position.unsqueeze(-1).expand_as(value)
        return value.gather(0, position)

    def select(self, value: Tensor) -> Tensor:
        """``(T, B, N)`` in processed order, with 0 in place of whatever padding held."""
        return value if self.valid is None else torch.where(self.valid.unsqueeze(-1), value, 0.0)

    def keep(self, new: Tensor, old: Tensor, s: int) -> Tensor:
        """The new state of rows that take part in step ``s``, the old one of those that are past their length."""
        return new if self.valid is None else torch.where(self.valid[s].unsqueeze(-1), new, old)


class _Norms:
    """``N_r``, ``N_a`` and ``N_c``: each the identity, layer norm or batch norm; and the statistics that they used."""

    def __init__(
        self, options: LayerOptions, parameters: LayerParameters, order: _Order, running: RunningStatistics | None
    ) -> None:
        norm, self._records = options.norm, options.training and isinstance(options.norm, BatchNorm)
        terms: list[_Term | None] = []
        for name in ("input", "recurrent", "cell"):
            weight = getattr(parameters, f"norm_{name}_weight")
            bias = getattr(parameters, f"norm_{name}_bias")
            if norm is None or not getattr(norm, name):
                terms.append(None)
            elif isinstance(norm, LayerNorm):
                terms.append(_LayerNormTerm(norm, weight, bias))
            else:
                population = _population(running, name, weight, order.steps)
                terms.append(_BatchNormTerm(norm, weight, bias, order, population, options.training))
        self._input, self._recurrent, self._cell = terms
        self._pooled = isinstance(norm, BatchNorm) and norm.input_statistics == "sequence" and options.training

    def input(self, r: Tensor) -> Tensor:
        """``N_r`` of every step at once: ``r (T, B, 4H)`` in processed order."""
        if isinstance(self._input, _BatchNormTerm) and self._pooled:
            return self._input.pooled(r)
        return r if self._input is None else self._input(r, slice(None))

    def recurrent(self, a: Tensor, s: int) -> Tensor:
        return a if self._recurrent is None else self._recurrent(a, s)

    def cell(self, candidate_cell: Tensor, s: int) -> Tensor:
        return candidate_cell if self._cell is None else self._cell(candidate_cell, s)

    def statistics(self) -> BatchStatistics | None:
        """What each step was normalised with, in training with a batch norm."""
        if not self._records:
            return None
        terms = (self._input, self._recurrent, self._cell)
        return BatchStatistics(*(torch.cat(term.used) if isinstance(term, _BatchNormTerm) else None for term in terms))


class _LayerNormTerm:
    """Over the last axis: all four gates at once, or the cell (Ba et al. 2016)."""

    def __init__(self, norm: LayerNorm, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias, self._eps = weight, bias, norm.eps

    def __call__(self, value: Tensor, s: int | slice) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred * torch.rsqrt(variance + self._eps) * self._weight + self._bias


class _BatchNormTerm:
    """Over the valid rows of each step in training, with the population's statistics in evaluation.

    A step with one valid row has no variance of its own: it takes the population's, as constants.
    """

    def __init__(
        self,
        norm: BatchNorm,
        weight: Tensor,
        bias: Tensor | None,
        order: _Order,
        population: tuple[Tensor, Tensor],
        training: bool,
    ) -> None:
        self.used: list[Tensor] = []  # (steps, 2, N) pieces: mean and biased variance
        self._weight, self._bias, self._eps, self._group = weight, bias, norm.eps, norm.process_group
        self._mean, self._var = population
        self._training = training
        everyone = torch.ones(order.steps, order.rows, dtype=torch.bool, device=weight.device)
        self._valid = everyone if order.valid is None else order.valid
        self._counts = self._valid.sum(1)
        if training and self._group is not None:
            self._counts = sum_over_ranks(self._counts, self._group)

    def __call__(self, value: Tensor, s: int | slice) -> Tensor:
        """Normalise ``(B, N)`` at step ``s``, or ``(T, B, N)`` at all steps."""
        mean, var = self._mean[s], self._var[s]
        if self._training:
            mean, var = self._batch(value, self._valid[s], self._counts[s], mean, var)
        return self._scaled(value, mean, var)

    def pooled(self, values: Tensor) -> Tensor:
        """Normalise ``(T, B, N)`` with the statistics of all valid steps and rows together."""
        population = self._mean[0], self._var[0]
        mean, var = self._batch(values.flatten(0, 1), self._valid.flatten(), self._counts.sum(), *population)
        return self._scaled(values, mean, var)

    def _batch(
        self, value: Tensor, valid: Tensor, count: Tensor, population_mean: Tensor, population_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        valid, count = valid.unsqueeze(-1), count.unsqueeze(-1)
        mean = self._sum(torch.where(valid, value, 0.0)) / count.clamp(min=1)
        centred = torch.where(valid, value - mean.unsqueeze(-2), 0.0)
        var = self._sum(centred * centred) / count.clamp(min=1)
        mean = torch.where(count >= 2, mean, population_mean)
        var = torch.where(count >= 2, var, population_var)
        used = torch.where((count >= 1).unsqueeze(-1), torch.stack((mean, var), dim=-2), 0.0)
        self.used.append(used.detach().reshape(-1, 2, value.shape[-1]))
        return mean, var

    def _sum(self, value: Tensor) -> Tensor:
        total = value.sum(-2)
        return total if self._group is None else sum_over_ranks(total, self._group)

    def _scaled(self, value: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        normalized = (value - mean.unsqueeze(-2)) * torch.rsqrt(var + self._eps).unsqueeze(-2) * self._weight
        return normalized if self._bias is None else normalized + self._bias


_Term = _LayerNormTerm | _BatchNormTerm


def _population(running: RunningStatistics | None, name: str, like: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The population's mean and variance at each step, ``(T, N)``: constants, 0 and 1 where nothing was counted."""
    if running is None:
        size = like.shape[0]
        return like.new_zeros(()).expand(steps, size), like.new_ones(()).expand(steps, size)
    index = running.input_index if name == "input" else running.index
    known, row = (index >= 0).unsqueeze(1), index.clamp(min=0)
    mean = getattr(running, f"{name}_mean").detach().to(like.dtype)[row]
    var = getattr(running, f"{name}_var").detach().to(like.dtype)[row]
    return torch.where(known, mean, 0.0), torch.where(known, var, 1.0)


class _SumOverRanks(torch.autograd.Function):
    """``all_reduce`` as a differentiable sum: every rank's result depends on every rank's value."""

    @staticmethod
    def forward(value: Tensor, group: Any) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None


def sum_over_ranks(value: Tensor, group: Any) -> Tensor:
    """The sum of ``value`` over the ranks of a ``torch.distributed`` group, differentiable to any order."""
    apply: Callable[..., Tensor] = _SumOverRanks.apply
    return apply(value, group)
