"""What ``mkdocs`` makes while it builds: pictures, tables from results files, and pages that stand elsewhere too.

In a page, a comment on a line of its own is replaced:

``<!-- cost: variant, variant -->``  what these variants of the benchmark cost, from the committed results;
``<!-- readme: heading -->``         the section of README.md under that heading, without the heading;
``<!-- file: name -->``              a file of the repository's root, without its first heading.

``python docs/hooks.py FOLDER`` writes the pictures alone.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

sys.path.insert(0, str(ROOT))


def _script(name: str) -> ModuleType:
    """A script of this folder as a module; the folder is no package."""
    specification = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures to the site; none is written into the repository."""
    from mkdocs.structure.files import File

    for name, content in pictures().items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def pictures() -> dict[str, bytes]:
    """Every picture, by its file's name."""
    made: dict[str, bytes] = {}
    for script in ("drawings", "inspect_drawings", "examples_drawings"):
        made |= _script(script).draw_all()
    return made


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the comments."""
    return expand(markdown)


def expand(markdown: str) -> str:
    """The text of a page with its comments replaced."""
    made = {"cost": cost_table, "ratios": ratio_table, "readme": readme_section, "file": root_file}
    comment = rf"^<!-- ({'|'.join(made)}): (.*?) -->$"
    return re.sub(comment, lambda match: made[match[1]](match[2]), markdown, flags=re.MULTILINE)


def cost_table(names: str) -> str:
    """Time of a training call with each variant over that without, as the newest results of each machine have it."""
    from benchmarks.report import heading
    from benchmarks.results import find, load

    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*-regularizers.json")):
        results = load(path)
        rows = [f"| variant | {' | '.join(case['name'] for case in results['cases'])} |"]
        rows.append("|---|" + "---:|" * len(results["cases"]))
        for name in (part.strip() for part in names.split(",")):
            found = [find(case, name, "plain", "training") for case in results["cases"]]
            cells = ["–" if row is None or "ratio" not in row else f"{row['ratio']:.2f}" for row in found]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(rows) + f"\n\n{heading(results)}")
    if not parts:
        return "Not measured yet."
    lead = "Time of a forward and backward pass with it, over the time without (median of pairs, compared in one run):"
    return f"{lead}\n\n" + "\n\n".join(parts)


def ratio_table(kind: str) -> str:
    """The ratios of the results that are named ``…-<kind>.json``, one table a machine."""
    from benchmarks import tables
    from benchmarks.report import heading
    from benchmarks.results import load

    found = [load(path) for path in sorted((ROOT / "benchmarks" / "results").glob(f"*-{kind}.json"))]
    parts = [f"{tables.ratio_table(results).markdown()}\n\n{heading(results)}" for results in found]
    return "\n\n".join(parts) or "Not measured yet."


def _unlinked(text: str) -> str:
    """Links to files of the repository as plain names, links to pages of the site as links to them."""
    text = re.sub(r"\]\(docs/([\w/]+\.md)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|[\w/]+\.md\)|#)[^)]+\)", r"\1", text)


def readme_section(title: str) -> str:
    """A section of README.md."""
    text = (ROOT / "README.md").read_text()
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"docs: README.md has no section {title!r}")
    return re.sub(r"\[([^\]]+)\]\(#[^)]+\)", r"\1", _unlinked(match[1].strip()))


def root_file(name: str) -> str:
    """A file of the root."""
    return _unlinked(re.sub(r"\A# .*\n", "", (ROOT / name).read_text()))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures().items():
        (folder / name).write_bytes(content)
