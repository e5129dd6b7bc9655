"""The pictures of the page on the worked examples, from the committed results alone.

``mkdocs`` calls :func:`draw_all` through ``docs/hooks.py``; nothing of it is committed. To look at them without the
site: ``python docs/hooks.py build/drawings``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.harness import COMMITTED, load


def draw_all() -> dict[str, bytes]:
    """Every picture as a PNG file, by the file's name."""
    with TemporaryDirectory() as folder:
        for path in sorted(COMMITTED.glob("*.json")):
            results = load(path)
            import_module(f"examples.{results['example']}").draw(results, Path(folder))
        return {f"examples_{path.name.replace('-', '_')}": path.read_bytes() for path in Path(folder).glob("*.png")}
