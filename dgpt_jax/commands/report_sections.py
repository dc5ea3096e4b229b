"""Sections of tools/report.py: key numbers, evaluations, images, config, system, comparison."""

import datetime
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax.config import ModelConfig, TrainConfig, schema
from dgpt_jax.errors import UserError
from dgpt_jax.evals import report as published_report
from dgpt_jax.monitoring import html, logged_images, metrics_log, run_diff
from dgpt_jax.monitoring.progress import duration
from dgpt_jax.monitoring.run_summary import Run

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml", ".webp": "webp"}
MAX_IMAGE_BYTES = 4 << 20
BADGES = {"finished": "good", "running": "busy", "diverged": "bad", "stopped": "idle"}
MAX_EVALUATIONS = 6  # cards
# By a part of the file's name: the figures of tools/visualize.py.
CAPTIONS = {
    "predict": "predictions for segments beside the teacher's tokens; captions are mean cosines",
    "attention": "attention of CLS in the last block: the mean of the heads, then each head",
    "token": "patch tokens, their first three principal components as colors",
    "neighb": "nearest images by cosine similarity of their features",
}
# By name: what the training logs for TensorBoard.
LOGGED = {
    "predictions": ": held-out images with the order of their segments (the last one is pale); "
    "tokens of the teacher and predicted ones, as colors of their principal components; cosines",
    "crops": ": the first images as the model gets them, with the order of their segments",
}
Numbers = list[tuple[str, str, str]]  # (label, value, comment)


def subtitle(run: Run) -> str:
    """The task and the model in words, "" without a config."""
    model, classify = run.section("model"), run.section("classify")
    task = {
        "pretrain": "D-iGPT pretraining",
        "classify": f"{classify.get('head')} probe"
        if classify.get("trainable") == "head"
        else "supervised training",
    }.get(str(run.config.get("task")))
    try:
        size = f"ViT {published_report.size_of(dict(model))}, {model['image_size']} px"
    except (KeyError, TypeError):
        size = None
    data = run.section("data").get("path")
    return " · ".join(str(part) for part in (task, size, data) if part)


def summary(run: Run) -> str:
    """Status and key numbers."""
    kind, text = run.status
    parts = [html.badge(text, BADGES[kind]), html.cards(numbers(run))]
    if run.log.damaged:
        text = f"{run.log.damaged} damaged lines of {metrics_log.FILE} were skipped"
        parts.append(html.note(text))
    if run.checkpoints.error:
        parts.append(html.note(run.checkpoints.error))
    return "".join(parts)


def numbers(run: Run) -> Numbers:
    """Key numbers of a run; those that its files do not tell are left out."""
    log, checkpoints = run.log, run.checkpoints
    of = run.total or run.config.get("total", "?")
    data = f"{run.epochs:.3g} epochs of {checkpoints.examples:,} examples" if run.epochs else ""
    rows = [("step", f"{log.last:,} of {of:,}" if run.total else f"{log.last:,} of {of}", data)]
    if "loss" in log.curves:
        value, step = log.curves["loss"].point(-1)
        rows.append(("training loss", f"{value:.4g}", f"at step {step:,}"))
    rows += [_evaluation(run, name) for name in _main_evaluations(run)]
    rates = log.curves.get("images_per_second", metrics_log.EMPTY).finite().values
    if len(rates):
        rows.append(("images per second", f"{np.median(rates):,.0f}", "median"))
    if run.data_wait is not None:
        rows.append(("waiting for data", html.percent(100 * run.data_wait), "of the time in steps"))
    if run.wall_seconds:
        count = run.log.times.sessions if run.log.times else len(run.starts)
        starts = f"{count} starts, " if count > 1 else ""
        comment = f"{starts}first start to last line"
        rows.append(("wall time", duration(run.wall_seconds), comment))
    if run.goodput is not None:
        rows.append(("goodput", html.percent(100 * run.goodput, 0), "of the wall time in steps"))
    if checkpoints.mesh:
        axes = ", ".join(f"{axis} {size}" for axis, size in checkpoints.mesh.items() if size > 1)
        rows.append(("devices", f"{np.prod([*checkpoints.mesh.values()])}", axes))
    if checkpoints.parameters:
        comment = f"{_millions(checkpoints.encoder)} in the encoder" if checkpoints.encoder else ""
        rows.append(("parameters", _millions(checkpoints.parameters), comment))
    return rows


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3g} M" if count < 1e9 else f"{count / 1e9:,.3g} G"


def _main_evaluations(run: Run) -> list[str]:
    """Evaluations to show as cards: the metric of config.checkpoint.best, accuracies, losses."""
    names = [n for n in run.log.curves if "/" in n and not metrics_log.is_detail(n)]
    best = run.section("checkpoint").get("best")
    return sorted(names, key=lambda n: (n != best, metrics_log.is_loss(n)))[:MAX_EVALUATIONS]


def _evaluation(run: Run, name: str) -> tuple[str, str, str]:
    last, last_step = run.log.curves[name].point(-1)
    if (best := run.best(name)) is None:
        return f"best {name}", "none", f"last {_value(name, last)} at step {last_step:,}"
    comment = f"at step {best[1]:,}; last {_value(name, last)}"
    if best[1] == last_step:
        comment = f"at step {last_step:,}, the last"
    return f"best {name}", _value(name, best[0]), comment


def _value(name: str, value: float) -> str:
    """A share in percent, other values with four digits."""
    return html.percent(100 * value) if metrics_log.is_share(name) else f"{value:.4g}"


