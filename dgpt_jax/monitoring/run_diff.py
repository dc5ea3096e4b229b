"""Comparison of the curves of two runs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dgpt_jax.errors import counted
from dgpt_jax.monitoring.metrics_log import Log


@dataclass(frozen=True)
class Difference:
    """Difference of a metric between two runs.

    common: number of steps that both have. only: numbers of steps that only one of them has.
    first, largest: (step, value, value) of differences, None if there are none. last: the last
    (step, value) of each run, None if it has not logged the metric.
    """

    name: str
    common: int
    only: tuple[int, int]
    first: tuple[int, float, float] | None
    largest: tuple[int, float, float] | None
    last: tuple[tuple[int, float] | None, tuple[int, float] | None]

    @property
    def same(self) -> bool:
        """True if both runs have the metric at the same steps with the same values."""
        return self.first is None and self.common > 0 and self.only == (0, 0)

    def line(self) -> str:
        """Returns the difference as a line of text."""
        if not self.common:
            return f"{self.name}: no common steps; {self._last_values()}"
        if self.first is None or self.largest is None:
            text = f"{self.name}: the same at {counted(self.common, 'common step')}"
        else:
            (step, a, b), (largest_step, c, d) = self.first, self.largest
            text = (
                f"{self.name}: differs from step {step} on: {a:.7g} and {b:.7g}, by "
                f"{distance(a, b):.2g}; most at step {largest_step}, by {distance(c, d):.2g}; "
                f"{counted(self.common, 'common step')}"
            )
        counts = [f"{n} only in the {w} run" for n, w in zip(self.only, ("first", "second")) if n]
        return ", ".join([text, *counts])

    def _last_values(self) -> str:
        """Returns the last values and their distance, for runs without common steps."""
        runs = zip(("first", "second"), self.last, self.only, strict=True)
        ends = [
            f"the {run} run ends with {end[1]:.7g} at step {end[0]} ({counted(n, 'step')})"
            if end
            else f"the {run} run has none"
            for run, end, n in runs
        ]
        if self.last[0] and self.last[1]:
            ends.append(f"by {distance(self.last[0][1], self.last[1][1]):.2g}")
        return ", ".join(ends)


def distance(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """Returns |a - b| elementwise: 0 if both are the same infinity or NaN, infinite if only one of
    them is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(np.isfinite(a) & np.isfinite(b), np.abs(np.subtract(a, b)), np.inf)
    return np.where(np.equal(a, b) | (np.isnan(a) & np.isnan(b)), 0.0, gap)


def compare(a: Log, b: Log, names: Iterable[str], tolerance: float = 0.0) -> list[Difference]:
    """Returns the Difference of each metric. Finite values count as equal if their distance is at
    most `tolerance` times the larger of both."""
    return [_difference(name, a, b, tolerance) for name in names]


def _difference(name: str, a: Log, b: Log, tolerance: float) -> Difference:
    (steps_a, values_a), (steps_b, values_b) = a.arrays(name), b.arrays(name)
    steps, in_a, in_b = np.intersect1d(steps_a, steps_b, assume_unique=True, return_indices=True)
    x, y = values_a[in_a], values_b[in_b]
    gaps = distance(x, y)
    with np.errstate(invalid="ignore"):
        allowed = tolerance * np.maximum(np.abs(x), np.abs(y))
    gaps[np.isfinite(gaps) & (gaps <= allowed)] = 0.0
    only = len(steps_a) - len(steps), len(steps_b) - len(steps)
    last_a, last_b = (
        (int(s[-1]), float(v[-1])) if len(s) else None
        for s, v in ((steps_a, values_a), (steps_b, values_b))
    )
    last = last_a, last_b
    if not gaps.any():
        return Difference(name, len(steps), only, None, None, last)
    first, largest = (
        (int(steps[i]), float(x[i]), float(y[i])) for i in ((gaps > 0).argmax(), gaps.argmax())
    )
    return Difference(name, len(steps), only, first, largest, last)
