"""What a run has logged: metrics.jsonl as curves.

The file may be that of a run that is being written, was killed in the middle of a line, or was
continued from a checkpoint.
"""

import bisect
import itertools
import json
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from dgpt_jax.schema import UserError

FILE = "metrics.jsonl"
BUCKETS = 1000  # columns of a drawn curve: more than a panel has pixels
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
class Curve:
    """The values of a metric, float64 and perhaps not finite, at ascending steps, int64."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Curve":
        """The same without values that are not finite."""
        good = np.isfinite(self.values)
        return Curve(self.steps[good], self.values[good])

    def point(self, index: int) -> tuple[float, int]:
        """(value, step)."""
        return float(self.values[index]), int(self.steps[index])

    def as_dict(self) -> dict[int, float]:
        """{step: value}, for curves of a few thousand values."""
        return dict(zip(self.steps.tolist(), self.values.tolist(), strict=True))


EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Log:
    """The curves of a run by metric, in the order in which they were first logged. `damaged` counts
    lines that were no JSON, a last one without its end left out."""

    run: Path
    curves: dict[str, Curve]
    damaged: int = 0

    def arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, empty where the run has none of it."""
        curve = self.curves.get(name, EMPTY)
        return curve.steps, curve.values

    @property
    def last(self) -> int:
        """The last step, 0 where nothing was logged."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)


class _Table:
    """Lines with the same metrics: the number and the step of each line, and a column a metric."""

    def __init__(self, names: Iterable[str]):
        self.lines, self.steps = array("q"), array("q")
        self.columns = {name: array("d") for name in names}

    def add(self, line: int, step: int, values: dict[str, float]):
        if self.steps and self.steps[-1] == step:
            self._cut(len(self.steps) - 1)
        self.lines.append(line)
        self.steps.append(step)
        for column, value in zip(self.columns.values(), values.values(), strict=True):
            column.append(value)

    def forget_from(self, step: int):
        self._cut(bisect.bisect_left(self.steps, step))

    def _cut(self, rows: int):
        for column in (self.lines, self.steps, *self.columns.values()):
            del column[rows:]


class _Columns:
    """Gathers the lines of a log: 8 bytes a value, and 16 a line for its step and its number."""

    def __init__(self):
        self._tables: dict[tuple[str, ...], _Table] = {}
        self._lines, self._newest = 0, -math.inf

    def add(self, step: int, values: dict[str, float]):
        if step < self._newest:
            for table in self._tables.values():
                table.forget_from(step)
        self._newest = step
        if (names := tuple(values)) not in self._tables:
            self._tables[names] = _Table(names)
        self._tables[names].add(self._lines, step, values)
        self._lines += 1

    def curves(self) -> dict[str, Curve]:
        """Takes the columns away, so that a value is in memory once. Metrics of the same tables
        share their steps."""
        orders: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        curves = {}
        for name in dict.fromkeys(name for names in self._tables for name in names):
            of = tuple(names for names in self._tables if name in names)
            tables = [self._tables[names] for names in of]
            if of not in orders:
                orders[of] = _in_order(tables)
            steps, rows = orders[of]
            values = np.concatenate([table.columns.pop(name) for table in tables])
            if len(steps):
                curves[name] = Curve(steps, values[rows])
        return curves


def _in_order(tables: Sequence[_Table]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, row of each among the rows of all tables); of a step the last line counts."""
    rows = np.argsort(np.concatenate([table.lines for table in tables]), kind="stable")
    steps = np.concatenate([table.steps for table in tables])[rows]
    last = np.ones(len(steps), bool)
    last[:-1] = steps[1:] != steps[:-1]
    return steps[last], rows[last]


def read(run) -> Log:
    """The log of a work directory. Raises UserError where it has none.

    Where steps go back, the run went on from a checkpoint: what it had logged from there on is
    forgotten, because the run that goes on has nothing of it. Within a step the last value counts.
    A million lines of twelve metrics take 130 MB.
    """
    path = epath.Path(run) / FILE
    if not path.is_file():
        raise UserError(f"{run} has no {FILE}: is it a work directory?")
    columns, damaged = _Columns(), 0
    with path.open("rb") as lines:
        for line in lines:
            if (entry := _entry(line.decode(errors="replace"))) is not None:
                columns.add(*entry)
            elif line.strip() and line.endswith(b"\n"):
                damaged += 1
    return Log(epath.Path(run), columns.curves(), damaged)


def _entry(line: str) -> tuple[int, dict[str, float]] | None:
    """(step, values) of a line, or None. A line that a kill cut off has the next one behind it."""
    start = line.rfind('{"step"')
    try:
        entry = json.loads(line[max(start, 0) :])
        step = int(entry.pop("step"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None
    if not -(2**63) <= step < 2**63:
        return None
    values = {}
    for name, value in entry.items():
        try:  # NaN and infinities are strings: JSON has none
            values[name] = float(value)
        except (ValueError, TypeError, OverflowError):
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


def thinned(steps: np.ndarray, values: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Indices, ascending, of what a drawing shows of a curve: of each of `buckets` equal parts of
    its steps the smallest and the largest finite value, or one value where none is finite; the
    first and the last value of all. At most 2 `buckets` + 2; all where they are no more."""
    if len(steps) <= 2 * buckets:
        return np.arange(len(steps))
    edges = np.searchsorted(steps, np.linspace(steps[0], steps[-1], buckets + 1))
    edges[0], edges[-1] = 0, len(steps)
    chosen = [0, len(steps) - 1]
    for start, end in itertools.pairwise(edges):
        finite = np.flatnonzero(np.isfinite(values[start:end]))
        if len(finite):
            part = values[start:end][finite]
            chosen += [start + finite[part.argmin()], start + finite[part.argmax()]]
        elif end > start:
            chosen.append(start)
    return np.unique(chosen)