def evaluations(run: Run) -> str:
    """Table of the metrics of evaluations; of details, like every head of a grid, folded."""
    rows: dict[bool, list] = {False: [], True: []}
    for name, curve in run.log.curves.items():
        if "/" in name:
            best, last = run.best(name) or (None, None), curve.point(-1)
            values = (
                (None if v is None else html.Number(_value(name, v)), step)
                for v, step in (best, last)
            )
            cells = [cell for pair in values for cell in pair]
            rows[metrics_log.is_detail(name)].append((name, len(curve), *cells))
    columns = ("metric", "evaluations", "best", "at step", "last", "at step")
    if not rows[False]:
        return html.note("none was logged: config.evals.heldout and config.evals.knn enable them")
    text = html.table(columns, rows[False])
    details = rows[True]
    return text + html.details(f"{len(details)} more", html.table(columns, details)) * bool(details)


def images(run: epath.Path) -> str:
    """The last images in TensorBoard's files, then image files of the work directory; "" without
    any."""
    logged, too_large = logged_images.latest(run)
    parts = [
        html.figure(data, "png", f"{name} at step {step:,}{LOGGED.get(name, '')}")
        for name, (step, data) in sorted(logged.items(), reverse=True)
    ]
    for name in too_large:
        parts.append(html.note(f"{name} is too large to look for images: open it in TensorBoard"))
    for path in sorted(p for p in run.iterdir() if p.suffix.lower() in KINDS and p.is_file()):
        if (size := path.stat().length) > MAX_IMAGE_BYTES:
            parts.append(html.note(f"{path.name} is too large to embed: {size / 2**20:.1f} MiB"))
            continue
        about = next((text for key, text in CAPTIONS.items() if key in path.stem.lower()), "")
        caption = f"{path.name}: {about}" if about else path.name
        parts.append(html.figure(path.read_bytes(), KINDS[path.suffix.lower()], caption))
    return "\n".join(parts)


def config(run: Run) -> str:
    """The config, folded: values that differ from the defaults, then the others."""
    if not run.config:
        return html.note("no config.json")
    size = run.section("model").get("size", ModelConfig().size)
    defaults, values = _default_config(size), schema.flatten(run.config)
    changed = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
    rows = [(k, _text(v), _text(defaults.get(k))) for k, v in changed.items()]
    rest = [(k, _text(v)) for k, v in values.items() if k not in changed]
    content = html.table(("key", "value", "default"), rows)
    content += html.heading("Defaults") + html.table(("key", "value"), rest)
    return html.details(f"{len(values)} keys, {len(rows)} differ from the defaults", content)


def _default_config(size: str) -> dict[str, Any]:
    """Flat defaults as in JSON; those of the model that depend on its size are set."""
    defaults = schema.to_dict(TrainConfig())
    try:
        defaults["model"] = schema.to_dict(schema.parse(ModelConfig, {"size": size}))
        defaults["model"]["size"] = ModelConfig().size
    except UserError:  # a size of other code
        pass
    return schema.flatten(json.loads(json.dumps(defaults)))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def system(run: Run) -> str:
    """When and on what the run was trained, folded."""
    rows: list[tuple[str, str]] = [("directory", str(run.path.resolve()))]
    rows += [("started", f"{_time(start.time)}, host {start.host}") for start in run.starts]
    rows.append(("last line of metrics", _time(run.written)))
    rows.append(("checkpoints of steps", ", ".join(map(str, run.checkpoints.steps)) or "none"))
    for name in ("platform", "dtype", "kernels", "mesh", "hosts"):
        if run.config.get(name) not in (None, ""):
            rows.append((f"config.{name}", _text(run.config[name])))
    return html.details("times, checkpoints, devices", html.table(("key", "value"), rows))


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Key numbers side by side, config keys that differ, and where curves differ from the first."""
    columns = {
        name: {"status": run.status[1]}
        | {label: html.Number(value) for label, value, _ in numbers(run)}
        for name, run in zip(names, runs, strict=True)
    }
    labels = dict.fromkeys(label for values in columns.values() for label in values)
    rows = [(label, *(values.get(label) for values in columns.values())) for label in labels]
    parts = [html.table(("", *names), rows), _config_differences(runs, names)]
    first, *others = runs
    for name, other in zip(names[1:], others, strict=True):
        parts.append(_curve_differences(first, other, f"Curves of {names[0]} and {name}"))
    return "".join(parts)


def _config_differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    flat = [schema.flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [
        (key, *(_text(config[key]) if key in config else None for config in flat))
        for key in keys
        if any(config.get(key) != flat[0].get(key) for config in flat)
    ]
    title = html.heading("Config keys that differ")
    return title + (html.table(("key", *names), rows) if rows else html.note("none"))


def _curve_differences(first: Run, other: Run, title: str) -> str:
    logs = first.log, other.log
    names = [n for n in metrics_log.metrics(logs) if n not in metrics_log.OF_THE_MACHINE]
    rows = []
    for d in run_diff.compare(*logs, names):
        cells = [*(d.first or (None,) * 3), *((d.largest or (None,))[:1])]
        gap = float(run_diff.distance(*d.largest[1:])) if d.largest else 0.0 if d.common else None
        rows.append((d.name, d.common, *cells, gap))
    columns = ("metric", "common steps", "first differ at", "first run", "other run",
               "differ most at", "by")  # fmt: skip
    return html.details(f"{title}: where they differ", html.table(columns, rows))
