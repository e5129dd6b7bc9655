"""Language models: characters of Shakespeare's plays and words of the King James Bible, one regulariser at a time.

    python -m examples.language_models
    python -m examples.language_models --text words --seeds 0 1 2

One layer, the same sizes, initial weights, steps, optimiser and schedule for every variant; only what is dropped or
normalised differs. The texts are cut short, so that there is something to regularise within minutes. Each model is
scored on a validation text along the way, and on the test text where it was best: what early stopping would keep.
Times are of whole training steps, against the same model around ``nn.LSTM``, pair by pair in one process.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedreg
from benchmarks import shakespeare
from examples import data, figures, harness, report
from fusedreg import BatchNorm, LayerNorm, training, truncated

CLIP, WARM_UP = 1.0, 50
State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """What regularises a model: options of the layer, and what acts around it."""

    name: str
    layer: Mapping[str, Any] = field(default_factory=dict)
    around: Mapping[str, float] = field(default_factory=dict)

    def options(self) -> str:
        """For the table."""
        shown = [harness.describe(one) for one in (self.layer, self.around) if one]
        return ", ".join(shown) or "none"


@dataclass(frozen=True)
class Text:
    """A text and the model's sizes and budget for it."""

    name: str
    load: Callable[[harness.Settings], tuple[Tensor, Tensor, Tensor, int]]
    metric: tuple[str, int]
    embedding: int
    hidden: int
    tied: bool
    rows: int
    steps: int
    epochs: int
    learning_rate: float
    score: Callable[[float], float]
    variants: tuple[Variant, ...]


def variants(rates: Mapping[str, float], steps: int) -> tuple[Variant, ...]:
    """The same methods for both texts, with rates by hand: more for the words, whose text the model knows by heart."""
    word, output, hidden, weight = rates["word"], rates["output"], rates["hidden"], rates["weight"]
    awd = {"input_dropout": rates["input"], "weight_dropout": weight}
    return (
        Variant("plain"),
        Variant("variational", {"input_dropout": rates["input"], "hidden_dropout": hidden, "output_dropout": output}),
        Variant("zoneout", {"zoneout_cell": rates["zoneout"], "zoneout_hidden": 0.05}),
        Variant("weight drop", {"weight_dropout": weight}),
        Variant("batch norm", {"norm": BatchNorm(max_steps=steps)}),
        Variant("layer norm", {"norm": LayerNorm()}),
        Variant("AWD", awd, {"embedding_dropout": word, "locked_dropout": output, "ar": 1.0, "tar": 0.5}),
    )


def load_characters(settings: harness.Settings) -> tuple[Tensor, Tensor, Tensor, int]:
    """60,000 characters of the training plays; of the two held-out plays, one to validate and one to test."""
    corpus = shakespeare.load()
    half = len(corpus.held_out) // 2
    size = settings.pick(20_000, 4_000)
    return (
        corpus.training[: settings.pick(60_000, 8_000)],
        corpus.held_out[:half][:size],
        corpus.held_out[half:][:size],
        len(corpus.characters),
    )


def load_words(settings: harness.Settings) -> tuple[Tensor, Tensor, Tensor, int]:
    """60,000 words of the Bible's training chapters with the 2,000 most frequent ones known."""
    words = data.bible(vocabulary=2000, training_words=settings.pick(60_000, 8_000))
    size = settings.pick(12_000, 4_000)
    return words.training, words.validation[:size], words.test[:size], len(words.vocabulary)


TEXTS = (
    Text(
        "characters",
        load_characters,
        ("bits per character", 3),
        embedding=64,
        hidden=128,
        tied=False,
        rows=16,
        steps=50,
        epochs=36,
        learning_rate=8e-3,
        score=lambda nats: nats / math.log(2.0),
        variants=variants({"word": 0.0, "input": 0.1, "output": 0.3, "hidden": 0.2, "weight": 0.3, "zoneout": 0.3}, 50),
    ),
    Text(
        "words",
        load_words,
        ("perplexity", 1),
        embedding=128,
        hidden=128,
        tied=True,
        rows=10,
        steps=35,
        epochs=15,
        learning_rate=5e-3,
        score=math.exp,
        variants=variants({"word": 0.1, "input": 0.2, "output": 0.4, "hidden": 0.2, "weight": 0.4, "zoneout": 0.3}, 35),
    ),
)


