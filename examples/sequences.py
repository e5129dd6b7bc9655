"""Sequences of different length, and a rare event.

    python -m examples.sequences

*Vowels*: which of nine speakers said it, from 7 to 29 steps of 12 channels, 270 utterances to learn from (Kudo et al.
1999). ``lengths`` makes ``h_n`` the state at each row's own last step, and starts the backward direction there.

*Rare event*: one row in a hundred has two bumps, all others one or none. With about 80 events to learn from: the loss
as it is, weighted by the classes' frequencies, and weighted with an L2 penalty on the recurrent weights, on the other
weights, and on both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedreg
from examples import data, figures, harness, report
from fusedreg import LayerNorm, training

VOWELS, RARE = "vowels", "rare event"
COLUMNS = {
    VOWELS: [
        ("test", "test accuracy, %", 1),
        ("nats", "test loss, nats", 3),
        ("padded", "test accuracy with 20 more steps of padding, %", 1),
        ("training", "training accuracy, %", 1),
    ],
    RARE: [
        ("precision", "average precision, %", 1),
        ("recall", "found at 1 false alarm in 1,000 rows, %", 1),
        ("training", "average precision in training, %", 1),
        ("singular", "largest singular value of `W_hh`", 2),
    ],
}
HIDDEN, SPEAKERS, RATE, BATCH, CLIP = 48, 9, 5e-3, 30, 1.0
UTTERANCES: Mapping[str, dict[str, Any]] = {
    "one direction": {"bidirectional": False},
    "both directions": {},
    "both directions, padding read as data": {"lengths": False},
    "hidden dropout": {"hidden_dropout": 0.25},
    "input and hidden dropout": {"input_dropout": 0.1, "hidden_dropout": 0.25},
    "zoneout": {"zoneout_hidden": 0.1, "zoneout_cell": 0.1},
    "layer norm": {"norm": LayerNorm()},
}
EVENT_STEPS, EVENT_RATE, EVENT_HIDDEN, EVENT_BATCH = 30, 0.01, 24, 100
FORGET_BIAS = 2.0
PENALTIES: Mapping[str, tuple[bool, dict[str, float]]] = {
    "not weighted": (False, {}),
    "weighted": (True, {}),
    "weighted, L2 on recurrent": (True, {"recurrent": 1e-3}),
    "weighted, L2 on kernel": (True, {"kernel": 1e-3}),
    "weighted, L2 on both": (True, {"recurrent": 1e-3, "kernel": 1e-3}),
}


class SequenceClassifier(nn.Module):
    """An LSTM and a linear layer over its last states, those of both directions side by side.

    ``lengths=False`` in the options leaves the lengths out: padding is then read like data.
    """

    def __init__(self, features: int, hidden: int, classes: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        given = {"bidirectional": True, **options}
        self.with_lengths = given.pop("lengths", True)
        self.lstm = fusedreg.LSTM(features, hidden, **given)
        self.linear = nn.Linear(hidden * (2 if self.lstm.bidirectional else 1), classes)

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``values (T, B, features)``, ``lengths (B,)`` → logits ``(B, classes)``."""
        _, (hidden, _) = self.lstm(values, lengths=lengths if self.with_lengths else None)
        logits = self.linear(hidden.transpose(0, 1).flatten(1))
        assert isinstance(logits, Tensor)
        return logits


def to_device(ragged: data.Ragged, device: str) -> data.Ragged:
    """The same on a device; the lengths too, where they are read without synchronisation."""
    return data.Ragged(*(part.to(device) for part in ragged))


def train_speakers(
    model: SequenceClassifier, utterances: data.Ragged, epochs: int, seed: int, tick: Callable[[], None]
) -> None:
    """Adam over shuffled batches; the order depends on the seed alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(utterances.labels), generator=generator).split(BATCH):
            rows = rows.to(utterances.labels.device)
            logits = model(utterances.values[:, rows], utterances.lengths[rows])
            loss = functional.cross_entropy(logits, utterances.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            training.clip_gradients(model, CLIP)
            optimizer.step()
        tick()


@torch.no_grad()
def score_speakers(model: SequenceClassifier, utterances: data.Ragged) -> tuple[float, float]:
    """Accuracy in per cent, and the mean loss in nats."""
    model.eval()
    logits = model(utterances.values, utterances.lengths)
    model.train()
    right = (logits.argmax(1) == utterances.labels).float().mean().item()
    return 100.0 * right, functional.cross_entropy(logits, utterances.labels).item()


def vowels(
    experiment: harness.Experiment,
    parts: tuple[data.Ragged, data.Ragged],
    bar: Callable[[str], None],
    epochs: int,
    name: str,
    seed: int,
) -> None:
    """One run of the first part."""
    utterances, tests = parts
    torch.manual_seed(seed)
    model = SequenceClassifier(utterances.values.shape[2], HIDDEN, SPEAKERS, UTTERANCES[name])
    model.to(utterances.values.device)
    experiment.variant(VOWELS, name, harness.describe(UTTERANCES[name]), model)
    train_speakers(model, utterances, epochs, seed, lambda: bar(f"{VOWELS}, {name}, seed {seed}"))
    accuracy, nats = score_speakers(model, tests)
    longer = tests._replace(values=functional.pad(tests.values, (0, 0, 0, 0, 0, 20)))
    metrics = {
        "test": accuracy,
        "nats": nats,
        "padded": score_speakers(model, longer)[0],
        "training": score_speakers(model, utterances)[0],
    }
    experiment.add(VOWELS, name, seed, metrics)


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean over the events of the precision at each one's score, in per cent: the area under precision and recall."""
    found = labels[scores.argsort(descending=True)].bool()
    precision = found.cumsum(0) / torch.arange(1, len(found) + 1, device=found.device)
    return 100.0 * precision[found].mean().item()


