"""Draws metrics of runs against their steps: python tools/plot.py DIR… --out=FILE.png"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dgpt_jax import cli
from dgpt_jax.schema import UserError


def read(run) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl: is it a work directory?")
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(runs, names, out):
    """One panel a metric, one line a run that has it."""
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for i, run in enumerate(runs):
            lines = [line for line in read(run) if name in line]
            if lines:
                steps, values = [x["step"] for x in lines], [x[name] for x in lines]
                marker = "o" if len(lines) < 8 else None
                axis.plot(
                    steps, values, color=f"C{i}", label=Path(run).name, marker=marker, markersize=3
                )
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)


def table(cells: dict[str, dict[tuple, tuple[float, float]]]) -> str:
    """Markdown of {row: {(protocol, labels a class): (mean, standard error)}}."""
    columns = list(next(iter(cells.values())))
    titles = [f"{protocol} {shots}" for protocol, shots in columns]
    lines = ["| features | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, row in cells.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c][0]:.1f}" for c in columns) + " |")
    return "\n".join(lines)


def accuracies(cells: dict[str, dict[tuple, tuple[float, float]]], out):
    """Bars of what `table` shows, with the standard errors; one panel a protocol."""
    columns = list(next(iter(cells.values())))
    protocols = list(dict.fromkeys(protocol for protocol, _ in columns))
    figure, axes = plt.subplots(1, len(protocols), figsize=(11, 4), sharey=True, squeeze=False)
    for axis, protocol in zip(axes[0], protocols, strict=True):
        shots = [s for p, s in columns if p == protocol]
        for i, shot in enumerate(shots):
            places = [row + 0.27 * (i - (len(shots) - 1) / 2) for row in range(len(cells))]
            means, errors = zip(*(row[protocol, shot] for row in cells.values()), strict=True)
            label = "all labels" if shot == "all" else f"{shot} labels a class"
            axis.bar(places, means, 0.25, yerr=errors, label=label)
        axis.set_xticks(range(len(cells)), cells, rotation=30, ha="right", fontsize=8)
        axis.set_title(protocol)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("accuracy, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(shots))
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main():
    made = cli.parser(__doc__)
    made.add_argument("runs", nargs="+", help="work directories")
    made.add_argument("--metrics", default="next,visible", help="names, comma-separated")
    made.add_argument("--out", required=True, help="PNG or SVG file")
    args = made.parse_args()
    names = args.metrics.split(",")
    known = {key for run in args.runs for line in read(run) for key in line} - {"step"}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no run has {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    curves(args.runs, names, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
