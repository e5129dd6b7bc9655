"""README.md and CONTRIBUTING.md: the examples run, what they name exists, and no figure comes from elsewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import fusedreg

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    (match[1], README.count("\n", 0, match.start(1)))
    for match in re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
]


def contributing() -> str:
    """A source distribution need not have it."""
    path = ROOT / "CONTRIBUTING.md"
    if not path.exists():
        pytest.skip("not run: no CONTRIBUTING.md here")
    return path.read_text()


@pytest.mark.parametrize(("source", "lines_before"), BLOCKS, ids=[f"line{lines + 1}" for _, lines in BLOCKS])
def test_examples_run(source: str, lines_before: int) -> None:
    """Each by itself, as someone would paste it; errors name the README's line."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the examples are small: a team would only wait
    try:
        exec(compile("\n" * lines_before + source, str(ROOT / "README.md"), "exec"), {"__name__": "example"})
    finally:
        torch.set_num_threads(threads)


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 10


def test_every_option_is_described() -> None:
    for field in dataclasses.fields(fusedreg.Regularization):
        assert re.search(rf"^\|.*`{field.name}[`=]", README, re.MULTILINE), f"no row for {field.name}"
    for field in dataclasses.fields(fusedreg.BatchNorm):
        # The terms, and eps, have their words in the docstrings.
        assert field.name in ("input", "recurrent", "cell", "eps") or field.name in README, field.name


def test_the_equations_are_the_references() -> None:
    """One text in two places: the reference's docstring is the law."""
    from fusedreg import reference

    law = re.search(r"::\n\n(.*?)\n\nwhere", reference.__doc__ or "", re.DOTALL)
    assert law is not None
    for line in law[1].splitlines():
        assert re.sub(r"\s+", " ", line.strip()) in re.sub(r"[ ]+", " ", README), line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name: str) -> None:
    document = README if name == "README.md" else contributing()
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", document):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_and_commands_that_are_named_exist(name: str) -> None:
    document = README if name == "README.md" else contributing()
    folders = ("benchmarks", "csrc", "docs", "examples", "fusedreg", "tests", "tools")
    known = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    known |= {path.name for path in ROOT.iterdir()}
    planned = {"registration_cuda.cpp"}  # the build looks for it already
    named = set(re.findall(r"\b(\w+\.(?:py|h|cpp|md|toml|txt))\b", document))
    if (ROOT / "benchmarks").exists():
        assert named - known - planned == set()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", document, re.MULTILINE)) <= targets


def test_every_source_file_has_its_line() -> None:
    """The layout in CONTRIBUTING.md keeps up with the code."""
    document = contributing()
    sources = [path for suffix in ("*.h", "*.cpp", "*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(suffix)]
    sources += [path for path in (ROOT / "fusedreg").rglob("*.py") if path.name not in ("__init__.py", "_version.py")]
    missing = sorted(str(path.relative_to(ROOT)) for path in sources if path.name not in document)
    assert not missing


def test_figures_come_from_the_results() -> None:
    """Between the markers: tables that a committed file makes, and no other digit."""
    match = re.search(r"<!-- benchmarks -->\n(.*?)\n<!-- /benchmarks -->", README, re.DOTALL)
    assert match is not None, "benchmarks.report --update has no place to write to"
    text = match[1]
    if not (ROOT / "benchmarks").exists():
        pytest.skip("not run: a source distribution has no benchmarks")
    from benchmarks.report import markdown
    from benchmarks.results import load

    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        text = text.replace(markdown(load(path)), "")
    assert not re.search(r"\d", text), f"not from benchmarks/results: {text}"
