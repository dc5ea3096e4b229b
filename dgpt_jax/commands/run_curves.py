"""Curves of runs for tools/report.py: one small SVG per panel, for light and dark pages."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgpt_jax.commands import plot
from dgpt_jax.monitoring import curve_points, metrics_log
from dgpt_jax.monitoring.metrics_log import Log

# (light, dark) of lines; more runs or metrics repeat them. Each is unique, so that it can be
# replaced by a CSS variable.
COLORS = (
    ("#0969da", "#58a6ff"), ("#d1570a", "#ff9e4f"), ("#1a7f37", "#3fb950"),
    ("#8250df", "#bc8cff"), ("#bf3989", "#f778ba"), ("#6b5d00", "#d8c04a"),
)  # fmt: skip
BACK, TEXT, LINE = ("#fffffe", "#161b22"), ("#1f2328", "#e6edf3"), ("#d1d9e0", "#30363d")
BAD = ("#cf222e", "#ff7b72")
TITLES = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
    "data_wait": "share of time waiting for data",
    "skipped": "skipped updates",
    "bad_records": "unreadable examples that were replaced",
    "fetched_bytes": "bytes fetched from remote storage",
    "fetch_wait_seconds": "seconds waiting for remote storage",
}
# Of evaluations by their prefix; others are losses and accuracies.
GROUP_TITLES = {"rank": "effective rank of features", "agreement": "agreement of two views"}
STYLES = ("-", "--", ":", "-.")  # of the metrics of a panel, if colors tell runs
FEW = 60  # points that are drawn with a marker each
SIZE = (5.4, 3.1)  # inches
RC: Any = {
    "axes.edgecolor": LINE[0], "axes.facecolor": BACK[0], "axes.labelcolor": TEXT[0],
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlecolor": TEXT[0],
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold",
    "figure.facecolor": BACK[0], "font.size": 10, "grid.color": LINE[0], "legend.frameon": False,
    "legend.labelcolor": TEXT[0], "lines.linewidth": 1.6, "svg.fonttype": "none",
    "svg.hashsalt": "report", "text.color": TEXT[0], "text.parse_math": False,
    "xtick.color": LINE[0], "xtick.labelcolor": TEXT[0], "ytick.color": LINE[0],
    "ytick.labelcolor": TEXT[0],
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """Metrics on the same axes: logged every interval, and by evaluations."""

    title: str
    training: tuple[str, ...] = ()
    evaluations: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        """Names of the metrics, for readers who do not see the figure."""
        return f"{', '.join((*self.training, *self.evaluations))} by step"

    @property
    def is_loss(self) -> bool:
        """True if it shows a training loss, which skipped updates belong to."""
        return bool(self.training) and self.training[0] not in TITLES


def panels(logs: Sequence[Log]) -> list[Panel]:
    """Panels of all metrics: each training loss with its held-out values (`next` and
    `heldout/next`), then the other evaluations by their prefix, then the rest."""
    names = metrics_log.metrics(logs)
    evaluations = [name for name in names if "/" in name]
    losses, rest = [], []
    for name in names:
        if name in evaluations:
            continue
        own = tuple(e for e in evaluations if e.partition("/")[2] == name)
        panel = Panel(TITLES.get(name, name), (name,), own)
        (losses if panel.is_loss else rest).append(panel)
    drawn = {name for panel in losses for name in panel.evaluations}
    groups: dict[str, list[str]] = {}
    for name in evaluations:
        if name not in drawn:
            groups.setdefault(name.partition("/")[0], []).append(name)
    others = [Panel(_title(group), (), tuple(group)) for group in groups.values()]
    return [*losses, *others, *rest]


def _title(names: Sequence[str]) -> str:
    """A metric, or what several of the same prefix are: "knn accuracy"."""
    prefix = names[0].partition("/")[0]
    kind = "loss" if metrics_log.is_loss(names[0]) else "accuracy"
    return names[0] if len(names) == 1 else GROUP_TITLES.get(prefix, f"{prefix} {kind}")


def svg(panel: Panel, logs: Sequence[Log], smooth: int) -> bytes:
    """A panel as SVG. Colors tell metrics apart, or runs if there are several.

    smooth: logged points of the running mean of training metrics; 0 draws the raw values.
    """
    with plot.matplotlib.rc_context(RC):
        figure, axis = plot.plt.subplots(figsize=SIZE)
        names = (*panel.training, *panel.evaluations)
        for i, log in enumerate(logs):
            for j, name in enumerate(names):
                color = COLORS[(j if len(logs) == 1 else i) % len(COLORS)][0]
                style = STYLES[j % len(STYLES)] if len(logs) > 1 else "-"
                if name in panel.training:
                    _draw_training(axis, log, name, color, smooth)
                else:
                    _draw_evaluations(axis, log, name, color, style)
            if panel.is_loss:
                _draw_skipped(axis, log, BAD[0] if len(logs) == 1 else COLORS[i % len(COLORS)][0])
        last = max(log.last for log in logs) or 1
        _decorate(axis, panel, names, last, several=len(logs) > 1)
        figure.tight_layout(pad=0.6)
        buffer = io.BytesIO()
        plot.save(figure, buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _with_color_scheme(buffer.getvalue().decode()).encode()


def _draw_training(axis, log: Log, name: str, color: str, smooth: int):
    steps, values = log.arrays(name)
    if len(steps):
        points = 0 if name == "learning_rate" or len(steps) < 4 * smooth else smooth
        plot.line(axis, steps, values, color, name, points)


def _draw_evaluations(axis, log: Log, name: str, color: str, style: str):
    curve = log.curves.get(name, metrics_log.EMPTY).finite()
    if len(curve):
        indices = curve_points.thin(curve.steps, curve.values)
        marker = "o" if len(curve) <= FEW else None
        axis.plot(
            curve.steps[indices], curve.values[indices], color=color, label=name, marker=marker,
            markersize=4, linestyle=style, linewidth=1.3,
        )  # fmt: skip


def _draw_skipped(axis, log: Log, color: str):
    """Ticks at the bottom, at the log lines whose interval had skipped updates."""
    steps, counts = log.arrays("skipped")
    skipped = steps[np.flatnonzero(np.diff(counts, prepend=0) > 0)]
    if len(skipped):
        skipped = skipped[curve_points.thin(skipped, np.zeros(len(skipped)))]
        axis.plot(
            skipped, np.full(len(skipped), 0.03), "|", color=color, markersize=9,
            markeredgewidth=1.6, transform=axis.get_xaxis_transform(), label=TITLES["skipped"],
        )  # fmt: skip


def _decorate(axis, panel: Panel, names: Sequence[str], last: int, *, several: bool):
    axis.set_title(panel.title)
    axis.set_xlabel("step")
    axis.set_xlim(-0.02 * last, 1.02 * last)  # the same for all panels
    axis.xaxis.set_major_locator(plot.MaxNLocator(5, integer=True))
    axis.grid(linewidth=0.6)
    shares = panel.training == ("data_wait",) or not panel.training
    if shares and all(map(metrics_log.is_share, names)):
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    handles, labels = axis.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # one for all runs
    if len(entries) > 1:
        legend = axis.legend(entries.values(), entries.keys(), fontsize=9)
        for handle in legend.legend_handles if several else ():
            handle.set_color(TEXT[0])  # colors tell runs apart


def _with_color_scheme(text: str) -> str:
    """The SVG with CSS variables for its colors, whose values depend on the reader's scheme."""
    palette: Mapping[str, str] = dict((*COLORS, BACK, TEXT, LINE, BAD))
    light, dark = [], []
    for i, (color, dark_color) in enumerate(palette.items()):
        text = text.replace(f": {color}", f": var(--c{i})")
        light.append(f"--c{i}: {color}")
        dark.append(f"--c{i}: {dark_color}")
    style = (
        f"<style>:root {{ {'; '.join(light)} }} @media (prefers-color-scheme: dark) "
        f"{{ :root {{ {'; '.join(dark)} }} }}</style>"
    )
    return text.replace("<defs>", f"{style}<defs>", 1)
