"""What the pages of ``docs/`` state as a fact of the code is compared with the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compiled

from benchmarks.registry import ALL, SINGLE
from fusedreg import Regularization
from fusedreg.backends import cuda

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]
DEVICES = {"H200, H100": cuda.DeviceLimits(132, 232448, 9, 0), "A100": cuda.DeviceLimits(108, 166912, 8, 0)}
TYPES = {
    "bfloat16, float16": (torch.bfloat16, "highest"),
    "TF32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}
ROWS = (1, 16, 64, 128, 256)
REGULARIZED = Regularization(zoneout_hidden=0.1, zoneout_cell=0.1, hidden_dropout=0.2, update_dropout=0.1)


def persistent(limits: cuda.DeviceLimits, dtype: torch.dtype, rows: int, hidden_size: int) -> bool:
    sizes = {"steps": 100, "batch_size": rows, "input_size": hidden_size, "hidden_size": hidden_size}
    return "step: " not in cuda.plan(limits, dtype, **sizes, regularization=REGULARIZED)


def largest(limits: cuda.DeviceLimits, dtype: torch.dtype, rows: int) -> int:
    low, high = 0, 512
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if persistent(limits, dtype, rows, 8 * middle) else (low, middle)
    return 8 * low


def capacity_table() -> str:
    lines = [
        "| device | type | " + " | ".join(f"`B` {rows}" for rows in ROWS) + " |",
        "|---|---|" + "---:|" * len(ROWS),
    ]
    before = torch.get_float32_matmul_precision()
    try:
        for device, limits in DEVICES.items():
            for name, (dtype, precision) in TYPES.items():
                torch.set_float32_matmul_precision(precision)
                cells = [str(largest(limits, dtype, rows)) for rows in ROWS]
                lines.append(f"| {device} | {name} | " + " | ".join(cells) + " |")
    finally:
        torch.set_float32_matmul_precision(before)
    return "\n".join(lines)


@compiled
def test_the_capacity_table_is_the_plans() -> None:
    """To bring the page up to date: ``python tests/test_docs.py``."""
    text = (DOCS / "cuda.md").read_text()
    (stated,) = re.findall(r"<!-- capacity -->\n(.*?)\n?<!-- /capacity -->", text, re.DOTALL)
    assert stated == capacity_table(), "run python tests/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http") and "pictures/" not in target:  # these are drawn by the build, which checks
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:csrc|fusedreg|tools|tests|benchmarks)/[\w./]+)`", text):
        assert (DOCS.parent / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_examples_run(page: Path) -> None:
    """Each block by itself, as someone would paste it; what is inserted from README.md is tested there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the examples are small: a team would only wait
    text = page.read_text()
    try:
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            lines_before = text.count("\n", 0, match.start(1))
            exec(compile("\n" * lines_before + match[1], str(page), "exec"), {"__name__": "example"})
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (DOCS.parent / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


def test_every_regulariser_has_a_page() -> None:
    """With its equation, paper, picture, cost and pitfalls, and every option on one of them."""
    pages = {page.name: page.read_text() for page in (DOCS / "regularisers").glob("*.md") if page.name != "index.md"}
    for name, text in pages.items():
        assert "20" in text.splitlines()[2] and "```\n" in text, f"{name}: a paper and an equation come first"
        assert re.search(r"!\[.+\]\(\.\./pictures/\w+\.png\)", text), name
        assert "**Cost**" in text and "<!-- cost: " in text and "**Pitfalls.**" in text, name
        assert "**In evaluation**" in text, name
    everything = "\n".join(pages.values())
    for field in dataclasses.fields(Regularization):
        assert f"{field.name}" in everything, field.name


def test_what_is_inserted_exists() -> None:
    hooks = load_hooks()
    for page in PAGES:
        for kind, name in re.findall(r"^<!-- (cost|ratios|readme|file): (.*?) -->$", page.read_text(), re.MULTILINE):
            assert len(hooks.expand(f"<!-- {kind}: {name} -->")) > 10, f"{page}: {kind} {name}"
            if kind == "cost":
                known = {variant.name for variant in (*SINGLE, ALL)}
                assert {part.strip() for part in name.split(",")} <= known, f"{page}: {name}"


def load_hooks() -> Any:
    specification = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.build
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="not run: mkdocs is not installed")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's opinion of another program's next version
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in PAGES:
        assert (tmp_path / page.relative_to(DOCS)).with_suffix(".html").exists(), page


if __name__ == "__main__":
    page = DOCS / "cuda.md"
    new = f"<!-- capacity -->\n{capacity_table()}\n<!-- /capacity -->"
    page.write_text(re.sub(r"<!-- capacity -->.*?<!-- /capacity -->", new, page.read_text(), flags=re.DOTALL))
