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
        for run in runs:
            lines = [line for line in read(run) if name in line]
            if lines:
                steps, values = [x["step"] for x in lines], [x[name] for x in lines]
                marker = "o" if len(lines) < 8 else None
                axis.plot(steps, values, label=Path(run).name, marker=marker, markersize=3)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
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
