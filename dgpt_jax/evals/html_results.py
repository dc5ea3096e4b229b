"""Results files (evals/results.py) of work directories as HTML tables."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dgpt_jax.errors import UserError
from dgpt_jax.evals import report, results
from dgpt_jax.monitoring import html

# The first columns of a table; others follow in the order of the rows.
FIRST = (
    "protocol", "data", "features", "k", "shots", "accuracy", "95 % interval", "mean error", "mCE",
    "test", "selection",
)  # fmt: skip
PERCENT = ("accuracy", "mean error", "mCE", "sd")
HIDDEN = (*results.HIDDEN, "correct", "low", "high")  # parts of the interval's column, or internal


def section(*runs: epath.PathLike) -> str:
    """HTML of all results*.json of these work directories: a table per file, and published numbers
    beside what was measured on complete test sets of ImageNet. A damaged file becomes a note."""
    parts, models = [], []
    for path in (path for run in runs for path in sorted(epath.Path(run).glob("results*.json"))):
        try:
            content = results.read(path)
            rows = [dict(row) for row in content["results"]]
            title = f"{path.name}: {content['weights']}"
            parts += [html.heading(title), _table(rows)]
            models.append(content | {"results": rows})
        except (UserError, ValueError, TypeError) as e:
            parts.append(html.note(str(e)))
    return "\n".join([*parts, *_published(models)])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows, and those of details (each head of a grid, each corruption) folded below."""
    main = [row for row in rows if not row.get("detail")]
    details = [row for row in rows if row.get("detail")]
    folded = html.details(f"{len(details)} detailed rows", _rows(details)) if details else ""
    return (_rows(main) if main else "") + folded


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [_cells(row) for row in rows]
    names = dict.fromkeys([*FIRST, *(name for row in cells for name in row)])
    columns = [name for name in names if any(row.get(name) is not None for row in cells)]
    return html.table(columns, [[row.get(name) for name in columns] for row in cells])


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """{column: cell} of a row: accuracies in percent with one decimal."""
    cells = {name: _cell(name, value) for name, value in row.items() if name not in HIDDEN}
    low, high = row.get("low"), row.get("high")
    if isinstance(low, float) and isinstance(high, float):
        cells["95 % interval"] = html.Number(f"{low:.1f}–{high:.1f}")
    return cells


def _cell(name: str, value: Any) -> Any:
    if name in PERCENT and isinstance(value, (int, float)):
        return html.Number(html.percent(value))
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value)
    return None if value == "" else value


def _published(models: Sequence[dict]) -> list[str]:
    """Tables of published numbers in which these models have lines, which come first, marked."""
    try:
        tables = [table for table in report.tables(models) if table.ours]
    except (KeyError, TypeError) as e:  # rows that were edited by hand
        return [html.note(f"published numbers are left out: the results lack {e}")]
    parts = []
    for table in tables:
        ours = [[_published_cell(cell) for cell in line] for line in table.ours]
        others = [list(map(_published_cell, line)) for line in table.published]
        marked = range(len(ours))
        parts += [html.heading(table.title), html.table(table.columns, [*ours, *others], marked)]
    return parts


def _published_cell(cell: Any) -> Any:
    if isinstance(cell, report.Measured):
        return html.Number(f"{cell.value:.1f}{cell.suffix}")
    return html.Number(cell) if str(cell)[:1].isdigit() else cell
