"""Real input: a character model trained on Shakespeare's plays, the same one with each implementation of the LSTM.

    python -m benchmarks.character_model --json benchmarks/results/character_model-cpu.json --plots build/plots

An embedding, two LSTM layers and a linear layer, trained by truncated back-propagation through time: contiguous
streams, states carried from one piece to the next and detached. All models start from the same weights and see the
same pieces in lockstep, so that their times are compared step by step. The eager loop runs on fewer steps: it is
there for its time. The exit status is 1 where fusedreg's held-out bits are not within 2% of ``nn.LSTM``'s.

The budget is a fraction of one pass over the plays, where a regulariser costs bits instead of saving them: what the
regularised run shows here is what it costs in time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import machine, results
from benchmarks.eager import EagerLSTM
from benchmarks.report import character_table
from benchmarks.shakespeare import Corpus, encode, load, rows
from benchmarks.timing import spread
from benchmarks.variants import Unavailable, fusedreg_class, require_backend

State = tuple[Tensor, Tensor]
TOLERANCE = 0.02
RATES: Mapping[str, float] = {
    "dropout": 0.1,
    "input_dropout": 0.1,
    "hidden_dropout": 0.1,
    "weight_dropout": 0.1,
    "zoneout_hidden": 0.05,
    "zoneout_cell": 0.05,
}


@dataclass(frozen=True)
class Config:
    """The model, its budget and how it is trained."""

    steps: int = 700
    eager_steps: int = 50
    batch_size: int = 32
    piece: int = 64
    embedding_size: int = 128
    hidden_size: int = 256
    layers: int = 2
    learning_rate: float = 8e-3
    clip: float = 1.0
    evaluations: int = 4
    evaluation_rows: int = 64
    evaluation_characters: int = 96_000
    sample_characters: int = 400
    temperature: float = 0.7
    seed: int = 0
    device: str = "cpu"
    backend: str = ""


class CharacterModel(nn.Module):
    """Embedding, recurrent layers and a linear layer over the characters. ``recurrent`` has ``nn.LSTM``'s call."""

    def __init__(self, recurrent: nn.Module, characters: int, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, config.embedding_size)
        self.recurrent = recurrent
        self.head = nn.Linear(config.hidden_size, characters)

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``text (T, B)`` → logits ``(T, B, characters)`` and the state after the last step."""
        output, state = self.recurrent(self.embedding(text), state)
        logits = self.head(output)
        assert isinstance(logits, Tensor)
        assert state is not None
        return logits, state


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean bits per character."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2.0)


@torch.no_grad()
def held_out_bits(model: CharacterModel, text: Tensor, config: Config) -> float:
    """Bits per character of ``text (N,)``, read in ``evaluation_rows`` streams that start from a zero state."""
    model.eval()
    streams = rows(text[: config.evaluation_characters], min(config.evaluation_rows, text.numel() // 2))
    state: State | None = None
    total, count = 0.0, 0
    for inputs, targets, _ in pieces(streams, config.piece):
        logits, state = model(inputs, state)
        total += bits(logits, targets).item() * targets.numel()
        count += targets.numel()
    model.train()
    return total / count


def pieces(streams: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Consecutive ``(inputs, targets, first)`` of ``length`` steps, one ahead; the last may be shorter."""
    for start in range(0, streams.shape[0] - 1, length):
        end = min(start + length, streams.shape[0] - 1)
        yield streams[start:end], streams[start + 1 : end + 1], start == 0


def endless(streams: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """The pieces again and again; ``first`` says where a pass begins, and with it a zero state."""
    while True:
        yield from pieces(streams, length)


@dataclass
class Learner:
    """One model in training, with what is known of it so far."""

    name: str
    model: CharacterModel
    steps: int
    config: Config
    state: State | None = None
    step_seconds: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        """A short warm-up, then a cosine down to a twentieth. Every model follows the full budget's schedule."""
        warm_up = max(1, self.config.steps // 20)
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.05 + 0.475 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, self.config.steps - warm_up)))

    def step(self, inputs: Tensor, targets: Tensor, first: bool) -> float:
        """One update on one piece; returns its bits per character."""
        synchronize(self.config.device)
        begin = time.perf_counter()
        state = None if first or self.state is None else (self.state[0].detach(), self.state[1].detach())
        logits, self.state = self.model(inputs, state)
        loss = bits(logits, targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        synchronize(self.config.device)
        self.step_seconds.append(time.perf_counter() - begin)
        value = loss.item()
        self.curve.append({"step": len(self.step_seconds), "seconds": sum(self.step_seconds), "bits": value})
        return value

    def evaluate(self, text: Tensor) -> float:
        """Held-out bits per character now; they are kept."""
        value = held_out_bits(self.model, text, self.config)
        seconds = sum(self.step_seconds)
        self.held_out.append({"step": len(self.step_seconds), "seconds": seconds, "bits": value})
        return value

    def record(self, baseline: Learner) -> dict[str, Any]:
        """What the results file says of this model; its time is compared with ``baseline``'s on the same steps."""
        # The first steps allocate and compile; they are no part of the comparison.
        skip = min(3, len(self.step_seconds) - 1)
        pairs = list(zip(self.step_seconds, baseline.step_seconds, strict=False))[skip:]
        ratio = spread([one / two for one, two in pairs])
        smoothed = _thin(self.curve, 100)
        return {
            "name": self.name,
            "steps": len(self.step_seconds),
            "step_milliseconds": spread(self.step_seconds[skip:]).median * 1e3,
            "seconds": sum(self.step_seconds),
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.lower, ratio.upper],
            "curve": smoothed,
            "held_out": self.held_out,
        }


