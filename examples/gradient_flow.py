"""How far gradients flow back, with batch norm and without, with ``tanh`` and without: before training and after it.

    python -m examples.gradient_flow

The cells and the adding problem of ``examples.batch_norm``. What is measured is ``dL/dc_t``, the gradient that arrives
at the cell of step ``t`` from the loss at the last step: of ``fusedreg.LSTM`` by ``fusedreg.inspect.GradientFlow``,
which watches a normal backward; of the loop by torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples import figures, harness, report
from examples.batch_norm import BATCH, HIDDEN, PROBLEMS, RATE, VARIANTS, Model, Problem, train
from examples.open_cell import OpenCellLSTM
from fusedreg import inspect

PART = "adding"
COLUMNS = {
    PART: [
        ("before", "decades that `dL/dc` loses from the last step to the first, before training", 1),
        ("after", "after training", 1),
        ("score", "squared error after training", 4),
    ]
}


def cell_gradients(model: Model, problem: Problem, device: str) -> list[float]:
    """The norm of ``dL/dc_t`` over units, its root mean square over 200 rows, by step."""
    values, target = problem.draw(200, torch.Generator().manual_seed(10**6))
    values, target = values.to(device), target.to(device)
    recurrent = model.recurrent
    if isinstance(recurrent, OpenCellLSTM):
        loss = problem.loss(model(values), target)
        gradients = torch.stack(torch.autograd.grad(loss, recurrent.cells))
        norms = torch.linalg.vector_norm(gradients.double(), dim=2)
        return norms.square().mean(1).sqrt().tolist()
    with inspect.GradientFlow(model) as flow:
        problem.loss(model(values), target).backward()
    model.zero_grad()
    return flow.layers[0].norm_over_time("cell").tolist()


def decades(norms: Sequence[float]) -> float:
    """How many powers of ten lie between the last step's gradient and the first's; NaN if either is 0 or not finite."""
    first, last = norms[0], norms[-1]
    if not (math.isfinite(first) and math.isfinite(last) and first > 0 and last > 0):
        return math.nan
    return math.log10(last / first)


def draw(results: harness.Results, folder: Path) -> None:
    """Figures from results alone."""
    figure, panels = figures.pyplot().subplots(1, 2, figsize=(11.0, 4.2), sharey=True)
    for panel, name in zip(panels, ("before", "after"), strict=True):
        panel.set_yscale("log")
        figures.draw_curves(panel, results, PART, name)
        panel.set_xlabel("step $t$")
        panel.set_title(f"{name} training")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(r"$\|\partial L/\partial c_t\|$, RMS over rows")
    panels[1].legend(fontsize=7)
    figures.finish(figure, folder / "gradient_flow.png")


def run(settings: harness.Settings) -> None:
    """Every cell, before and after."""
    (problem,) = (one for one in PROBLEMS if one.name == PART)
    steps = settings.pick(500, 10)
    constants = {"hidden_size": HIDDEN, "learning_rate": RATE, "batch_size": BATCH, "steps": steps}
    experiment = harness.Experiment(settings, COLUMNS, constants)
    jobs = [(seed, variant) for seed in settings.seeds for variant in VARIANTS]
    with experiment.progress(len(jobs) * steps) as bar:
        for seed, variant in jobs:
            torch.manual_seed(seed)
            model = Model(variant, problem).to(settings.device)
            experiment.variant(PART, variant.name, variant.options(), model)
            before = cell_gradients(model, problem, settings.device)
            text = f"{variant.name}, seed {seed}"
            curve = train(model, problem, seed, steps, steps, settings.device, lambda text=text: bar(text))
            after = cell_gradients(model, problem, settings.device)
            metrics = {"before": decades(before), "after": decades(after), "score": curve[-1][1]}
            flows = {
                name: [(float(step), norm) for step, norm in enumerate(norms)]
                for name, norms in (("before", before), ("after", after))
            }
            experiment.add(PART, variant.name, seed, metrics, flows)
            experiment.save()
    results = experiment.results()
    draw(results, settings.folder)
    report.print_tables(results, experiment.console)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = harness.parser("gradient_flow", "How far gradients flow back.", range(2)).parse_args(arguments)
    return harness.main(lambda: run(harness.settings("gradient_flow", options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
