"""Rates found by Bayesian optimisation, against rates set by hand, on seeds that the search did not use.

    python -m examples.rates

The task is ``examples.sequences``' first part. The search, Optuna's TPE, sees two thirds of the 270 training utterances
and is scored by the loss on the last third, averaged over two seeds; its budget is a number of trials. The rates it
finds, rates by hand and none at all are then trained on all 270 with other seeds, and tested on the 370.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples import data, figures, harness, report
from examples.sequences import (
    HIDDEN,
    SPEAKERS,
    SequenceClassifier,
    score_speakers,
    to_device,
    train_speakers,
)

PART = "rates"
COLUMNS = {
    PART: [("test", "test accuracy, %", 1), ("nats", "test loss, nats", 3), ("training", "training accuracy, %", 1)]
}
SPACE = {
    "input_dropout": 0.5,
    "hidden_dropout": 0.5,
    "update_dropout": 0.5,
    "weight_dropout": 0.5,
    "zoneout_hidden": 0.3,
    "zoneout_cell": 0.5,
}
BY_HAND = {"input_dropout": 0.1, "hidden_dropout": 0.25}
SEARCH_SEEDS = (1000, 1001)


def pick(utterances: data.Ragged, rows: Tensor) -> data.Ragged:
    """Some of the utterances."""
    return data.Ragged(utterances.values[:, rows], utterances.lengths[rows], utterances.labels[rows])


def fit(
    options: dict[str, Any], utterances: data.Ragged, epochs: int, seed: int, tick: Callable[[], None]
) -> SequenceClassifier:
    """A model with these rates, trained."""
    torch.manual_seed(seed)
    model = SequenceClassifier(utterances.values.shape[2], HIDDEN, SPEAKERS, options).to(utterances.values.device)
    train_speakers(model, utterances, epochs, seed, tick)
    return model


def search(
    utterances: data.Ragged, trials: int, epochs: int, tick: Callable[[], None]
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """The best rates of ``trials``, and the lowest validation loss after each trial. No rate at all is the first."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise RuntimeError("the search is made by the package optuna; install it: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Every third utterance: the file has the speakers one after the other, so each has a third in either part.
    third = torch.arange(len(utterances.labels), device=utterances.labels.device) % 3 == 2
    rows, held_out = pick(utterances, ~third), pick(utterances, third)

    def objective(trial: Any) -> float:
        options = {name: round(trial.suggest_float(name, 0.0, top), 3) for name, top in SPACE.items()}
        losses = [score_speakers(fit(options, rows, epochs, seed, tick), held_out)[1] for seed in SEARCH_SEEDS]
        return sum(losses) / len(losses)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=8, multivariate=True)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(dict.fromkeys(SPACE, 0.0))
    study.enqueue_trial({**dict.fromkeys(SPACE, 0.0), **BY_HAND})
    study.optimize(objective, n_trials=trials)
    curve, lowest = [], float("inf")
    for number, trial in enumerate(study.trials, 1):
        lowest = min(lowest, trial.value)
        curve.append((float(number), lowest))
    return {name: round(value, 3) for name, value in study.best_params.items()}, curve


def draw(results: harness.Results, folder: Path) -> None:
    """Figures from results alone."""
    figures.bars(results, PART, "nats", folder / "rates.png", "test loss, nats")
    path = folder / "rates-search.png"
    figures.curves(results, PART, "search", path, ("trial", "lowest validation loss, nats"))


def run(settings: harness.Settings) -> None:
    """The search, then the comparison."""
    utterances, tests = (to_device(part, settings.device) for part in data.japanese_vowels())
    epochs, trials = settings.pick(40, 1), settings.pick(30, 3)
    constants = {"epochs": epochs, "trials": trials, "search_seeds": list(SEARCH_SEEDS), "space": SPACE}
    experiment = harness.Experiment(settings, COLUMNS, constants)
    with experiment.progress(epochs * (trials * len(SEARCH_SEEDS) + 3 * len(settings.seeds))) as bar:
        found, curve = search(utterances, trials, epochs, lambda: bar("search"))
        experiment.notes = {"found": found, "validation": [list(point) for point in curve]}
        experiment.console.print(f"found: {found}", highlight=False)
        experiment.restart_clock()
        for seed in settings.seeds:
            for name, options in (("none", {}), ("by hand", BY_HAND), ("found", found)):
                model = fit(dict(options), utterances, epochs, seed, lambda text=f"{name}, seed {seed}": bar(text))
                experiment.variant(PART, name, harness.describe(options), model)
                accuracy, nats = score_speakers(model, tests)
                metrics = {"test": accuracy, "nats": nats, "training": score_speakers(model, utterances)[0]}
                experiment.add(PART, name, seed, metrics, {"search": curve} if name == "found" else {})
            experiment.save()
    results = experiment.results()
    draw(results, settings.folder)
    report.print_tables(results, experiment.console)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = harness.parser("rates", "Rates found by Bayesian optimisation.", range(5)).parse_args(arguments)
    return harness.main(lambda: run(harness.settings("rates", options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
