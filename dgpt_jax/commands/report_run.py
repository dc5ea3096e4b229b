"""One HTML file about a run, open without network: tools/report_run.py RUN --out=FILE.html

Curves, evaluations, results (results*.json), pictures that lie in the work directory, checkpoints,
the config. Everything is inside the file. `--log=FILE` adds what the training printed: the table of
processes and devices is there, a work directory does not hold it.
"""

import dgpt_jax.starting  # noqa: F401

import base64
import datetime
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import plot
from etils import epath

from dgpt_jax import cli, outputs, run_log, schema
from dgpt_jax.convert import files
from dgpt_jax.evals import results as evaluated
from dgpt_jax.schema import UserError

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml", ".webp": "webp"}
LARGEST = 4 << 20  # bytes of a picture that is put into the page
LONGEST = 100_000  # characters of a log
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
    """A picture inside the page. An SVG as an image runs no script and fetches nothing."""
    text = base64.b64encode(data).decode()
    alt = html.escape(caption)
    return f'<img src="data:image/{kind};base64,{text}" alt="{alt}" title="{alt}">'


def table(columns, rows) -> str:
    """Rows of anything; numbers stand right."""

    def cell(value) -> str:
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


def curves(log: run_log.Log, smooth: int) -> str:
    names = run_log.chosen([log], None)
    drawn = io.BytesIO()
    plot.draw([log], names, drawn, smooth=smooth, format="svg")
    return image(drawn.getvalue(), "svg+xml", f"{', '.join(names)} by step")


def evaluations(log: run_log.Log) -> str:
    """What is measured beside the training: logged at fewer steps than the learning rate is."""
    every = len(log.arrays("learning_rate")[0])
    rows = []
    for name, curve in log.curves.items():
        if len(curve) >= every and not name.startswith(("heldout/", "knn")):
            continue
        finite, low, high = curve.finite(), (None, None), (None, None)
        if len(finite):
            low, high = map(finite.point, (finite.values.argmin(), finite.values.argmax()))
        rows.append((name, len(curve), *low, *high, *curve.point(-1)))
    columns = ("metric", "times", "lowest", "at step", "highest", "at step", "last", "at step")
    return table(columns, rows) if rows else note("none was logged")


def results(run: epath.Path) -> str:
    """Tables of the files of results that evaluations have left in the run."""
    parts = []
    for path in sorted(run.glob("results*.json")):
        try:
            found = evaluated.read(path)
            rows = [dict(row) for row in found["results"]]
        except (UserError, ValueError, TypeError) as e:
            parts.append(note(str(e)))
            continue
        columns = dict.fromkeys(
            name for row in rows for name, value in row.items() if not isinstance(value, dict)
        )
        cells = [[_plain(row.get(name)) for name in columns] for row in rows]
        title = html.escape(f"{path.name}: {found['weights']}")
        parts.append(f"<h3>{title}</h3>" + table(columns, cells))
    return "\n".join(parts) or note("none: python -m dgpt_jax.evaluate --checkpoint=RUN adds them")


def _plain(value):
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return str(value) if isinstance(value, bool) else value


def pictures(run: epath.Path) -> str:
    parts = []
    for path in sorted(p for p in run.iterdir() if p.suffix.lower() in KINDS and p.is_file()):
        if (size := path.stat().length) > LARGEST:
            parts.append(note(f"{path.name} is left out: {size / 2**20:.1f} MiB"))
            continue
        shown = image(path.read_bytes(), KINDS[path.suffix.lower()], path.name)
        parts.append(f"<h3>{html.escape(path.name)}</h3>{shown}")
    return "\n".join(parts) or note("none lies in the work directory")


def system(run: epath.Path, config: dict, log: run_log.Log) -> str:
    """What the run has written down of where and when it ran."""
    rows = [("directory", str(run.resolve()))]
    for path in sorted((run / "tensorboard").glob("events.out.tfevents.*")):
        if found := re.match(r"events\.out\.tfevents\.(\d+)\.(.+)", path.name):
            rows.append(("started", f"{_time(int(found[1]))}, host {found[2]}"))
    rows.append(("last line of metrics", _time((run / run_log.FILE).stat().mtime)))
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
    return table(("what", "value"), rows)


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def read_config(run: epath.Path) -> dict:
    path = run / "config.json"
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is damaged: {e}") from None


def page(run, *, smooth: int = 0, log_file: Path | None = None) -> str:
    """The report of a work directory, HTML that loads nothing. Raises UserError."""
    run = epath.Path(run)
    log, config = run_log.read(run), read_config(run)
    name = html.escape(run.absolute().name)
    parts = {
        "Curves": curves(log, smooth),
        "Evaluations while training": evaluations(log),
        "Results": results(run),
        "Pictures": pictures(run),
        "System": system(run, config, log),
        "Config": table(("key", "value"), [(k, str(v)) for k, v in schema.flatten(config).items()])
        if config
        else note("no config.json"),
    }
    if log_file:
        text = log_file.read_text(errors="replace")
        cut = f"(the first {LONGEST} characters)\n" if len(text) > LONGEST else ""
        parts["Log"] = f"<pre>{html.escape(cut + text[:LONGEST])}</pre>"
    total = html.escape(str(config.get("total", "?")))
    told = f"<p>Last logged step: {log.last}; config.total: {total}.</p>"
    if log.damaged:
        told += note(f"{log.damaged} damaged lines of {run_log.FILE} were passed over")
    body = "\n".join(f"<h2>{title}</h2>\n{part}" for title, part in parts.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{name}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{name}</h1>\n{told}\n{body}\n</body></html>\n"
    )


def main():
    made = cli.parser(__doc__)
    made.add_argument("run", type=cli.path, help="work directory")
    made.add_argument("--out", required=True, type=cli.local_path, help="HTML file")
    made.add_argument("--log", type=cli.local_path, help="file of what the training printed")
    made.add_argument(
        "--smooth", type=int, least=0, default=0, help="logged points that a mean is of"
    )
    args = made.parse_args()
    outputs.file(args.out)
    text = page(args.run, smooth=args.smooth, log_file=args.log)
    with files.written(args.out) as half:
        half.write_text(text, encoding="utf-8")
    print(f"wrote {args.out}, {len(text) / 1000:.0f} kB")
    print(f"next: open {args.out} in a browser")


if __name__ == "__main__":
    cli.run(main)
