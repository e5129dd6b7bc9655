"""An LSTM written out step by step in plain torch, with everything inside to be looked at. For small sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fusedreg

T, B, I, H, SEED = 6, 3, 3, 4, 11
Seen = dict[str, Tensor]


def module(seed: int = 0, **options: Any) -> fusedreg.LSTM:
    torch.manual_seed(seed)
    options = {"backend": "reference", "dtype": torch.float64, **options}
    return fusedreg.LSTM(I, H, **options)


def batch(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(T, B, I, dtype=torch.float64)


def kept(mask: Tensor | None, rate: float) -> Any:
    return 1.0 if mask is None else (~mask).double() / (1 - rate)


def eager_layer(
    lstm: fusedreg.LSTM, x: Tensor, end: str, lengths: list[int] | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Seen]:
    """One layer and direction, a row at a time in Python, each state a tensor that keeps its gradient.

    Returns ``y``, ``h_n``, ``c_n`` and what was seen on the way, by position: ``"hidden"`` and ``"cell"`` are zeros
    added to the carried h, and to the cell wherever it is read, whose ``.grad`` a backward fills; ``"gates"`` are
    ``(T, B, 4, H)``, 0 in padding. Batch norm mixes rows, so all rows go through a step together.
    """
    options, reverse = lstm.regularization, end.endswith("_reverse")
    sizes = {"hidden_size": H, "batch_size": B, "steps": T, "num_layers": lstm.num_layers}
    masks = fusedreg.masks(SEED, options, input_size=I, bidirectional=lstm.bidirectional, **sizes)[end[1:]]
    w_ih, w_hh = getattr(lstm, "weight_ih" + end), getattr(lstm, "weight_hh" + end)
    bias = getattr(lstm, "bias_ih" + end) + getattr(lstm, "bias_hh" + end)
    w_hh = w_hh * kept(masks.weight_dropout, options.weight_dropout)
    h, c = [x.new_zeros(H) for _ in range(B)], [x.new_zeros(H) for _ in range(B)]
    hidden, cell = x.new_zeros(T, B, H).requires_grad_(), x.new_zeros(T, B, H).requires_grad_()
    gates = x.new_zeros(T, B, 4, H)
    outputs = [[x.new_zeros(H) for _ in range(B)] for _ in range(T)]
    for s in range(T):
        rows = [b for b in range(B) if lengths is None or s < lengths[b]]
        if not rows:
            break
        at = [((T if lengths is None else lengths[b]) - 1 - s) if reverse else s for b in rows]
        before = [(h[b], c[b]) for b in rows]
        for number, (t, b) in enumerate(zip(at, rows, strict=True)):
            if reset is not None and reset[t, b]:
                before[number] = x.new_zeros(H), x.new_zeros(H)
        previous_h, previous_c = (torch.stack(values) for values in zip(*before, strict=True))
        dropped_h = previous_h
        if masks.hidden_dropout is not None:
            dropped_h = previous_h * kept(masks.hidden_dropout[rows], options.hidden_dropout)
        a, r = dropped_h @ w_hh.t(), torch.stack([x[t, b] for t, b in zip(at, rows, strict=True)]) @ w_ih.t()
        z = normed(lstm, a, "recurrent", end) + normed(lstm, r, "input", end) + bias
        i, f, g, o = z.chunk(4, -1)
        candidate_c = f.sigmoid() * previous_c + i.sigmoid() * g.tanh()
        added_c = torch.stack([cell[t, b] for t, b in zip(at, rows, strict=True)])
        candidate_h = o.sigmoid() * normed(lstm, candidate_c + added_c, "cell", end).tanh()
        for number, (t, b) in enumerate(zip(at, rows, strict=True)):
            stay_c = 0.0 if masks.zoneout_cell is None else masks.zoneout_cell[t, b].double()
            stay_h = 0.0 if masks.zoneout_hidden is None else masks.zoneout_hidden[t, b].double()
            c[b] = stay_c * previous_c[number] + (1 - stay_c) * candidate_c[number] + cell[t, b]
            h[b] = stay_h * previous_h[number] + (1 - stay_h) * candidate_h[number] + hidden[t, b]
            gates[t, b] = torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()])[:, number].detach()
            y = candidate_h[number] if options.zoneout_output == "candidate" else h[b]
            mask = None if masks.output_dropout is None else masks.output_dropout[b]
            outputs[t][b] = y * kept(mask, options.output_dropout)
    y = torch.stack([torch.stack(row) for row in outputs])
    return y, torch.stack(h), torch.stack(c), {"hidden": hidden, "cell": cell, "gates": gates}


def normed(lstm: fusedreg.LSTM, value: Tensor, site: str, end: str) -> Tensor:
    norm = lstm.regularization.norm
    if norm is None:
        return value
    axis = 0 if isinstance(norm, fusedreg.BatchNorm) else -1
    mean = value.mean(axis, keepdim=True)
    variance = value.var(axis, correction=0, keepdim=True)
    bias = getattr(lstm, f"norm_{site}_bias{end}", 0.0)
    return (value - mean) / (variance + norm.eps).sqrt() * getattr(lstm, f"norm_{site}_weight{end}") + bias
