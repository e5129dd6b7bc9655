"""What the pages of ``docs/`` state as a fact of the code is compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import compiled

from fusedreg import Regularization
from fusedreg.backends import cuda

DOCS = Path(__file__).resolve().parent.parent / "docs"
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


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:csrc|fusedreg|tools|tests|benchmarks)/[\w./]+)`", text):
        assert (DOCS.parent / name).exists(), name


@pytest.mark.parametrize("page", ["cuda.md", "triton.md"])
def test_the_examples_run(page: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(compile(code, page, "exec"), {})


if __name__ == "__main__":
    page = DOCS / "cuda.md"
    new = f"<!-- capacity -->\n{capacity_table()}\n<!-- /capacity -->"
    page.write_text(re.sub(r"<!-- capacity -->.*?<!-- /capacity -->", new, page.read_text(), flags=re.DOTALL))
