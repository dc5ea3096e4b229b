"""Plots curves of runs: python tools/plot.py RUN… --out=FILE.png (or .svg)

Draws logged metrics by step: losses, accuracies, throughput, time spent waiting for data.
`--smooth=N` adds a running mean of N logged points over the faint raw line; the learning rate and
curves of fewer than 4 N points are not smoothed. Non-finite values are crosses at the bottom. Long
curves are thinned to the minimum and maximum of every thousandth, so every spike stays visible.

    python tools/plot.py --diff RUN OTHER

compares two runs step by step and prints where each metric first differs and by how much. Exits
with 1 if they differ, also if they logged different steps. Metrics of the machine (throughput,
waiting) are compared only if --metrics names them.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from dgpt_jax import cli, invocation
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import curve_points, metrics_log, run_diff
from dgpt_jax.monitoring.metrics_log import Log
from dgpt_jax.storage import output_paths
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.weights import files

with cli.needs("plot"):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

COLUMNS = 4
FORMATS = tuple(f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes())
Output = Path | str | IO[bytes]


def curves(runs: Sequence[Path | str], names: Sequence[str], out: Path | str, smooth: int = 0):
    """Plots one panel per metric and one line per run into the file `out`.

    smooth: logged points of the running mean; 0 draws the raw values. Raises UserError.
    """
    draw([metrics_log.read(run) for run in runs], names, out, smooth=smooth)


def draw(logs: Sequence[Log], names: Sequence[str], out: Output, smooth: int = 0, **options: Any):
    """Plots logs as `curves` does; `options` are those of savefig."""
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    size = (4.5 * columns, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    labels = run_labels([log.run for log in logs])
    for axis, name in zip(axes.flat, names, strict=False):
        for i, log in enumerate(logs):
            steps, values = log.arrays(name)
            if len(steps):
                points = 0 if name == "learning_rate" or len(steps) < 4 * smooth else smooth
                line(axis, steps, values, f"C{i}", labels[i], points)
        axis.set(title=name, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.tight_layout()
    save(figure, out, **options)


def save(figure: Figure, out: Output, dpi: int = 130, **options: Any):
    """Writes a figure to an open file, or atomically to a path in the format of its suffix."""
    if isinstance(out, (str, Path)):
        with files.written(out) as temporary:
            figure.savefig(temporary, dpi=dpi, format=Path(out).suffix[1:].lower(), **options)
    else:
        figure.savefig(out, dpi=dpi, **options)
    plt.close(figure)


def line(axis: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str, smooth: int):
    """Draws one run; with `smooth`, its running mean over the faint raw line."""
    nonfinite = steps[~np.isfinite(values)]
    indices = curve_points.thin(steps, values)
    raw = np.where(np.isfinite(values[indices]), values[indices], np.nan)
    style: dict[str, Any] = {"color": color, "markersize": 3}
    style["marker"] = "o" if len(steps) < 8 else None
    if smooth > 1:
        axis.plot(steps[indices], raw, alpha=0.25, **style)
        means = curve_points.running_mean(values, smooth)
        indices = curve_points.thin(steps, means)
        axis.plot(steps[indices], means[indices], color=color, label=f"{label}, mean of {smooth}")
    else:
        axis.plot(steps[indices], raw, label=label, **style)
    if len(nonfinite):
        nonfinite = nonfinite[curve_points.thin(nonfinite, np.zeros(len(nonfinite)))]
        axis.plot(
            nonfinite, np.full(len(nonfinite), 0.02), "x", color=color, clip_on=False,
            transform=axis.get_xaxis_transform(), label=f"{label}: not finite",
        )  # fmt: skip


def run_labels(runs: Sequence[AnyPath]) -> list[str]:
    """Directory names of the runs; their paths if two have the same name."""
    names = [Path(run).absolute().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def diff(a: Log, b: Log, names: Sequence[str], tolerance: float) -> bool:
    """Prints where two runs differ. Returns True if they do."""
    compared = run_diff.compare(a, b, names, tolerance)
    for difference in sorted(compared, key=lambda x: x.same):
        print(difference.line())
    if not any(x.common for x in compared):
        print(f"{a.run} and {b.run} have no common steps: only their last values were compared")
        return True
    starts = [(x.first[0], x.name) for x in compared if x.first]
    if starts:
        step, name = min(starts)
        print(f"{a.run} and {b.run} differ from step {step} on, first in {name}")
    elif all(x.same for x in compared):
        print(f"{a.run} and {b.run} are the same")
    else:
        print(f"{a.run} and {b.run} agree at common steps, but logged different steps")
    return not all(x.same for x in compared)


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("runs", type=cli.path, nargs="+", help="work directories")
    parser.add_argument("--metrics", help="names, comma-separated; default: a selection")
    parser.add_argument("--out", type=cli.local_path, help="PNG or SVG file")
    parser.add_argument(
        "--smooth", type=int, least=0, default=0, help="logged points per running mean"
    )
    parser.add_argument("--diff", action="store_true", help="compare two runs; exit 1 if different")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="relative difference that --diff ignores"
    )
    args = parser.parse_intermixed_args()
    if not (args.out or args.diff):
        raise UserError("nothing to do: give --out=FILE.png, FILE.svg, or --diff")
    if args.diff and len(args.runs) != 2:
        raise UserError(f"--diff compares two runs, {len(args.runs)} were given")
    if args.out:
        output_paths.file(args.out, (".png", ".svg"))
    logs = [metrics_log.read(run) for run in args.runs]
    for log in logs:
        if log.damaged:
            print(f"{log.run}: {log.damaged} damaged lines skipped", file=sys.stderr)
    names = metrics_log.select_metrics(logs, args.metrics)
    if args.out:
        draw(logs, names, args.out, smooth=args.smooth)
        print(f"wrote {args.out}")
    differ = False
    if args.diff:
        if not args.metrics:
            names = [name for name in names if name not in metrics_log.OF_THE_MACHINE]
        differ = diff(logs[0], logs[1], names, args.tolerance)

    print(f"next: {invocation.command('report')} {shlex.quote(args.runs[0])} --out=report.html")
    if differ:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
