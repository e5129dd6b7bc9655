"""The population statistics of recurrent batch norm: the buffers, how a call reads them, how it updates them.

Every buffer is stored in rows, ``(R, ·)``: one row a step with ``statistics="per_step"`` (``R = max_steps``), one for
all with ``"shared"``, and one for the input's term with ``input_statistics="sequence"``. ``num_batches_tracked (R,)``
counts the updates of each row; a row that was never updated is not read.

A training call updates row ``s`` where step ``s`` had at least two rows of the batch, with
:class:`torch.nn.BatchNorm1d`'s momentum and its unbiased variance. Cooijmans et al. 2017 (arXiv:1603.09025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusedreg.layer import BatchStatistics, LayerOptions, RunningStatistics, compute_dtype
from fusedreg.parameters import SITES, Architecture, suffix
from fusedreg.reference import sum_over_ranks
from fusedreg.regularization import BatchNorm

COUNT = "num_batches_tracked"


def buffer_shapes(norm: BatchNorm, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name, without the layer's suffix, to shape: the buffers of one layer and direction, in order."""
    steps = norm.max_steps or 1
    shapes: dict[str, tuple[int, ...]] = {}
    for term in SITES:
        if getattr(norm, term):
            rows = 1 if term == "input" and norm.input_statistics == "sequence" else steps
            size = hidden_size if term == "cell" else 4 * hidden_size
            shapes[f"running_{term}_mean"] = shapes[f"running_{term}_var"] = (rows, size)
    shapes[COUNT] = (steps,)
    return shapes


