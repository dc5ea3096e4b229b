"""Markdown tables."""

from collections.abc import Iterable, Sequence


def row(cells: Iterable) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(columns: Sequence[str], rule: str = "---") -> str:
    """The two lines above the rows of a table; `rule` underlines each column."""
    return f"{row(columns)}\n|{'|'.join([rule] * len(columns))}|"


def table(columns: Sequence[str], rows: Iterable[Iterable], rule: str = "---") -> str:
    """A table without a final newline."""
    return "\n".join([header(columns, rule), *map(row, rows)])
