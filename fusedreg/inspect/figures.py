"""What all figures share: matplotlib when it is needed and not before, sizes, colours, heat maps.

Figures are :class:`matplotlib.figure.Figure` objects that belong to nobody: no window, no ``pyplot``. A notebook shows
them, ``figure.savefig("flow.pdf")`` writes them. Their width is a column's of a two-column paper unless told
otherwise; colours are told apart by colour-blind readers (Okabe and Ito 2008), and where lines share axes by their
dashes too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN_WIDTH = 3.4
"""Inches: a column of most two-column papers."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1)))
SEQUENTIAL, DIVERGING = "cividis", "PuOr"

_STYLE: Any = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "figure.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.1,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.hashsalt": "fusedreg",
}


def style(position: int) -> dict[str, Any]:
    """Colour and dashes of the line at ``position``: 35 that differ."""
    return {"color": COLOURS[position % len(COLOURS)], "linestyle": DASHES[position % len(DASHES)]}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """The settings of the figures, in the block alone.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("fusedreg.inspect draws with matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = COLUMN_WIDTH, row_height: float = 1.5, **options: Any
) -> tuple[Figure, list[list[Any]]]:
    """A figure in the constrained layout, and its axes row by row.

    Args:
        rows, columns: of axes.
        width: in inches.
        row_height: of each row of axes, in inches.
        **options: of ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    if not width > 0:
        raise ValueError(f"width: expected inches above 0, got {width}")
    figure = Figure(figsize=(width, rows * row_height + 0.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [list(row) for row in axes]


def heat_map(axes: Any, values: Any, *, diverging: bool, limit: float) -> Any:
    """One panel: ``values`` with the channels downwards.

    Args:
        axes: to draw into.
        values: ``(channels, columns)``, a NumPy array; what is not finite is drawn in red.
        diverging: colours on both sides of 0, from ``-limit`` to ``limit``; else from 0 to ``limit``.
        limit: the value of the last colour.
    """
    import matplotlib

    colours = matplotlib.colormaps[DIVERGING if diverging else SEQUENTIAL].with_extremes(bad="#D00000")
    return axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=-limit if diverging else 0.0,
        vmax=limit,
        rasterized=True,
    )
