"""Reader of metrics.jsonl: curves by metric.

The run may still be writing, may have been killed in the middle of a line, or may have been resumed
from a checkpoint.
"""

import bisect
import json
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import time_use

FILE = "metrics.jsonl"
# Metrics that depend on the machine and its load; ignored when runs are compared.
OF_THE_MACHINE = (
    "images_per_second", "data_wait", "eta_seconds", "step_seconds", "fetched_bytes",
    "fetch_wait_seconds",
)  # fmt: skip


def is_loss(metric: str) -> bool:
    """True if lower is better."""
    return metric.startswith("heldout/")


def is_share(metric: str) -> bool:
    """True if an evaluation's metric is a share of examples, from 0 to 1."""
    return not metric.startswith(("heldout/", "rank/"))


def is_detail(metric: str) -> bool:
    """True for one of many similar metrics, like val/top1/HEAD: logged, but not displayed."""
    return metric.count("/") > 1


@dataclass(frozen=True)
class Curve:
    """Values of a metric (float64, may be non-finite) at ascending steps (int64)."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Curve":
        """Returns the curve without non-finite values."""
        finite = np.isfinite(self.values)
        return Curve(self.steps[finite], self.values[finite])

    def point(self, index: int) -> tuple[float, int]:
        """Returns (value, step)."""
        return float(self.values[index]), int(self.steps[index])

    def as_dict(self) -> dict[int, float]:
        """Returns {step: value}; for curves of a few thousand values."""
        return dict(zip(self.steps.tolist(), self.values.tolist(), strict=True))


EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Log:
    """Curves of a run by metric, in the order of their first lines.

    `damaged` counts lines that are not valid JSON, except an unterminated last one. `times` is None
    for logs of versions that did not write them.
    """

    run: epath.Path | Path
    curves: dict[str, Curve]
    damaged: int = 0
    times: time_use.TimeUse | None = None

    def arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps, values) of a metric, empty if it was not logged."""
        curve = self.curves.get(name, EMPTY)
        return curve.steps, curve.values

    @property
    def last(self) -> int:
        """The last step; 0 if nothing was logged."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)


class _Table:
    """Lines with the same metrics: line number and step of each, and a column per metric."""

    def __init__(self, names: Iterable[str]):
        self.lines, self.steps = array("q"), array("q")
        self.columns = {name: array("d") for name in names}

    def add(self, line: int, step: int, values: dict[str, float]):
        if self.steps and self.steps[-1] == step:
            self._truncate(len(self.steps) - 1)
        self.lines.append(line)
        self.steps.append(step)
        for column, value in zip(self.columns.values(), values.values(), strict=True):
            column.append(value)

    def drop_from(self, step: int):
        self._truncate(bisect.bisect_left(self.steps, step))

    def _truncate(self, rows: int):
        for column in (self.lines, self.steps, *self.columns.values()):
            del column[rows:]


class _Columns:
    """Columnar storage of a log: 8 bytes per value, and 16 per line for its step and number."""

    def __init__(self):
        self._tables: dict[tuple[str, ...], _Table] = {}
        self._lines, self._last_step = 0, -math.inf

    def add(self, step: int, values: dict[str, float]):
        if step < self._last_step:
            for table in self._tables.values():
                table.drop_from(step)
        self._last_step = step
        if (names := tuple(values)) not in self._tables:
            self._tables[names] = _Table(names)
        self._tables[names].add(self._lines, step, values)
        self._lines += 1

    def curves(self) -> dict[str, Curve]:
        """Returns the curves, and frees the columns so that values are not in memory twice. Metrics
        of the same tables share their steps."""
        orders: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        curves = {}
        for name in dict.fromkeys(name for names in self._tables for name in names):
            keys = tuple(names for names in self._tables if name in names)
            tables = [self._tables[names] for names in keys]
            if keys not in orders:
                orders[keys] = _merge_order(tables)
            steps, rows = orders[keys]
            values = np.concatenate([table.columns.pop(name) for table in tables])
            if len(steps):
                curves[name] = Curve(steps, values[rows])
        return curves


def _merge_order(tables: Sequence[_Table]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps, row of each in the concatenated tables); the last line of a step wins."""
    rows = np.argsort(np.concatenate([table.lines for table in tables]), kind="stable")
    steps = np.concatenate([table.steps for table in tables])[rows]
    last = np.ones(len(steps), bool)
    last[:-1] = steps[1:] != steps[:-1]
    return steps[last], rows[last]


def read(run: epath.Path | Path | str) -> Log:
    """Returns the log of a work directory. Raises UserError if it has none.

    A decreasing step means that the run was resumed from a checkpoint: earlier lines from that step
    on are dropped. The last value of a step wins. A million lines of twelve metrics take 130 MB.
    """
    path = epath.Path(run) / FILE
    if not path.is_file():
        raise UserError(f"{run} has no {FILE}: is it a work directory?")
    columns, times, damaged = _Columns(), time_use.Reader(), 0
    with path.open("rb") as lines:
        for line in lines:
            if (entry := _parse_line(line.decode(errors="replace"))) is not None:
                times.take(entry[1])
                columns.add(*entry)
            elif line.strip() and line.endswith(b"\n"):
                damaged += 1
    return Log(epath.Path(run), columns.curves(), damaged, times.result())


def _parse_line(line: str) -> tuple[int, dict[str, float]] | None:
    """Returns (step, values), or None. A line truncated by a kill is followed by the next one
    without a newline."""
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
        try:  # NaN and infinities are strings in JSON
            values[name] = float(value)
        except (ValueError, TypeError, OverflowError):
            continue
    return step, values


def metrics(logs: Iterable[Log]) -> list[str]:
    """Returns the metrics to plot, in order: losses, accuracies, the rest; error counters only if
    nonzero."""
    logs = list(logs)
    names = dict.fromkeys(name for log in logs for name in log.curves if not is_detail(name))
    first = ["loss", "next", "visible", *(n for n in names if n.startswith("heldout/"))]
    last = ["learning_rate", "grad_norm", "images_per_second", "data_wait"]
    counts = ["skipped", "bad_records", "fetched_bytes", "fetch_wait_seconds"]
    nonzero = [name for name in counts if any(np.any(log.arrays(name)[1]) for log in logs)]
    hidden = ("eta_seconds", "step_seconds")
    middle = [n for n in names if n not in (*first, *last, *counts, *hidden)]
    return [name for name in (*first, *middle, *last, *nonzero) if name in names]


def select_metrics(logs: Sequence[Log], names: str | None) -> list[str]:
    """Returns the metrics of a comma-separated list (None: `metrics`). Raises UserError if no run
    has one of them."""
    available = {name for log in logs for name in log.curves}
    if not available:
        raise UserError(f"{logs[0].run}/{FILE} has no metrics yet: wait for config.log_every steps")
    if not names:
        return metrics(logs)
    selected = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in selected if name not in available]:
        raise UserError(f"no run has {', '.join(unknown)}; known: {', '.join(sorted(available))}")
    return selected
