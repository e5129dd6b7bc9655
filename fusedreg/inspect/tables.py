"""Data as pandas tables, and scalars and histograms to a TensorBoard writer: what every kind of data here offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


def to_pandas(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> pandas.DataFrame:
    """A table of ``rows``, with its columns in order also where there are no rows.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_pandas() needs pandas: pip install pandas, or use rows(), which gives the same as dictionaries"
        ) from error
    return pandas.DataFrame(list(rows), columns=list(columns))


def check_writer(writer: Any) -> None:
    """Raise a :class:`TypeError` unless ``writer`` is a TensorBoard writer, or takes scalars and histograms as one."""
    missing = [name for name in ("add_scalar", "add_histogram") if not callable(getattr(writer, name, None))]
    if missing:
        raise TypeError(
            f"writer: expected a torch.utils.tensorboard.SummaryWriter, got {type(writer).__name__} without "
            f"{' and '.join(missing)}; make one with SummaryWriter(folder)"
        )
