"""Redraws the figures of the documentation from its data: python -m tools.studies.figures --out=DIR

Reads docs/results/data/*.csv and writes study_NAME.png for each study, weak_NAME.png for each
weak_scaling_NAME.csv, and curve_NAME.png for each curve_NAME.csv. For the documentation itself,
DIR is docs/figures.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from collections.abc import Callable
from pathlib import Path

from dgpt_jax import cli
from dgpt_jax.commands import charts
from dgpt_jax.planning import report
from dgpt_jax.storage import output_paths
from tools.studies import curves, result_tables

SCALING = "weak_scaling_"


def draw_study(path: Path, out: Path):
    _, differences, baseline = result_tables.study(path)
    charts.differences(differences, out, f"{path.stem.replace('_', ', ')}: minus {baseline}")


def draw_scaling(path: Path, out: Path):
    columns = {name: values for name, *values in zip(*result_tables.read(path), strict=True)}
    rates = {
        label: [float(x) for x in columns[f"images/s per chip, {name}"]]
        for name, label in report.COMMUNICATION.items()
    }
    chips = [int(x) for x in columns["chips"]]
    title = f"{columns['model'][0]}, at most (data sheets)"
    charts.scaling(chips, rates, out, title)


def sources(data: Path) -> dict[str, tuple[Callable[[Path, Path], None], Path]]:
    """{name of a figure: (function that draws it, its CSV file)}, of the directory `data`."""
    figures = {}
    for path in sorted(data.glob("*.csv")):
        if result_tables.is_study(path):
            figures[f"study_{path.stem}.png"] = draw_study, path
        elif path.stem.startswith(SCALING):
            figures[f"weak_{path.stem.removeprefix(SCALING)}.png"] = draw_scaling, path
        elif path.stem.startswith(curves.PREFIX):
            figures[f"{path.stem}.png"] = curves.draw, path
    return figures


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("--out", required=True, type=cli.local_path, help="directory of figures")
    args = parser.parse_args()
    output_paths.directory(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (draw, path) in sources(result_tables.DATA).items():
        draw(path, args.out / name)
        print(f"wrote {args.out / name}")
    print("next: look at the figures; docs/results/ shows those in docs/figures")


if __name__ == "__main__":
    cli.run(main)
