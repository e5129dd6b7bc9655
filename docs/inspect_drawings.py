"""The pictures of the page on ``fusedreg.inspect``: one training of a few seconds, seen in every way there is.

``mkdocs`` calls :func:`draw_all` through ``docs/hooks.py``; nothing of it is committed. To look at them without the
site: ``python docs/hooks.py build/drawings``.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

import fusedreg
from fusedreg import inspect

STEPS, ROWS, UNITS, UPDATES = 60, 16, 24, 60


class Model(nn.Module):
    """Two layers, and a sum of two marked numbers to be told at the end: the adding problem."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fusedreg.LSTM(2, UNITS, num_layers=2, zoneout_cell=0.1)
        self.head = nn.Linear(UNITS, 1)

    def forward(self, input: Tensor) -> Tensor:
        """One number a row, from the last step."""
        return self.head(self.lstm(input)[0][-1]).squeeze(-1)


def batch() -> tuple[Tensor, Tensor]:
    """Numbers, and marks on two of them in each row."""
    numbers, marks = torch.rand(STEPS, ROWS), torch.zeros(STEPS, ROWS)
    for half in (0, STEPS // 2):
        marks[torch.randint(STEPS // 2, (ROWS,)) + half, torch.arange(ROWS)] = 1.0
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def loss(model: Model, input: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return (model(input) - target).square().mean()


def flow(forget_bias: float) -> inspect.GradientFlow:
    """The gradient's way back in a new model whose forget gates have that bias."""
    torch.manual_seed(0)
    model = Model()
    fusedreg.initialization.set_forget_bias(model.lstm, forget_bias)
    with inspect.GradientFlow(model) as seen:
        loss(model, *batch()).backward()
    return seen


def not_finite() -> inspect.NonFinite:
    """A weight of the upper layer's forget gates is NaN; a loss that divides by zero."""
    torch.manual_seed(0)
    model = Model()
    input, _ = batch()
    with inspect.NonFinite(model) as found:
        (model.lstm(input)[0][40].sum() / 0.0).backward()
        input[12, 3] = float("inf")
        model(input)
        model.lstm.weight_hh_l1.data[UNITS + 5, 2] = float("nan")
        model(batch()[0])
    return found


def trained() -> dict[str, Any]:
    """What a short training shows."""
    torch.manual_seed(0)
    model = Model()
    fusedreg.initialization.set_forget_bias(model.lstm, 2.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with inspect.WeightTracker(model, optimizer) as tracker:
        for _ in range(UPDATES):
            optimizer.zero_grad()
            loss(model, *batch()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    with inspect.GradientFlow(model) as seen, inspect.States(model) as states:
        loss(model, *batch()).backward()
    maps = {own.name: own for own in [*states.maps(), *seen.maps(), *inspect.weight_maps(model)]}
    histograms = {own.name: own for own in [*states.histograms(), *inspect.weight_histograms(model)]}
    return {
        "weight_tracker": tracker,
        "gates": maps["lstm.l1 gates"],
        "gates_distribution": histograms["lstm.l1 gates"],
        "cells": maps["lstm.l1 cell"],
        "flow_by_unit": maps["lstm.l0 dcell"],
        "recurrent_weights": maps["lstm.l0 weight_hh"],
        "weight_distribution": histograms["lstm.l0 weight_hh"],
        "spectra": inspect.spectra(model),
    }


def saturated() -> inspect.Saturation:
    """A new model with weights six times too large, and one output gate that is shut."""
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for weight in model.lstm.parameters():
            weight *= 6.0
        model.lstm.bias_ih_l1[UNITS * 3] = -100.0
    with inspect.States(model) as states:
        model(batch()[0])
    return inspect.saturation(states)


def draw_all() -> dict[str, bytes]:
    """Every picture as an SVG file, by the file's name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seen = {"flow_short": flow(-1.0), "flow_long": flow(3.0), "not_finite": not_finite(), **trained()}
        seen["saturation"] = saturated()
    finally:
        torch.set_num_threads(threads)
    results = {}
    for name, data in seen.items():
        data.figure().savefig(file := BytesIO(), format="svg", metadata={"Date": None})
        results[f"inspect_{name}.svg"] = file.getvalue()
    return results
