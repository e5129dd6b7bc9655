"""The docstrings' few marks that Markdown does not know, made into those that it does, for the pages of the API."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Marks(griffe.Extension):
    """Roles of reStructuredText become code, its literal blocks Markdown's, and ``Example:`` a section."""

    def on_object(self, *, obj: Any, **unused: Any) -> None:
        """Called for every object that is collected."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """One docstring.

    Example:
        >>> markdown("See :class:`~fusedreg.LSTM`::")
        'See `fusedreg.LSTM`:'
    """
    text = re.sub(r":(?:class|func|mod|meth|attr|data):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)