def _thin(curve: list[dict[str, float]], points: int) -> list[dict[str, float]]:
    """At most ``points`` points, each the mean of its neighbours' bits at the last one's place."""
    size = math.ceil(len(curve) / points)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [{**group[-1], "bits": sum(point["bits"] for point in group) / len(group)} for group in groups]


def synchronize(device: str) -> None:
    """Wait for the device, where it works on its own."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def make_learners(config: Config, characters: int) -> list[Learner]:
    """``nn.LSTM``, fusedreg plain, fusedreg regularised and the eager loop, all with the same initial weights."""
    backend = config.backend or torch.device(config.device).type
    require_backend(backend)
    fused = fusedreg_class("LSTM")
    rates: dict[str, Any] = dict(RATES)
    sizes = (config.embedding_size, config.hidden_size, config.layers)
    makers: list[tuple[str, Callable[[], nn.Module], int]] = [
        ("nn.LSTM", lambda: nn.LSTM(*sizes), config.steps),
        ("fusedreg", lambda: fused(*sizes, backend=backend), config.steps),
        ("fusedreg, regularised", lambda: fused(*sizes, backend=backend, **rates), config.steps),
        ("eager loop, regularised", lambda: EagerLSTM(*sizes, **rates), min(config.eager_steps, config.steps)),
    ]
    torch.manual_seed(config.seed)
    models = [CharacterModel(make(), characters, config) for _, make, _ in makers]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return [
        Learner(name, model.to(config.device), steps, config)
        for (name, _, steps), model in zip(makers, models, strict=True)
    ]


@torch.no_grad()
def sample(model: CharacterModel, characters: str, config: Config, prompt: str = "\n") -> str:
    """Text that the model makes up, a character at a time, at ``config.temperature``."""
    model.eval()
    generator = torch.Generator().manual_seed(config.seed)
    logits, state = model(encode(prompt, characters).unsqueeze(1).to(config.device))
    text = prompt
    for _ in range(config.sample_characters):
        chances = (logits[-1, 0].float().cpu() / config.temperature).softmax(0)
        choice = torch.multinomial(chances, 1, generator=generator)
        text += characters[int(choice)]
        logits, state = model(choice.view(1, 1).to(config.device), state)
    model.train()
    return text


def train(corpus: Corpus, config: Config, console: Console) -> results.Results:
    """Train every model and return what goes into the results file."""
    learners = make_learners(config, len(corpus.characters))
    streams = rows(corpus.training, config.batch_size).to(config.device)
    held_out = corpus.held_out.to(config.device)
    console.print(
        f"{corpus.training.numel():,} characters to train on, {corpus.held_out.numel():,} held out, "
        f"{len(corpus.characters)} different; {config.steps} steps of {config.batch_size} x {config.piece}"
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=console,
    )
    marks = {config.steps * number // config.evaluations for number in range(1, config.evaluations + 1)}
    with bar as progress:
        task = progress.add_task("character model", total=config.steps, losses="bits before training")
        for learner in learners:
            learner.evaluate(held_out)
        for number, piece in zip(range(1, config.steps + 1), endless(streams, config.piece), strict=False):
            active = [learner for learner in learners if number <= learner.steps]
            # Who goes first rotates, so that none always finds the cache as another left it.
            turn = number % len(active)
            losses = {learner.name: learner.step(*piece) for learner in active[turn:] + active[:turn]}
            for learner in active:
                if number == learner.steps or (number in marks and learner.steps == config.steps):
                    value = learner.evaluate(held_out)
                    if not console.is_terminal:
                        console.print(f"step {number}: {learner.name}: {value:.3f} held-out bits per character")
            shown = "  ".join(f"{learner.name} {losses[learner.name]:.2f}" for learner in active)
            progress.update(task, advance=1, losses=shown)
    baseline, ours = learners[0].held_out[-1]["bits"], learners[1].held_out[-1]["bits"]
    return {
        "format": results.FORMAT,
        "kind": "character_model",
        "machine": machine.describe(config.device),
        "config": asdict(config),
        "rates": dict(RATES),
        "characters": len(corpus.characters),
        "training_characters": corpus.training.numel(),
        "held_out_characters": corpus.held_out.numel(),
        "models": [learner.record(learners[0]) for learner in learners],
        "tolerance": TOLERANCE,
        "within": abs(ours / baseline - 1.0) <= TOLERANCE,
        "sample": sample(learners[1].model, corpus.characters, config),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.character_model", description="Trains on Shakespeare.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the curves into this folder")
    parser.add_argument("--steps", type=int, default=Config.steps, help="updates of each model (default: %(default)s)")
    parser.add_argument("--eager-steps", type=int, default=Config.eager_steps, help="of the eager loop's model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="", help="fusedreg's backend (default: the device's own kernels)")
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument("--threads", type=int, help="torch's threads")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = Config(
        steps=options.steps,
        eager_steps=options.eager_steps,
        device=options.device,
        backend=options.backend,
        seed=options.seed,
    )
    try:
        corpus = load()
        found = train(corpus, config, console)
    except (RuntimeError, Unavailable) as error:
        console.print(f"error: {error}", markup=False)
        return 2
    console.print(character_table(found).rich())
    verdict = "within" if found["within"] else "NOT within"
    console.print(f"fusedreg's held-out bits are {verdict} {TOLERANCE:.0%} of nn.LSTM's at the same budget")
    console.print("A sample of what fusedreg's model writes:", found["sample"], markup=False, highlight=False)
    if options.json is not None:
        results.save(found, options.json)
        console.print(f"results: {options.json}")
    if options.plots is not None:
        from benchmarks.plots import plot_curves

        console.print(f"plot: {plot_curves(found, options.plots / 'character_model.png')}")
    return 0 if found["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
