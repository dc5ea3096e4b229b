"""Points of a curve for a plot: its running mean, and its extremes if it is long."""

import itertools

import numpy as np

BUCKETS = 1000  # of a plotted curve: more than a panel has pixel columns


def running_mean(values: np.ndarray, points: int) -> np.ndarray:
    """Returns the mean of each value and `points` // 2 on both sides, fewer at the ends. Non-finite
    values are ignored; NaN if all are."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    center, half = np.arange(len(values)), points // 2
    start, end = np.maximum(center - half, 0), np.minimum(center + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[start]) / (counts[end] - counts[start])


def thin(steps: np.ndarray, values: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Returns ascending indices of the points to plot, at most 2 * `buckets` + 2.

    They are the minimum and the maximum of each of `buckets` equal ranges of steps (one value if
    none is finite), and the first and last point.
    """
    if len(steps) <= 2 * buckets:
        return np.arange(len(steps))
    edges = np.searchsorted(steps, np.linspace(steps[0], steps[-1], buckets + 1))
    edges[0], edges[-1] = 0, len(steps)
    chosen = [0, len(steps) - 1]
    for start, end in itertools.pairwise(edges):
        finite = np.flatnonzero(np.isfinite(values[start:end]))
        if len(finite):
            bucket = values[start:end][finite]
            chosen += [start + finite[bucket.argmin()], start + finite[bucket.argmax()]]
        elif end > start:
            chosen.append(start)
    return np.unique(chosen)