class LanguageModel(nn.Module):
    """Embedding, a recurrent layer and a linear layer, tied to the embedding where that is asked for.

    ``recurrent`` has ``nn.LSTM``'s call; ``around`` may have ``embedding_dropout``, ``locked_dropout``,
    ``ar`` and ``tar``.
    """

    def __init__(self, recurrent: nn.Module, symbols: int, text: Text, around: Mapping[str, float]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, text.embedding)
        self.recurrent = recurrent
        self.locked = training.LockedDropout(around.get("locked_dropout", 0.0))
        self.head = nn.Linear(text.hidden, symbols)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if text.tied:
            self.head.weight = self.embedding.weight
        self.around = dict(around)

    def forward(self, symbols: Tensor, state: State | None = None) -> tuple[Tensor, State, Tensor]:
        """``symbols (T, B)`` → logits ``(T, B, symbols)``, the last state, and the penalties of what is in between."""
        embedded = training.embedding_dropout(self.embedding, symbols, self.around.get("embedding_dropout", 0.0))
        output, state = self.recurrent(embedded, state)
        dropped = self.locked(output)
        penalty = output.new_zeros(())
        if "ar" in self.around:
            penalty = penalty + training.activation_regularization(dropped, self.around["ar"])
        if "tar" in self.around:
            penalty = penalty + training.temporal_activation_regularization(output, self.around["tar"])
        assert state is not None
        return self.head(dropped), state, penalty


def batches(symbols: Tensor, rows: int, steps: int) -> Iterator[training.StreamBatch]:
    """Pieces of ``rows`` contiguous streams, each with its targets: the symbols one step on."""
    streams = training.contiguous_streams(symbols, rows)
    yield from training.StatefulBatches(streams[:-1], streams[1:], steps=steps)


@torch.no_grad()
def evaluate(model: LanguageModel, symbols: Tensor, text: Text) -> float:
    """Nats a symbol, read from a zero state with the state carried along."""
    model.eval()
    state: Any = None
    total, count = 0.0, 0
    for batch in batches(symbols, text.rows, text.steps):
        assert batch.target is not None
        logits, state, _ = model(batch.input, batch.carry(state))
        total += functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="sum").item()
        count += batch.target.numel()
    model.train()
    return total / count


def step(model: LanguageModel, optimizer: torch.optim.Optimizer, batch: training.StreamBatch, state: Any) -> State:
    """One update on one piece; returns the state to carry on."""
    assert batch.target is not None
    logits, state, penalty = model(batch.input, batch.carry(state))
    loss = functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten()) + penalty
    optimizer.zero_grad()
    loss.backward()
    training.clip_gradients(model, CLIP)
    optimizer.step()
    carried: State = truncated.detach(state)
    return carried