def recall_at(scores: Tensor, labels: Tensor, false_alarms: float) -> float:
    """Per cent of the events above the score that this share of the other rows exceeds."""
    threshold = torch.quantile(scores[labels == 0], 1.0 - false_alarms)
    return 100.0 * (scores[labels == 1] > threshold).float().mean().item()


@torch.no_grad()
def event_scores(model: SequenceClassifier, values: Tensor) -> Tensor:
    """The score of each row, in batches."""
    model.eval()
    scores = torch.cat([model(part)[:, 0] for part in values.split(1000, 1)])
    model.train()
    return scores


def train_events(
    model: SequenceClassifier,
    rows: tuple[Tensor, Tensor],
    tests: tuple[Tensor, Tensor],
    variant: tuple[bool, Mapping[str, float]],
    epochs: int,
    seed: int,
    tick: Callable[[], None],
) -> list[tuple[float, float]]:
    """Average precision on the test rows after each epoch."""
    weighted, strengths = variant
    values, labels = rows
    weight = (labels == 0).sum() / labels.sum() if weighted else torch.ones((), device=labels.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(labels), generator=generator).split(EVENT_BATCH):
            batch = batch.to(labels.device)
            scores = model(values[:, batch])[:, 0]
            loss = functional.binary_cross_entropy_with_logits(scores, labels[batch].float(), pos_weight=weight)
            loss = loss + training.l2_penalty(model.lstm, strengths)
            optimizer.zero_grad()
            loss.backward()
            training.clip_gradients(model, CLIP)
            optimizer.step()
            tick()
        curve.append((float(epoch), average_precision(event_scores(model, tests[0]), tests[1])))
    return curve


def rare(experiment: harness.Experiment, bar: Callable[[str], None], epochs: int, name: str, seed: int) -> None:
    """One run of the second part; every seed has rows of its own."""
    settings = experiment.settings
    generator = torch.Generator().manual_seed(seed)
    rows, tests = (
        tuple(part.to(settings.device) for part in data.rare_events(count, EVENT_STEPS, EVENT_RATE, generator))
        for count in (settings.pick(8000, 400), settings.pick(10_000, 1000))
    )
    torch.manual_seed(seed)
    model = SequenceClassifier(3, EVENT_HIDDEN, 1, {"bidirectional": False}).to(settings.device)
    # From the default initialisation no gradient reaches the first bump, and none of these learns anything.
    fusedreg.initialization.set_forget_bias(model.lstm, FORGET_BIAS)
    weighted, strengths = PENALTIES[name]
    penalty = f"`l2_penalty(lstm, {strengths})`" if strengths else "none"
    experiment.variant(RARE, name, penalty, model)
    label = f"{RARE}, {name}, seed {seed}"
    curve = train_events(model, rows, tests, (weighted, strengths), epochs, seed, lambda: bar(label))
    scores = event_scores(model, tests[0])
    metrics = {
        "precision": average_precision(scores, tests[1]),
        "recall": recall_at(scores, tests[1], 1e-3),
        "training": average_precision(event_scores(model, rows[0]), rows[1]),
        "singular": torch.linalg.matrix_norm(model.lstm.weight_hh_l0.detach(), 2).item(),
    }
    experiment.add(RARE, name, seed, metrics, {"average precision": curve})


def draw(results: harness.Results, folder: Path) -> None:
    """Figures from results alone."""
    figures.bars(results, VOWELS, "test", folder / "sequences-vowels.png", "test accuracy, %")
    path = folder / "sequences-rare_event.png"
    figures.curves(results, RARE, "average precision", path, ("epoch", "average precision on the test rows, %"))


def run(settings: harness.Settings) -> None:
    """Both parts."""
    epochs, event_epochs = settings.pick(60, 2), settings.pick(8, 1)
    updates = math.ceil(settings.pick(8000, 400) / EVENT_BATCH) * event_epochs
    constants = {
        "hidden_size": HIDDEN,
        "learning_rate": RATE,
        "batch_size": BATCH,
        "epochs": epochs,
        "event_steps": EVENT_STEPS,
        "event_rate": EVENT_RATE,
        "event_hidden_size": EVENT_HIDDEN,
        "event_batch_size": EVENT_BATCH,
        "event_epochs": event_epochs,
        "event_forget_bias": FORGET_BIAS,
    }
    utterances, tests = (to_device(part, settings.device) for part in data.japanese_vowels())
    experiment = harness.Experiment(settings, COLUMNS, constants)
    total = len(settings.seeds) * (len(UTTERANCES) * epochs + len(PENALTIES) * updates)
    with experiment.progress(total) as bar:
        for seed in settings.seeds:
            for name in UTTERANCES:
                vowels(experiment, (utterances, tests), bar, epochs, name, seed)
            for name in PENALTIES:
                rare(experiment, bar, event_epochs, name, seed)
            experiment.save()
    results = experiment.results()
    draw(results, settings.folder)
    report.print_tables(results, experiment.console)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    text = "Sequences of different length, and a rare event."
    options = harness.parser("sequences", text, range(3)).parse_args(arguments)
    return harness.main(lambda: run(harness.settings("sequences", options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
