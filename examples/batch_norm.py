"""Does batch norm replace ``tanh`` and the bias? The adding and the copying problem, with and without each.

    python -m examples.batch_norm

Recurrent batch norm centres and scales what enters the gates and what leaves the cell. What is left, then, for the bias
to shift and for ``tanh`` to bound? Each is taken away, and both, with the norm and without it. ``bias=False`` is an
option of the layer. No kernel can leave ``tanh`` out: those rows run in ``examples/open_cell.py``, a plain loop that
computes the same numbers as the kernels where ``tanh`` is left in place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedreg
from examples import data, figures, harness, report
from examples.open_cell import OpenCellLSTM
from fusedreg import BatchNorm

HIDDEN, RATE, BATCH, CLIP = 64, 1e-2, 50, 1.0


@dataclass(frozen=True)
class Problem:
    """A synthetic task: how a batch is drawn, what its score is, and what counts as solved."""

    name: str
    features: int
    results: int
    steps: int
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    heading: tuple[str, int]
    solved: Callable[[float], bool]


ADDING_STEPS, SYMBOLS, DELAY, EARLIER = 50, 3, 10, 8


def right(output: Tensor, target: Tensor) -> Tensor:
    """Per cent of the asked-for letters that are the most likely ones."""
    asked = target >= 0
    return 100.0 * (output.argmax(2) == target)[asked].float().mean()


def copying(name: str, earlier: int) -> Problem:
    """The copying problem whose cues come up to ``earlier`` steps sooner, drawn for each row."""
    return Problem(
        name,
        features=10,
        results=8,
        steps=2 * SYMBOLS + DELAY,
        draw=lambda rows, generator: data.copying(rows, DELAY, SYMBOLS, generator, earlier),
        loss=lambda output, target: functional.cross_entropy(output.flatten(0, 1), target.flatten()),
        score=right,
        heading=("letters right at the end, % (by chance: 12.5)", 1),
        solved=lambda score: score > 99.0,
    )


PROBLEMS = (
    Problem(
        "adding",
        features=2,
        results=1,
        steps=ADDING_STEPS,
        draw=lambda rows, generator: data.adding(rows, ADDING_STEPS, generator),
        loss=lambda output, target: functional.mse_loss(output[-1, :, 0], target),
        score=lambda output, target: functional.mse_loss(output[-1, :, 0], target),
        heading=("squared error at the end (the mean as an answer: 0.167)", 4),
        solved=lambda error: error < 0.01,
    ),
    copying("copying", EARLIER),
    copying("copying, cues at one step", 0),
)


@dataclass(frozen=True)
class Variant:
    """What is left in the cell."""

    bias: bool = True
    squash: bool = True
    norm: bool = False
    input_statistics: Literal["step", "sequence"] = "sequence"

    @property
    def name(self) -> str:
        left_out = [name for name, kept in (("tanh", self.squash), ("bias", self.bias)) if not kept]
        base = "batch norm" if self.norm else "plain"
        base += " of each step's inputs" if self.norm and self.input_statistics == "step" else ""
        return base + (f", no {' and no '.join(left_out)}" if left_out else "")

    def options(self) -> str:
        """What makes the layer."""
        norm = f"BatchNorm(T, input_statistics={self.input_statistics!r})"
        given = (["bias=False"] if not self.bias else []) + ([f"norm={norm}"] if self.norm else [])
        return f"`{'LSTM' if self.squash else 'OpenCellLSTM'}({', '.join(['...', *given])})`"

    def make(self, problem: Problem) -> nn.Module:
        """The layer: of the kernels where they can, else the loop."""
        norm = BatchNorm(problem.steps, input_statistics=self.input_statistics) if self.norm else None
        if self.squash:
            return fusedreg.LSTM(problem.features, HIDDEN, bias=self.bias, norm=norm)
        return OpenCellLSTM(problem.features, HIDDEN, bias=self.bias, norm=norm)


VARIANTS = tuple(
    Variant(bias, squash, norm)
    for norm in (False, True)
    for squash, bias in ((True, True), (True, False), (False, True), (False, False))
)

# What goes wrong where all rows have the same input at a step: statistics of that step's inputs have no variance.
SAME_INPUTS = (Variant(), Variant(norm=True, input_statistics="step"), Variant(norm=True))


class Model(nn.Module):
    """A recurrent layer and a linear layer over its outputs."""

    def __init__(self, variant: Variant, problem: Problem) -> None:
        super().__init__()
        self.recurrent = variant.make(problem)
        self.linear = nn.Linear(HIDDEN, problem.results)

    def forward(self, values: Tensor) -> Tensor:
        """``values (T, B, features)`` → ``(T, B, results)``."""
        result = self.linear(self.recurrent(values)[0])
        assert isinstance(result, Tensor)
        return result


@torch.no_grad()
def evaluate(model: Model, problem: Problem, device: str, training: bool = False) -> float:
    """The score on 1,000 fresh rows, the same ones each time; NaN where the cell has overflowed.

    ``training`` normalises them by their own statistics, and puts them among the running ones: only for the end.
    """
    model.train(training)
    values, target = problem.draw(1000, torch.Generator().manual_seed(10**6))
    output = model(values.to(device))
    model.train()
    return problem.score(output, target.to(device)).item() if output.isfinite().all() else math.nan


def train(
    model: Model, problem: Problem, seed: int, steps: int, every: int, device: str, tick: Callable[[], None]
) -> list[tuple[float, float]]:
    """The score every so many steps. A model that is no longer finite stays so, and its training ends."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    curve = [(0.0, evaluate(model, problem, device))]
    for step in range(1, steps + 1):
        values, target = problem.draw(BATCH, generator)
        loss = problem.loss(model(values.to(device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if step % 20 == 0 and not norm.isfinite():
            return [*curve, *((float(at), math.nan) for at in range(every * (step // every + 1), steps + 1, every))]
        optimizer.step()
        if step % every == 0:
            curve.append((float(step), evaluate(model, problem, device)))
        tick()
    return curve


def saturation(model: Model, problem: Problem, device: str) -> float:
    """How far ``tanh`` is from the identity where it acts on the cell: mean of ``1 - |tanh(x) / x|``, in per cent.

    0 means that it does nothing. Read off the cells that the layer returns; the norm between is computed here.
    """
    layer = model.recurrent
    if not isinstance(layer, fusedreg.LSTM):
        return math.nan
    values, _ = problem.draw(500, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        layer.train()
        cells = layer(values.to(device), return_cell_states=True).cell_states
        if layer.regularization.norm is not None:
            mean, variance = cells.mean(1, keepdim=True), cells.var(1, correction=0, keepdim=True)
            gain, shift = layer.norm_cell_weight_l0, layer.norm_cell_bias_l0
            cells = (cells - mean) * (variance + layer.regularization.norm.eps).rsqrt() * gain + shift
        away = cells.abs() > 1e-4
        return 100.0 * (1.0 - cells.tanh() / cells)[away].mean().item()


def columns(problem: Problem) -> list[tuple[str, str, int]]:
    """What a problem's table shows."""
    return [
        ("score", *problem.heading),
        ("own", "the same by the batch's own statistics", problem.heading[1]),
        ("solved", "solved after steps", 0),
        ("saturation", "tanh of the cell takes away, %", 1),
    ]


def draw(results: harness.Results, folder: Path) -> None:
    """Figures from results alone."""
    for problem in PROBLEMS:
        path = folder / f"batch_norm-{problem.name.split(',')[0]}{'_same' if ',' in problem.name else ''}.png"
        figures.curves(results, problem.name, "score", path, ("step", problem.heading[0]), log=problem.name == "adding")


def run(settings: harness.Settings) -> None:
    """Both problems, all variants, all seeds."""
    steps, every = settings.pick(800, 10), settings.pick(40, 5)
    constants = {
        "hidden_size": HIDDEN,
        "learning_rate": RATE,
        "batch_size": BATCH,
        "clip": CLIP,
        "steps": steps,
        "adding_steps": ADDING_STEPS,
        "copied_symbols": SYMBOLS,
        "copying_delay": DELAY,
        "copying_earlier": EARLIER,
    }
    experiment = harness.Experiment(settings, {problem.name: columns(problem) for problem in PROBLEMS}, constants)
    jobs = [
        (seed, problem, variant)
        for seed in settings.seeds
        for problem in PROBLEMS
        for variant in (SAME_INPUTS if problem is PROBLEMS[-1] else VARIANTS)
    ]
    with experiment.progress(len(jobs) * steps) as bar:
        for seed, problem, variant in jobs:
            torch.manual_seed(seed)
            model = Model(variant, problem).to(settings.device)
            experiment.variant(problem.name, variant.name, variant.options(), model)
            text = f"{problem.name}, {variant.name}, seed {seed}"
            curve = train(model, problem, seed, steps, every, settings.device, lambda text=text: bar(text))
            reached = [at for at, score in curve if problem.solved(score)]
            metrics = {
                "score": curve[-1][1],
                "own": evaluate(model, problem, settings.device, training=True),
                "solved": min(reached, default=math.nan),
                "saturation": saturation(model, problem, settings.device),
            }
            experiment.add(problem.name, variant.name, seed, metrics, {"score": curve})
            experiment.save()
    results = experiment.results()
    draw(results, settings.folder)
    report.print_tables(results, experiment.console)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    text = "Does batch norm replace tanh and the bias?"
    options = harness.parser("batch_norm", text, range(3)).parse_args(arguments)
    return harness.main(lambda: run(harness.settings("batch_norm", options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