def train(
    model: LanguageModel, text: Text, epochs: int, parts: tuple[Tensor, Tensor, Tensor], tick: Callable[[], None]
) -> tuple[dict[str, float], dict[str, list[tuple[float, float]]]]:
    """Metrics and curves: the validation text every epoch, the test text where that was best and at the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=text.learning_rate, betas=(0.9, 0.99))
    total = epochs * len(list(batches(parts[0], text.rows, text.steps)))

    def rate(at: int) -> float:
        return min(1.0, (at + 1) / WARM_UP) * (0.05 + 0.475 * (1.0 + math.cos(math.pi * at / total)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    state: Any = None
    best, curve, metrics = math.inf, [], {}
    for epoch in range(1, epochs + 1):
        for batch in batches(parts[0], text.rows, text.steps):
            state = step(model, optimizer, batch, state)
            schedule.step()
            tick()
        found = evaluate(model, parts[1], text)
        curve.append((float(epoch), text.score(found)))
        if found < best or epoch == epochs:
            tested = text.score(evaluate(model, parts[2], text))
            metrics["last"] = tested
            if found < best:
                best, metrics["test"], metrics["epoch"] = found, tested, epoch
    metrics["training"] = text.score(evaluate(model, parts[0][: len(parts[1])], text))
    return metrics, {"validation": curve}


def make(text: Text, variant: Variant, symbols: int) -> LanguageModel:
    """A model by its variant, made after ``torch.manual_seed``."""
    layer = fusedreg.LSTM(text.embedding, text.hidden, **variant.layer)
    return LanguageModel(layer, symbols, text, variant.around)


def costs(text: Text, symbols: int, device: str, pairs: int) -> dict[str, Any]:
    """Each variant's training step in units of the plain model's around ``nn.LSTM``."""

    def work(model: LanguageModel) -> Callable[[], None]:
        model.to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(symbols, (text.steps + 1, text.rows), generator=generator).to(device)
        batch = training.StreamBatch(words[:-1], words[1:], None, 0, torch.arange(text.rows))
        return lambda: void(step(model, optimizer, batch, None))

    found = {}
    for variant in text.variants:
        torch.manual_seed(0)
        baseline = LanguageModel(nn.LSTM(text.embedding, text.hidden), symbols, text, {})
        found[variant.name] = harness.cost(work(make(text, variant, symbols)), work(baseline), device, pairs)
    return found


def void(result: object) -> None:
    """Drop a result: what is timed returns nothing."""


def draw(results: harness.Results, folder: Path) -> None:
    """Figures from results alone."""
    ((part, columns),) = results["columns"].items()
    name, metric = f"language_models_{part}", columns[0][1].removeprefix("test ")
    figures.curves(
        results,
        part,
        "validation",
        folder / f"{name}.png",
        ("epoch", f"validation {metric}"),
        log=metric == "perplexity",
    )
    figures.bars(results, part, "test", folder / f"{name}-test.png", f"test {metric}")


def run(settings: harness.Settings, text: Text) -> None:
    """All variants of one text with all seeds."""
    *parts, symbols = text.load(settings)
    on_device = tuple(part.to(settings.device) for part in parts)
    epochs = settings.pick(text.epochs, 1)
    columns = [
        ("test", f"test {text.metric[0]}", text.metric[1]),
        ("epoch", "of epoch", 0),
        ("last", "after the last epoch", text.metric[1]),
        ("training", "training text", text.metric[1]),
    ]
    sizes = {key: getattr(text, key) for key in ("embedding", "hidden", "tied", "rows", "steps", "learning_rate")}
    experiment = harness.Experiment(
        settings,
        {text.name: columns},
        {**sizes, "epochs": epochs, "clip": CLIP, "training_symbols": len(parts[0]), "symbols": symbols},
    )
    experiment.costs[text.name] = costs(text, symbols, settings.device, settings.pick(30, 2))
    updates = epochs * len(list(batches(parts[0], text.rows, text.steps)))
    jobs = [(seed, variant) for seed in settings.seeds for variant in text.variants]
    name = f"language_models_{text.name}"
    with experiment.progress(len(jobs) * updates) as bar:
        for seed, variant in jobs:
            torch.manual_seed(seed)
            model = make(text, variant, symbols).to(settings.device)
            experiment.variant(text.name, variant.name, variant.options(), model)
            label = f"{text.name}, {variant.name}, seed {seed}"
            metrics, curves = train(model, text, epochs, on_device, lambda label=label: bar(label))
            experiment.add(text.name, variant.name, seed, metrics, curves)
            experiment.save(name)
    results = experiment.results()
    draw(results, settings.folder)
    report.print_tables(results, experiment.console)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = harness.parser("language_models", "Language models, one regulariser at a time.", range(3))
    names = [text.name for text in TEXTS]
    parser.add_argument("--text", choices=[*names, "both"], default="both", help="default: %(default)s")
    options = parser.parse_args(arguments)

    def both() -> None:
        for text in TEXTS:
            if options.text in (text.name, "both"):
                run(harness.settings("language_models", options, arguments), text)

    return harness.main(both)


if __name__ == "__main__":
    sys.exit(main())
