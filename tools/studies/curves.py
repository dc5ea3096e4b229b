"""Curves of the documentation, stored as CSV: docs/results/data/curve_NAME.csv.

    python -m tools.studies.curves RUN --metrics=heldout/next,knn/mean --out=curve_NAME.csv

writes the evaluations of a run, one line per step at which all metrics were logged. The first
column is the step; a column "PANEL: LINE" is drawn as a line of a panel, and a column "PANEL: ±"
as a band around the line before it.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dgpt_jax import cli
from dgpt_jax.commands import plot
from dgpt_jax.errors import UserError
from dgpt_jax.evals import ablations
from dgpt_jax.monitoring import metrics_log
from dgpt_jax.storage import atomic, output_paths
from tools.studies import result_tables

PREFIX = "curve_"
BAND = "±"


def with_defaults(*flags: str) -> list[str]:
    """The command line with each flag NAME=VALUE that it does not give itself in front."""
    argv = sys.argv[1:]
    names = {word.partition("=")[0] for word in argv}
    return [*(flag for flag in flags if flag.partition("=")[0] not in names), *argv]


def write(path: Path, lines: Sequence[Sequence[str]]):
    """Writes the lines of a table, the header first."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    atomic.write_text(path, text.getvalue())


def write_accuracies(path: Path, numbers: Mapping[str, Mapping[int, Mapping[str, float]]]):
    """Writes a study of {row: {seed: {column: accuracy}}}; the first row is the baseline."""
    baseline = next(iter(numbers))
    differences = ablations.differences(numbers, baseline)
    result_tables.write_study(path, ablations.means(numbers), differences)


def of_run(run: Path | str, names: Sequence[str]) -> list[list[str]]:
    """Lines of a curve CSV: the steps at which all metrics were logged. Raises UserError."""
    log = metrics_log.read(run)
    metrics_log.select_metrics([log], ",".join(names))  # raises for unknown ones
    values = [log.curves[name].as_dict() for name in names]
    steps = sorted(set.intersection(*(set(curve) for curve in values)))
    if not steps:
        raise UserError(f"{run} has no step at which all of {', '.join(names)} were logged")
    head = ["step", *(name.replace("/", ": ") for name in names)]
    return [head, *([str(step), *(f"{x[step]:.4g}" for x in values)] for step in steps)]


def draw(path: Path, out: Path):
    """Draws a curve CSV, one panel per group of columns. Raises UserError."""
    head, *lines = result_tables.read(path)
    columns = [[float(x) for x in column] for column in zip(*lines, strict=True)]
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(head[1:], 1):
        panel, separator, _ = name.partition(": ")
        if not separator:
            raise UserError(f"{path}: the column {name!r} must be named 'PANEL: LINE'")
        groups.setdefault(panel, []).append(i)
    size = (4.2 * len(groups), 3.4)
    figure, axes = plot.plt.subplots(1, len(groups), figsize=size, squeeze=False)
    for axis, (panel, indices) in zip(axes[0], groups.items(), strict=True):
        for i in indices:
            label, values = head[i].partition(": ")[2], columns[i]
            if label == BAND:
                middle = columns[i - 1]
                low, high = (
                    [m + sign * x for m, x in zip(middle, values, strict=True)] for sign in (-1, 1)
                )
                axis.fill_between(columns[0], low, high, alpha=0.25)
            else:
                axis.plot(columns[0], values, label=label)
        axis.set(title=panel, xlabel=head[0])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    plot.save(figure, out)


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("run", type=cli.path, help="work directory")
    parser.add_argument("--metrics", required=True, help="names, comma-separated")
    parser.add_argument("--out", required=True, type=cli.local_path, help="CSV file")
    args = parser.parse_args()
    output_paths.file(args.out, (".csv",))
    names = [name.strip() for name in args.metrics.split(",") if name.strip()]
    write(args.out, of_run(args.run, names))
    print(f"wrote {args.out}")
    print("next: python -m tools.studies.figures --out=docs/figures draws it from the data")


if __name__ == "__main__":
    cli.run(main)
