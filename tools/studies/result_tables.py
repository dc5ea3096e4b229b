"""Tables of the documentation's results, stored as CSV: docs/results/data/NAME.csv.

A study has one line per row and column of its tables (COLUMNS): accuracies and differences to the
baseline in points, each with the half width of its 95 % interval, and whether the interval of the
difference excludes 0. Any other file is one table; its first line names columns and units.
"""

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path

from dgpt_jax.errors import UserError
from dgpt_jax.evals import ablations
from dgpt_jax.monitoring import markdown
from dgpt_jax.storage import atomic

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs/results/data"
COLUMNS = (
    "row", "protocol", "labels", "accuracy", "accuracy_ci95", "difference", "difference_ci95",
    "excludes_0",
)  # fmt: skip

# {row: {"PROTOCOL LABELS": (mean, half width of the interval, NaN where there is none)}}
Cells = Mapping[str, Mapping[str, tuple[float, float]]]


def read(path: Path) -> list[list[str]]:
    """Lines of a CSV file, the header first. Raises UserError if they differ in length."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if len({len(line) for line in lines}) != 1:
        raise UserError(f"{path}: lines have different numbers of cells")
    return lines


def is_study(path: Path) -> bool:
    return tuple(read(path)[0]) == COLUMNS


def study(path: Path) -> tuple[Cells, Cells, str]:
    """(accuracies, differences, baseline) of a study."""
    accuracies: dict[str, dict] = {}
    differences: dict[str, dict] = {}
    rows: list[str] = []
    for row, protocol, labels, *numbers, excludes_0 in read(path)[1:]:
        mean, half, difference, difference_half = (float(x) if x else math.nan for x in numbers)
        if excludes_0 == "yes" and abs(difference) <= difference_half:  # equal after rounding
            difference_half = math.nextafter(abs(difference), 0)
        column = f"{protocol} {labels}"
        if not math.isnan(mean):
            accuracies.setdefault(row, {})[column] = mean, half
        if not math.isnan(difference):
            differences.setdefault(row, {})[column] = difference, difference_half
        rows.append(row)
    trained = [row for row in rows if row not in ablations.REFERENCE_ROWS]
    return accuracies, differences, trained[0]


def write_study(path: Path, accuracies: Cells, differences: Cells):
    """Writes a study; rows of `differences` are also in `accuracies`. Raises UserError."""

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row, columns in accuracies.items():
        for column, pair in columns.items():
            mean, half = differences.get(row, {}).get(column, (math.nan, math.nan))
            numbers = ("" if math.isnan(x) else f"{x:.4g}" for x in (*pair, mean, half))
            excludes_0 = "" if math.isnan(half) else "yes" if abs(mean) > half else "no"
            writer.writerow([row, *column.split(), *numbers, excludes_0])
    atomic.write_text(path, text.getvalue())


def tables(path: Path) -> list[str]:
    """Markdown tables of a CSV file, as the documentation shows them."""
    if not is_study(path):
        head, *rows = read(path)
        return [markdown.table(head, ([*map(_thousands, row)] for row in rows))]
    accuracies, differences, baseline = study(path)
    result = [ablations.table(accuracies, "accuracy, %")] if accuracies else []
    return [*result, ablations.table(differences, f"minus {baseline}", sign="+")]


def _thousands(cell: str) -> str:
    """Groups the digits of an integer of four digits or more."""
    return f"{int(cell):,}" if re.fullmatch(r"\d{4,}", cell) else cell
