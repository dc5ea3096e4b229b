"""Curves of runs: python tools/plot.py RUN… --out=FILE.png (or .svg)

Draws what the runs have logged against their steps: losses, accuracies, throughput, waiting for
data. `--smooth=N` draws the mean of N logged points over the raw line, which stays visible; the
learning rate and what has fewer than 4 N points are left as they are. What was not finite is a
cross at the bottom. Of a long curve the smallest and the largest value of every thousandth are
drawn: no spike is left out.

    python tools/plot.py --diff RUN OTHER

compares two runs step by step and says at which step each metric parts and by how much. It ends
with 1 where they differ, also in which steps they have logged. What hangs on the machine
(throughput, waiting) is compared only if --metrics names it.
"""

import dgpt_jax.starting  # noqa: F401

import shlex
import sys
from pathlib import Path

import numpy as np

from dgpt_jax import cli, outputs, run_diff, run_log
from dgpt_jax.convert import files
from dgpt_jax.schema import UserError

with cli.needs("dgpt_jax[plot]"):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.ticker import MaxNLocator

COLUMNS = 4
FORMATS = tuple(f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes())


def curves(runs, names, out, smooth: int = 0):
    """One panel a metric, one line a run that has it. `out`: a path or a file, as savefig takes."""
    draw([run_log.read(run) for run in runs], names, out, smooth=smooth)


def draw(logs, names, out, smooth: int = 0, **options):
    """`curves` of logs that were read."""
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    size = (4.5 * columns, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    labels = labels_of([log.run for log in logs])
    for axis, name in zip(axes.flat, names, strict=False):
        for i, log in enumerate(logs):
            steps, values = log.arrays(name)
            if len(steps):
                points = 0 if name == "learning_rate" or len(steps) < 4 * smooth else smooth
                _line(axis, steps, values, f"C{i}", labels[i], points)
        axis.set(title=name, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.tight_layout()
    save(figure, out, **options)


def save(figure, out, dpi: int = 130, **options):
    """Writes a figure to a path, at once, in the format of its suffix; or to a file."""
    if hasattr(out, "write"):
        figure.savefig(out, dpi=dpi, **options)
    else:
        with files.written(out) as half:
            figure.savefig(half, dpi=dpi, format=Path(out).suffix[1:].lower(), **options)
    plt.close(figure)


def _line(axis, steps, values, colour, label, smooth: int):
    """A run's values; smoothed, the raw ones faint beneath."""
    bad = steps[~np.isfinite(values)]
    marker = "o" if len(steps) < 8 else None
    at = run_log.thinned(steps, values)
    shown = np.where(np.isfinite(values[at]), values[at], np.nan)
    raw = {"color": colour, "marker": marker, "markersize": 3}
    if smooth > 1:
        axis.plot(steps[at], shown, alpha=0.25, **raw)
        means = run_log.running_mean(values, smooth)
        at = run_log.thinned(steps, means)
        axis.plot(steps[at], means[at], color=colour, label=f"{label}, mean of {smooth}")
    else:
        axis.plot(steps[at], shown, label=label, **raw)
    if len(bad):
        bad = bad[run_log.thinned(bad, np.zeros(len(bad)))]
        axis.plot(
            bad, np.full(len(bad), 0.02), "x", color=colour, clip_on=False,
            transform=axis.get_xaxis_transform(), label=f"{label}: not finite",
        )  # fmt: skip


def labels_of(runs) -> list[str]:
    """The runs' names, or where two are of one name the paths as given."""
    names = [Path(run).absolute().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


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
    save(figure, out)


def differences(cells: dict[str, dict[str, tuple[float, float]]], out, title: str):
    """Dots with intervals, {row: {"PROTOCOL SHOTS": (mean, half an interval)}}; a panel a column
    of studies.table, a line a row."""
    columns, rows = list(next(iter(cells.values()))), list(cells)
    size = (2.2 * len(columns) + 2, 0.4 * len(rows) + 1.6)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        means, halves = np.array([cells[row][column] for row in rows]).T
        axis.axvline(0, color="grey", linewidth=1)
        axis.errorbar(means, range(len(rows)), xerr=np.nan_to_num(halves), fmt="o", capsize=3)
        axis.set(title=column, xlabel="points")
        axis.set_yticks(range(len(rows)), rows)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.suptitle(f"{title} (mean and 95 % interval, paired by seed)", fontsize=10)
    figure.tight_layout()
    save(figure, out)


def diff(logs, names, tolerance: float) -> bool:
    """Prints where two runs part; whether they differ."""
    a, b = logs
    found = run_diff.compare(a, b, names, tolerance)
    for difference in sorted(found, key=lambda x: x.same):
        print(difference.line())
    if not any(x.common for x in found):
        print(f"{a.run} and {b.run} have no common steps: only their last values were compared")
        return True
    parting = [(x.first[0], x.name) for x in found if x.first]
    if parting:
        step, name = min(parting)
        print(f"{a.run} and {b.run} part at step {step}, in {name}")
    elif all(x.same for x in found):
        print(f"{a.run} and {b.run} are the same")
    else:
        print(f"{a.run} and {b.run} agree where both have logged, and that is not everywhere")
    return not all(x.same for x in found)


def main():
    made = cli.parser(__doc__)
    made.add_argument("runs", type=cli.path, nargs="+", help="work directories")
    made.add_argument("--metrics", help="names, comma-separated; default: all that tell something")
    made.add_argument("--out", type=cli.local_path, help="PNG or SVG file")
    made.add_argument(
        "--smooth", type=int, least=0, default=0, help="logged points that a mean is of"
    )
    made.add_argument("--diff", action="store_true", help="say where two runs part; 1 if they do")
    made.add_argument(
        "--tolerance", type=float, default=0.0, help="relative difference that --diff passes over"
    )
    args = made.parse_intermixed_args()
    if not (args.out or args.diff):
        raise UserError("nothing to do: give --out=FILE.png, FILE.svg, or --diff")
    if args.diff and len(args.runs) != 2:
        raise UserError(f"--diff compares two runs, {len(args.runs)} were given")
    if args.out:
        outputs.file(args.out, (".png", ".svg"))
    logs = [run_log.read(run) for run in args.runs]
    for log in logs:
        if log.damaged:
            print(f"{log.run}: {log.damaged} damaged lines passed over", file=sys.stderr)
    names = run_log.chosen(logs, args.metrics)
    if args.out:
        draw(logs, names, args.out, smooth=args.smooth)
        print(f"wrote {args.out}")
    differ = False
    if args.diff:
        if not args.metrics:
            names = [name for name in names if name not in run_log.OF_THE_MACHINE]
        differ = diff(logs, names, args.tolerance)
    print(f"next: python tools/report_run.py {shlex.quote(args.runs[0])} --out=report.html")
    if differ:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
