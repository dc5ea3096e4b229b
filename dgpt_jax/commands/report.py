"""Writes one HTML file about a run: tools/report.py RUN --out=FILE.html

Shows status and key numbers, curves with evaluations, results (results*.json) beside published
numbers, images of the run, checkpoints and the config; the file loads nothing from outside.

`--with OTHER…` compares the run with others: curves on the same axes, key numbers, and where
configs and curves differ. `--log=FILE` adds the training's console output, which holds the table of
processes and devices and is not saved in a work directory.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from dgpt_jax import cli, invocation
from dgpt_jax.commands import plot, report_sections, report_times, run_curves
from dgpt_jax.errors import UserError
from dgpt_jax.evals import html_results
from dgpt_jax.monitoring import html, metrics_log, run_summary
from dgpt_jax.storage import output_paths
from dgpt_jax.weights import files

MAX_LOG_CHARS = 100_000


def page(
    run: epath.PathLike,
    others: Sequence[epath.PathLike] = (),
    *,
    smooth: int = 0,
    log_file: Path | None = None,
) -> str:
    """HTML report of a work directory, self-contained; `others` are compared with it.

    smooth: logged points of the running mean of curves; 0 draws raw values. Raises UserError.
    """
    now = time.time()
    first, *rest = runs = [run_summary.read(path, now) for path in (run, *others)]
    names = plot.run_labels([r.path for r in runs])
    sections = {}
    if rest:
        sections["Comparison"] = report_sections.comparison(runs, names)
    sections |= {
        "Curves": curves(runs, names, smooth),
        "Evaluations during training": report_sections.evaluations(first),
        "Predictions and images": report_sections.images(first.path),
        "Results": html_results.section(*(r.path for r in runs))
        or html.note(f"none: {invocation.command('evaluate')} --checkpoint=RUN adds them"),
        "Wall time": report_times.time_use(first)
        or html.note("the log has no times: an earlier version wrote a part of it"),
        "Config": report_sections.config(first),
        "System": report_sections.system(first),
    }
    if log_file:
        text = log_file.read_text(errors="replace")
        cut = f"(the first {MAX_LOG_CHARS} characters)\n" if len(text) > MAX_LOG_CHARS else ""
        shown = html.preformatted(cut + text[:MAX_LOG_CHARS])
        sections["Log"] = html.details(log_file.name, shown)
    subtitle = report_sections.subtitle(first)
    if rest:
        subtitle += f" · compared with {', '.join(names[1:])}"
    return html.page(first.path.absolute().name, sections, report_sections.summary(first), subtitle)


def curves(runs: Sequence[run_summary.Run], names: Sequence[str], smooth: int) -> str:
    """Panels of all metrics; colors tell the runs apart if there are several."""
    logs = [run.log for run in runs]
    metrics_log.select_metrics(logs, None)  # raises UserError if nothing was logged
    panels = (
        html.figure(run_curves.svg(p, logs, smooth), "svg+xml", p.caption, hide_caption=True)
        for p in run_curves.panels(logs)
    )
    palette = [run_curves.COLORS[i % len(run_curves.COLORS)] for i in range(len(runs))]
    legend = html.legend(names, palette) if len(runs) > 1 else ""
    return legend + html.figures(panels)


def refuse_results_file(words: Sequence[str]):
    """Raises UserError if the first argument is a results file, which another command reads."""
    if words and words[0].endswith(".json") and not epath.Path(words[0]).is_dir():
        raise UserError(
            f"{words[0]} is a file, not a work directory: {invocation.command('results')} "
            f"{shlex.quote(words[0])} tabulates results files"
        )


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("run", type=cli.path, help="work directory")
    parser.add_argument("--out", required=True, type=cli.local_path, help="HTML file")
    parser.add_argument(
        "--with", dest="others", metavar="OTHER", type=cli.path, nargs="+", action="extend",
        default=[], help="work directories to compare with",
    )  # fmt: skip
    parser.add_argument("--log", type=cli.local_path, help="console output of the training")
    parser.add_argument(
        "--smooth", type=int, least=0, default=0, help="logged points per running mean"
    )
    refuse_results_file(sys.argv[1:])
    args = parser.parse_args()
    output_paths.file(args.out)
    text = page(args.run, args.others, smooth=args.smooth, log_file=args.log)
    with files.written(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")

    print(f"wrote {args.out}, {len(text) / 1000:.0f} kB")
    print(f"next: open {args.out} in a browser")


if __name__ == "__main__":
    cli.run(main)