def initial_buffers(
    architecture: Architecture, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The buffers of a whole module by full name: means 0, variances 1, counts 0. Empty without a batch norm.

    Args:
        architecture: sizes and norm.
        device, dtype: of the means and variances; counts are int64.
    """
    buffers: dict[str, Tensor] = {}
    if not isinstance(architecture.norm, BatchNorm):
        return buffers
    for layer, direction in architecture.places():
        for name, shape in buffer_shapes(architecture.norm, architecture.hidden_size).items():
            if name == COUNT:
                value = torch.zeros(shape, dtype=torch.int64, device=device)
            else:
                fill = 1.0 if name.endswith("_var") else 0.0
                value = torch.full(shape, fill, dtype=dtype, device=device)
            buffers[name + suffix(layer, direction)] = value
    return buffers


def reset_buffers(buffers: Mapping[str, Tensor]) -> None:
    """Forget everything, in place: means 0, variances 1, counts 0. ``buffers`` by any of the names above."""
    with torch.no_grad():
        for name, value in buffers.items():
            value.fill_(1 if "_var" in name else 0)


def layer_buffers(buffers: Mapping[str, Tensor], layer: int, direction: int) -> dict[str, Tensor]:
    """The buffers of one layer and direction, without its suffix, out of a module's."""
    end = suffix(layer, direction)
    return {name[: -len(end)]: value for name, value in buffers.items() if name.endswith(end)}


def running_index(num_batches_tracked: Tensor, steps: int) -> Tensor:
    """The row to read at each processed step: the largest ``s' <= s`` that was ever updated, -1 for none.

    Args:
        num_batches_tracked: ``(R,)`` int64.
        steps: ``T``.

    Returns:
        ``(T,)`` int64, on the same device, without synchronisation.

    Example:
        >>> import torch
        >>> from fusedreg.running_statistics import running_index
        >>> running_index(torch.tensor([0, 5, 5, 0]), 6)
        tensor([-1,  1,  2,  2,  2,  2])
    """
    rows = torch.arange(num_batches_tracked.shape[0], device=num_batches_tracked.device)
    known = torch.where(num_batches_tracked > 0, rows, -1)
    largest = torch.cummax(known, 0).values
    return largest[torch.arange(steps, device=rows.device).clamp(max=rows.shape[0] - 1)]


def read_running(
    buffers: Mapping[str, Tensor], options: LayerOptions, steps: int, dtype: torch.dtype, *, lengths: Tensor | None
) -> RunningStatistics | None:
    """What a layer reads of its buffers in a call.

    In training the values are copies, for the buffers change before the backward reads what the forward read.

    Args:
        buffers: of one layer and direction (see :func:`layer_buffers`).
        options: the layer's, with a :class:`~fusedreg.BatchNorm`.
        steps: ``T``.
        dtype: of the input; the statistics come in its compute dtype.
        lengths: the call's. In training without lengths no step has a single row, so nothing is read.

    Returns:
        The statistics, or ``None`` where the call reads none.
    """
    norm = options.norm
    if not isinstance(norm, BatchNorm):
        return None
    if options.training and lengths is None and norm.process_group is None:
        return None
    counts = buffers[COUNT]
    values = {
        name.removeprefix("running_"): value.to(compute_dtype(dtype), copy=options.training)
        for name, value in buffers.items()
        if name != COUNT
    }
    pooled = norm.input_statistics == "sequence"
    index = running_index(counts, steps)
    return RunningStatistics(index, running_index(counts[:1], steps) if pooled else index, **values)


def check_samples(
    buffers: Sequence[Mapping[str, Tensor]], statistics: Sequence[BatchStatistics | None], lengths: Tensor | None
) -> None:
    """Before anything is updated inside ``torch.vmap``: samples that have statistics of their own need such buffers.

    Args:
        buffers, statistics: by layer and direction.
        lengths: the call's.

    Raises:
        RuntimeError: there is one set of buffers for all samples.
    """
    if not torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return
    for own, batch in zip(buffers, statistics, strict=True):
        batched = set().union(*(_vmap_levels(value) for value in (*(batch or ()), lengths) if value is not None))
        if any(batched - _vmap_levels(value) for value in own.values()):
            raise RuntimeError(
                "fusedreg: expected running statistics of each sample's own inside torch.vmap, where a batch norm in "
                "training has statistics of each sample, got one set for all samples; pass batched buffers to "
                "torch.func.functional_call (stack_module_state makes them), or use fusedreg.functional.lstm, which "
                "reads buffers and never writes them, or module.eval()"
            )


def _vmap_levels(tensor: Tensor) -> set[int]:
    """Which of the ``torch.vmap`` calls around have this tensor batched. Torch's internals: for vmap alone."""
    from torch._C import _functorch as functorch

    levels = set()
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return levels


def update_running(
    buffers: Mapping[str, Tensor],
    statistics: BatchStatistics,
    norm: BatchNorm,
    *,
    steps: int,
    rows: int,
    lengths: Tensor | None,
) -> None:
    """Bring the buffers of one layer and direction up to date, in place, after a training call.

    ``running = (1 - m) * running + m * batch`` with ``m`` the momentum, or 1/count without one. Steps past
    ``max_steps`` and steps with fewer than two rows of the batch change nothing. A single row for all steps takes
    the mean over the steps that had two. The input's single row with ``input_statistics="sequence"`` is updated
    where the first step had two rows, so that its count is the first step's.

    Args:
        buffers: of one layer and direction (see :func:`layer_buffers`).
        statistics: what the layer returned.
        norm: the layer's.
        steps, rows, lengths: ``T``, ``B`` and the call's lengths, ``(B,)`` or ``None``.
    """
    with torch.no_grad():
        counts = _rows_by_step(steps, rows, lengths, norm, buffers[COUNT].device)
        # Counts never grow from one step to the next: the first answers for a row that stands for all steps.
        updated = counts[: buffers[COUNT].shape[0]] >= 2
        tracked = buffers[COUNT][: updated.shape[0]]
        tracked += updated.to(tracked.dtype)
        for term in SITES:
            batch = getattr(statistics, term)
            if batch is None:
                continue
            pooled = term == "input" and norm.input_statistics == "sequence"
            mean, var = batch[:, 0], batch[:, 1]
            term_counts = (counts.sum(0, keepdim=True) if pooled else counts).to(var.dtype).unsqueeze(1)
            var = var * (term_counts / (term_counts - 1).clamp(min=1))  # unbiased, as nn.BatchNorm1d's
            if norm.statistics == "shared" and not pooled:
                mean, var = _mean_over_steps(mean, counts >= 2), _mean_over_steps(var, counts >= 2)
            rows_updated = min(updated.shape[0], mean.shape[0])
            if norm.momentum is None:
                weight = 1.0 / tracked.clamp(min=1).to(mean.dtype)
            else:
                weight = torch.full_like(mean[:, 0], norm.momentum)
            for name, value in ((f"running_{term}_mean", mean), (f"running_{term}_var", var)):
                _mix(buffers[name], value, updated[:rows_updated], weight[:rows_updated])


def read_step(
    buffers: Mapping[str, Tensor], options: LayerOptions, step: int, dtype: torch.dtype
) -> RunningStatistics | None:
    """What a call of one step reads, the sequence's ``step``-th: as :func:`read_running`."""
    steps = min(step + 1, buffers[COUNT].shape[0])  # further steps read what the last one does
    running = read_running(buffers, options, steps, dtype, lengths=None)
    return running and running._replace(index=running.index[-1:], input_index=running.input_index[-1:])


def update_step(
    buffers: Mapping[str, Tensor], statistics: BatchStatistics, norm: BatchNorm, *, step: int, rows: int
) -> None:
    """As :func:`update_running` after a call of one step, the sequence's ``step``-th.

    A single row for all steps is updated at each of them, since their mean is not known yet.
    """
    if norm.statistics == "per_step":
        if step >= buffers[COUNT].shape[0]:
            return
        buffers = {name: value[step : step + 1] for name, value in buffers.items()}
    update_running(buffers, statistics, norm, steps=1, rows=rows, lengths=None)


def _rows_by_step(steps: int, rows: int, lengths: Tensor | None, norm: BatchNorm, device: torch.device) -> Tensor:
    """How many rows of the batch take part in each processed step, ``(T,)``, over all ranks of the group."""
    if lengths is None:
        counts = torch.full((steps,), rows, dtype=torch.int64, device=device)
    else:
        counts = (torch.arange(steps, device=device).unsqueeze(1) < lengths).sum(1)
    return counts if norm.process_group is None else sum_over_ranks(counts, norm.process_group)


def _mean_over_steps(values: Tensor, counted: Tensor) -> Tensor:
    total = torch.where(counted.unsqueeze(1), values, 0.0).sum(0, keepdim=True)
    return total / counted.sum().clamp(min=1)


def _mix(buffer: Tensor, batch: Tensor, updated: Tensor, weight: Tensor) -> None:
    """Move the first rows towards the batch's; those without an update are selected, not multiplied by 0."""
    rows = updated.shape[0]
    kept, weight = buffer[:rows], weight.unsqueeze(1)
    mixed = (1.0 - weight) * kept.to(batch.dtype) + weight * batch[:rows]
    kept.copy_(torch.where(updated.unsqueeze(1), mixed.to(buffer.dtype), kept))
