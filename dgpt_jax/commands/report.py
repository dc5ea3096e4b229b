"""Writes one HTML file about a run: tools/report.py RUN --out=FILE.html

Shows curves, evaluations, results (results*.json), images in the work directory, checkpoints and
the config; the file loads nothing from outside. `--log=FILE` adds the training's console output,
which holds the table of processes and devices and is not saved in a work directory.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import base64
import datetime
import html
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax import cli, invocation
from dgpt_jax.commands import plot
from dgpt_jax.config import schema
from dgpt_jax.errors import UserError
from dgpt_jax.evals import results as result_files
from dgpt_jax.monitoring import metrics_log
from dgpt_jax.storage import output_paths
from dgpt_jax.weights import files

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml", ".webp": "webp"}
MAX_IMAGE_BYTES = 4 << 20
MAX_LOG_CHARS = 100_000
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1300px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px }
td, th { border: 1px solid #ccc; padding: 0.15em 0.6em; text-align: left; white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f5f5f5; padding: 0.8em; overflow-x: auto; font-size: 12px }
.note { color: #777 }
"""


def image(data: bytes, kind: str, caption: str) -> str:
    """Inline <img>. An SVG inside <img> runs no script and fetches nothing."""
    text = base64.b64encode(data).decode()
    alt = html.escape(caption)
    return f'<img src="data:image/{kind};base64,{text}" alt="{alt}" title="{alt}">'


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """HTML table; numbers are right-aligned."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="n">{value:.5g}</td>'
        if isinstance(value, int):
            return f'<td class="n">{value}</td>'
        return f"<td>{'' if value is None else html.escape(str(value))}</td>"

    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in columns)
    lines = ("".join(map(cell, row)) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def curves(log: metrics_log.Log, smooth: int) -> str:
    names = metrics_log.select_metrics([log], None)
    svg = io.BytesIO()
    plot.draw([log], names, svg, smooth=smooth, format="svg")
    return image(svg.getvalue(), "svg+xml", f"{', '.join(names)} by step")


def evaluations(log: metrics_log.Log) -> str:
    """Table of metrics logged less often than the learning rate, that is, of evaluations."""
    every = len(log.arrays("learning_rate")[0])
    rows = []
    for name, curve in log.curves.items():
        if len(curve) >= every and not name.startswith(("heldout/", "knn")):
            continue
        finite, low, high = curve.finite(), (None, None), (None, None)
        if len(finite):
            low = finite.point(int(finite.values.argmin()))
            high = finite.point(int(finite.values.argmax()))
        rows.append((name, len(curve), *low, *high, *curve.point(-1)))
    columns = ("metric", "times", "lowest", "at step", "highest", "at step", "last", "at step")
    return table(columns, rows) if rows else note("none was logged")


def results(run: epath.Path) -> str:
    """One table per results*.json of the run."""
    sections = []
    for path in sorted(run.glob("results*.json")):
        try:
            content = result_files.read(path)
            rows = [dict(row) for row in content["results"]]
        except (UserError, ValueError, TypeError) as e:
            sections.append(note(str(e)))
            continue
        columns = dict.fromkeys(
            name for row in rows for name, value in row.items() if not isinstance(value, dict)
        )
        cells = [[_plain(row.get(name)) for name in columns] for row in rows]
        title = html.escape(f"{path.name}: {content['weights']}")
        sections.append(f"<h3>{title}</h3>" + table(columns, cells))
    hint = note(f"none: {invocation.command('evaluate')} --checkpoint=RUN adds them")
    return "\n".join(sections) or hint


def _plain(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return str(value) if isinstance(value, bool) else value


def images(run: epath.Path) -> str:
    sections = []
    for path in sorted(p for p in run.iterdir() if p.suffix.lower() in KINDS and p.is_file()):
        if (size := path.stat().length) > MAX_IMAGE_BYTES:
            sections.append(note(f"{path.name} is too large to embed: {size / 2**20:.1f} MiB"))
            continue
        tag = image(path.read_bytes(), KINDS[path.suffix.lower()], path.name)
        sections.append(f"<h3>{html.escape(path.name)}</h3>{tag}")
    return "\n".join(sections) or note("none in the work directory")


def system(run: epath.Path, config: dict, log: metrics_log.Log) -> str:
    """Table of when and on what the run was trained."""
    rows: list[tuple[str, str | float]] = [("directory", str(run.resolve()))]
    for path in sorted((run / "tensorboard").glob("events.out.tfevents.*")):
        if match := re.match(r"events\.out\.tfevents\.(\d+)\.(.+)", path.name):
            rows.append(("started", f"{_time(int(match[1]))}, host {match[2]}"))
    rows.append(("last line of metrics", _time((run / metrics_log.FILE).stat().mtime)))
    saved = sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())
    rows.append(("checkpoints of steps", ", ".join(map(str, saved)) or "none"))
    for name in ("platform", "dtype", "mesh", "hosts"):
        if config.get(name) not in (None, ""):
            rows.append((f"config.{name}", json.dumps(config[name])))
    _, rates = log.arrays("images_per_second")
    if len(rates):
        rows.append(("images/s, median", float(np.median(rates))))
    _, waits = log.arrays("data_wait")
    if len(waits):
        rows.append(("waiting for data, median share", float(np.median(waits))))
    return table(("key", "value"), rows)


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def read_config(run: epath.Path) -> dict:
    """Config of a run, {} without one. Raises UserError."""
    path = run / "config.json"
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is damaged: {e}") from None


def page(run: epath.PathLike, *, smooth: int = 0, log_file: Path | None = None) -> str:
    """HTML report of a work directory, self-contained. Raises UserError."""
    run = epath.Path(run)
    log, config = metrics_log.read(run), read_config(run)
    name = html.escape(run.absolute().name)
    sections = {
        "Curves": curves(log, smooth),
        "Evaluations during training": evaluations(log),
        "Results": results(run),
        "Images": images(run),
        "System": system(run, config, log),
        "Config": table(("key", "value"), [(k, str(v)) for k, v in schema.flatten(config).items()])
        if config
        else note("no config.json"),
    }
    if log_file:
        text = log_file.read_text(errors="replace")
        cut = f"(the first {MAX_LOG_CHARS} characters)\n" if len(text) > MAX_LOG_CHARS else ""
        sections["Log"] = f"<pre>{html.escape(cut + text[:MAX_LOG_CHARS])}</pre>"
    total = html.escape(str(config.get("total", "?")))
    summary = f"<p>Last logged step: {log.last}; config.total: {total}.</p>"
    if log.damaged:
        summary += note(f"{log.damaged} damaged lines of {metrics_log.FILE} were skipped")
    body = "\n".join(f"<h2>{title}</h2>\n{section}" for title, section in sections.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{name}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{name}</h1>\n{summary}\n{body}\n</body></html>\n"
    )


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("run", type=cli.path, help="work directory")
    parser.add_argument("--out", required=True, type=cli.local_path, help="HTML file")
    parser.add_argument("--log", type=cli.local_path, help="console output of the training")
    parser.add_argument(
        "--smooth", type=int, least=0, default=0, help="logged points per running mean"
    )
    args = parser.parse_args()
    output_paths.file(args.out)
    text = page(args.run, smooth=args.smooth, log_file=args.log)
    with files.written(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")

    print(f"wrote {args.out}, {len(text) / 1000:.0f} kB")
    print(f"next: open {args.out} in a browser")


if __name__ == "__main__":
    cli.run(main)
