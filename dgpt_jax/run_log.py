"""What a run has logged: metrics.jsonl as curves, and where the curves of two runs part.

The file may be that of a run that is being written, was killed in the middle of a line, or was
continued from a checkpoint.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from dgpt_jax.schema import UserError

FILE = "metrics.jsonl"
# What hangs on the machine and the hour, not on the run: no difference between two runs.
OF_THE_MACHINE = (
    "images_per_second", "data_wait", "eta_seconds", "fetched_bytes", "fetch_wait_seconds",
)  # fmt: skip


def is_loss(metric: str) -> bool:
    """Whether lower is better."""
    return metric.startswith("heldout/")


def is_detail(metric: str) -> bool:
    """Whether it is one of many of a kind, as val/top1/HEAD: in the log, not shown."""
    return metric.count("/") > 1


@dataclass(frozen=True)
class Log:
    """The curves of a run: {metric: {step: value}}, steps ascending; a value may be NaN or
    infinite. `damaged` counts lines that were no JSON, a last one without its end left out."""

    run: Path
    curves: dict[str, dict[int, float]]
    damaged: int = 0

    def arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, empty where the run has none of it."""
        curve = self.curves.get(name, {})
        return np.array(list(curve), int), np.array(list(curve.values()), float)


def read(run) -> Log:
    """The log of a work directory. Raises UserError where it has none.

    Where steps go back, the run went on from a checkpoint: what it had logged from there on is
    forgotten, because the run that goes on has nothing of it. Within a step the last value counts.
    """
    path = epath.Path(run) / FILE
    if not path.is_file():
        raise UserError(f"{run} has no {FILE}: is it a work directory?")
    *lines, rest = path.read_bytes().decode(errors="replace").split("\n")
    entries = [_entry(line) for line in lines if line.strip()]
    damaged = entries.count(None)
    entries = [entry for entry in (*entries, _entry(rest)) if entry is not None]
    curves: dict[str, dict[int, float]] = {}
    newest = None
    for step, values in entries:
        if newest is not None and step < newest:
            curves = {
                name: {at: value for at, value in curve.items() if at < step}
                for name, curve in curves.items()
            }
        newest = step
        for name, value in values.items():
            curves.setdefault(name, {})[step] = value
    return Log(epath.Path(run), {name: curve for name, curve in curves.items() if curve}, damaged)


def _entry(line: str) -> tuple[int, dict[str, float]] | None:
    """(step, values) of a line, or None. A line that a kill cut off has the next one behind it."""
    start = line.rfind('{"step"')
    try:
        found = json.loads(line[max(start, 0) :])
        step = int(found.pop("step"))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    values = {}
    for name, value in found.items():
        try:  # NaN and infinities are strings: JSON has none
            values[name] = float(value)
        except (ValueError, TypeError):
            continue
    return step, values


def metrics(logs: Iterable[Log]) -> list[str]:
    """What is worth a panel, of what the runs have: losses, accuracies, the rest; counts of trouble
    only where there was any."""
    logs = list(logs)
    names = dict.fromkeys(name for log in logs for name in log.curves if not is_detail(name))
    first = ["loss", "next", "visible", *(n for n in names if n.startswith("heldout/"))]
    last = ["learning_rate", "grad_norm", "images_per_second", "data_wait"]
    counts = ["skipped", "bad_records", "fetched_bytes", "fetch_wait_seconds"]
    told = [name for name in counts if any(np.any(log.arrays(name)[1]) for log in logs)]
    middle = [n for n in names if n not in (*first, *last, *counts, "eta_seconds")]
    return [name for name in (*first, *middle, *last, *told) if name in names]


def chosen(logs: Sequence[Log], names: str | None) -> list[str]:
    """The metrics of a comma-separated list, or `metrics`. Raises UserError on one no run has."""
    known = {name for log in logs for name in log.curves}
    if not known:
        raise UserError(f"{logs[0].run}/{FILE} holds no metric yet: has the run begun to log?")
    if not names:
        return metrics(logs)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"no run has {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return wanted


def running_mean(values: np.ndarray, points: int) -> np.ndarray:
    """The mean of each value and `points` // 2 on both sides, fewer at the ends; without what is
    not finite, NaN where all is."""
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    place, half = np.arange(len(values)), points // 2
    start, end = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[start]) / (counts[end] - counts[start])


@dataclass(frozen=True)
class Difference:
    """How a metric differs between two runs.

    `common` steps were compared and `only` are the counts of steps that one run alone has. The
    `first` and the `largest` are (step, value, value), or None where all are the same.
    """

    name: str
    common: int
    only: tuple[int, int]
    first: tuple[int, float, float] | None
    largest: tuple[int, float, float] | None

    @property
    def same(self) -> bool:
        return self.first is None and self.common > 0 and self.only == (0, 0)

    def line(self) -> str:
        if self.first is None:
            text = f"{self.name}: the same at {self.common} common steps"
        else:
            (step, a, b), (at, c, d) = self.first, self.largest
            text = (
                f"{self.name}: differs from step {step} on: {a:.7g} and {b:.7g}, by "
                f"{distance(a, b):.2g}; most at step {at}, by {distance(c, d):.2g}; "
                f"{self.common} common steps"
            )
        parts = [f"{n} only in the {w} run" for n, w in zip(self.only, ("first", "second")) if n]
        return ", ".join([text, *parts])


def distance(a: float, b: float) -> float:
    """|a - b|; 0 where both are the same infinity or both NaN, infinite where one alone is."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def compare(a: Log, b: Log, names: Iterable[str], tolerance: float = 0.0) -> list[Difference]:
    """The Difference of each metric. Values whose distance is at most `tolerance` times the larger
    of both are the same."""
    found = []
    for name in names:
        one, other = a.curves.get(name, {}), b.curves.get(name, {})
        common = sorted(one.keys() & other.keys())
        apart = [
            (step, one[step], other[step])
            for step in common
            if (gap := distance(one[step], other[step]))
            and not gap <= tolerance * max(abs(one[step]), abs(other[step]))
        ]
        largest = max(apart, key=lambda x: distance(x[1], x[2]), default=None)
        only = len(one) - len(common), len(other) - len(common)
        found.append(Difference(name, len(common), only, apart[0] if apart else None, largest))
    return found
