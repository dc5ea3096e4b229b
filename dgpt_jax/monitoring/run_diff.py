"""Where the curves of two runs part."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dgpt_jax.run_log import Log


@dataclass(frozen=True)
class Difference:
    """How a metric differs between two runs.

    `common` steps were compared and `only` are the counts of steps that one run alone has. The
    `first` and the `largest` are (step, value, value), or None where all are the same. `last` are
    the last (step, value) of each run, None of one that has not logged the metric.
    """

    name: str
    common: int
    only: tuple[int, int]
    first: tuple[int, float, float] | None
    largest: tuple[int, float, float] | None
    last: tuple[tuple[int, float] | None, tuple[int, float] | None]

    @property
    def same(self) -> bool:
        return self.first is None and self.common > 0 and self.only == (0, 0)

    def line(self) -> str:
        if not self.common:
            return f"{self.name}: no common steps; {self._ends()}"
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

    def _ends(self) -> str:
        """The last values, and by how much they differ, where no step was compared."""
        runs = zip(("first", "second"), self.last, self.only, strict=True)
        ends = [
            f"the {run} run ends with {end[1]:.7g} at step {end[0]} ({n} steps)"
            if end
            else f"the {run} run has none"
            for run, end, n in runs
        ]
        if None not in self.last:
            (_, a), (_, b) = self.last
            ends.append(f"by {distance(a, b):.2g}")
        return ", ".join(ends)


def distance(a, b):
    """|a - b|, elementwise; 0 where both are the same infinity or both NaN, infinite where one
    alone is."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where(np.isfinite(a) & np.isfinite(b), np.abs(np.subtract(a, b)), np.inf)
    return np.where(np.equal(a, b) | (np.isnan(a) & np.isnan(b)), 0.0, apart)


def compare(a: Log, b: Log, names: Iterable[str], tolerance: float = 0.0) -> list[Difference]:
    """The Difference of each metric. Finite values whose distance is at most `tolerance` times the
    larger of both are the same."""
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
    last = tuple(
        (int(s[-1]), float(v[-1])) if len(s) else None
        for s, v in ((steps_a, values_a), (steps_b, values_b))
    )
    if not gaps.any():
        return Difference(name, len(steps), only, None, None, last)
    first, largest = (
        (int(steps[i]), float(x[i]), float(y[i])) for i in ((gaps > 0).argmax(), gaps.argmax())
    )
    return Difference(name, len(steps), only, first, largest, last)
