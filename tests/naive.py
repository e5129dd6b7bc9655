"""A second statement of the semantics, to test the reference against: it never looks at padding.

At each step it collects the rows that have one, computes them with torch's own functional norms, and puts them back.
Where the reference selects with ``torch.where``, this indexes; where the reference hoists, this does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedreg.layer import LayerOptions, LayerParameters, RunningStatistics
from fusedreg.masks import LayerMasks
from fusedreg.regularization import BatchNorm, LayerNorm


class Naive:
    """One layer and direction. ``run`` returns output, final_hidden, final_cell, cells and used statistics."""

    def __init__(
        self,
        parameters: LayerParameters,
        options: LayerOptions,
        made: LayerMasks,
        running: RunningStatistics | None,
        probes: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.probes = probes
        self.p, self.o, self.made, self.running = parameters, options, made, running
        self.hidden_size = parameters.weight_ih.shape[0] // 4
        self.output_size = parameters.weight_hh.shape[1]
        self.used: dict[str, dict[int, Tensor]] = {"input": {}, "recurrent": {}, "cell": {}}

    def kept(self, name: str, index: Any) -> Tensor | float:
        """The multiplier of an inverted dropout: 0 or 1/(1-p); 1 where it is off or in evaluation."""
        dropped = getattr(self.made, name)
        if dropped is None:
            return 1.0
        kept: Tensor = (1.0 - dropped[index].double()) / (1.0 - getattr(self.o, name))
        return kept

    def product(self, value: Tensor, weight: Tensor, name: str, rows: list[int]) -> Tensor:
        gates = []
        for k in range(4):
            mask = self.kept(name, (rows, k) if self.o.gate_masks == "untied" else rows)
            gates.append(F.linear(value * mask, weight[k * self.hidden_size : (k + 1) * self.hidden_size]))
        return torch.cat(gates, 1)

    def norm(self, name: str, value: Tensor, s: int, pool: Tensor | None = None) -> Tensor:
        norm = self.o.norm
        if norm is None or not getattr(norm, name):
            return value
        weight, bias = getattr(self.p, f"norm_{name}_weight"), getattr(self.p, f"norm_{name}_bias")
        if isinstance(norm, LayerNorm):
            return F.layer_norm(value, value.shape[1:], weight, bias, norm.eps)
        batch = value if pool is None else pool
        if self.o.training and len(batch) >= 2:
            self.used[name][s] = torch.stack((batch.mean(0), batch.var(0, unbiased=False))).detach()
            if pool is None:
                return F.batch_norm(value, None, None, weight, bias, True, 0.0, norm.eps)
            mean, var = batch.mean(0), batch.var(0, unbiased=False)
            return (value - mean) / torch.sqrt(var + norm.eps) * weight
        mean, var = self.population(name, value.shape[1], s)
        self.used[name][s] = torch.stack((mean, var))
        return F.batch_norm(value, mean, var, weight, bias, False, 0.0, norm.eps)

    def population(self, name: str, size: int, s: int) -> tuple[Tensor, Tensor]:
        if self.running is not None:
            row = int((self.running.input_index if name == "input" else self.running.index)[s])
            if row >= 0:
                return getattr(self.running, f"{name}_mean")[row], getattr(self.running, f"{name}_var")[row]
        return torch.zeros(size).double(), torch.ones(size).double()

    def run(
        self, x: Tensor, h0: Tensor, c0: Tensor, lengths: list[int], reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p, o = self.p, self.o
        steps, batch = x.shape[:2]
        hidden, cell = list(h0.unbind()), list(c0.unbind())
        nothing = torch.zeros(self.output_size).double(), torch.zeros(self.hidden_size).double()
        ys = [[nothing[0]] * batch for _ in range(steps)]
        cells = [[nothing[1]] * batch for _ in range(steps)]
        weight_hh = p.weight_hh * self.kept("weight_dropout", slice(None))
        bias = sum(b for b in (p.bias_ih, p.bias_hh) if b is not None)

        pool = None
        if isinstance(o.norm, BatchNorm) and o.norm.input_statistics == "sequence":
            pairs = [(t, b) for b in range(batch) for t in range(lengths[b])]
            pool = torch.cat(
                [self.product(x[t, b : b + 1], p.weight_ih, "input_dropout", [b]) for t, b in pairs] or [x[0, :0]]
            )

        for s in range(steps):
            rows = [b for b in range(batch) if s < lengths[b]]
            if not rows:
                break
            ts = [lengths[b] - 1 - s if o.direction else s for b in rows]
            hs = torch.stack([hidden[b] for b in rows])
            cs = torch.stack([cell[b] for b in rows])
            if reset is not None:
                keep = [i for i in range(len(rows)) if not reset[ts[i], rows[i]]]
                hs = torch.zeros_like(hs).index_copy(0, torch.tensor(keep, dtype=torch.int64), hs[keep])
                cs = torch.zeros_like(cs).index_copy(0, torch.tensor(keep, dtype=torch.int64), cs[keep])

            a = self.product(hs, weight_hh, "hidden_dropout", rows)
            r = self.product(
                torch.stack([x[t, b] for t, b in zip(ts, rows, strict=True)]), p.weight_ih, "input_dropout", rows
            )
            z = self.norm("recurrent", a, s) + self.norm("input", r, s, pool) + bias
            i, f, g, out = (z[:, k * self.hidden_size : (k + 1) * self.hidden_size] for k in range(4))
            update = self.kept("update_dropout", (ts, rows) if o.update_mask == "step" else rows)
            new_c = f.sigmoid() * cs + update * i.sigmoid() * g.tanh()
            if o.cell_dropout:
                dropped = self.made.cell_dropout
                new_c = new_c * ((1 - o.cell_dropout) if dropped is None else 1.0 - dropped[rows].double())
            read_c = new_c if self.probes is None else new_c + self.probes[1][ts, rows]
            new_h = out.sigmoid() * self.norm("cell", read_c, s).tanh()
            if p.weight_hr is not None:
                new_h = F.linear(new_h, p.weight_hr)
            zone_c: Tensor | float = o.zoneout_cell
            zone_h: Tensor | float = o.zoneout_hidden
            if o.training and o.zoneout_cell:
                assert self.made.zoneout_cell is not None
                zone_c = self.made.zoneout_cell[ts, rows].double()
            if o.training and o.zoneout_hidden:
                assert self.made.zoneout_hidden is not None
                zone_h = self.made.zoneout_hidden[ts, rows].double()
            next_c = zone_c * cs + (1 - zone_c) * new_c
            next_h = zone_h * hs + (1 - zone_h) * new_h
            if self.probes is not None:
                next_h, next_c = next_h + self.probes[0][ts, rows], next_c + self.probes[1][ts, rows]
            y = new_h if o.zoneout_output == "candidate" else next_h
            y = y * self.kept("output_dropout", rows) * self.kept("dropout", (ts, rows))
            for position, (t, b) in enumerate(zip(ts, rows, strict=True)):
                hidden[b], cell[b] = next_h[position], next_c[position]
                ys[t][b], cells[t][b] = y[position], next_c[position]
        return (
            torch.stack([torch.stack(row) for row in ys]),
            torch.stack(hidden),
            torch.stack(cell),
            torch.stack([torch.stack(row) for row in cells]),
        )
