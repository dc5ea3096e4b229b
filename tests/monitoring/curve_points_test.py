"""Thinned curves and running means."""

import numpy as np
import pytest

from dgpt_jax.monitoring import curve_points


def test_a_thinned_curve_keeps_every_extreme():
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 50, 30_000))
    values = rng.standard_normal(len(steps))
    values[[100, 20_000]] = 1e3, -1e3
    values[9_000:12_000] = np.nan
    values[::7] = np.inf
    indices = curve_points.thin(steps, values, buckets=100)
    assert len(indices) <= 202 and np.all(np.diff(indices) > 0)
    assert {0, 100, 20_000, len(steps) - 1} <= {*indices.tolist()}
    bucket = np.searchsorted(np.linspace(steps[0], steps[-1], 101), steps, side="right")
    for number in np.unique(bucket):
        original = values[bucket == number]
        thinned = values[indices][bucket[indices] == number]
        if np.isfinite(original).any():
            original, thinned = original[np.isfinite(original)], thinned[np.isfinite(thinned)]
            assert (thinned.min(), thinned.max()) == (original.min(), original.max())
        else:
            assert len(thinned)  # the gap is plotted
    np.testing.assert_array_equal(curve_points.thin(steps[:200], values[:200], 100), np.arange(200))
    assert len(curve_points.thin(np.array([2**63 - 1]), np.ones(1), 0)) == 1


def test_running_mean_agrees_with_a_direct_mean():
    values = np.random.default_rng(0).standard_normal(30)
    values[[3, 4, 5, 17]] = [np.nan, np.inf, -np.inf, np.nan]
    for points in (1, 3, 8):
        half = points // 2
        for i, mean in enumerate(curve_points.running_mean(values, points)):
            window = values[max(0, i - half) : i + half + 1]
            window = window[np.isfinite(window)]
            assert mean == pytest.approx(window.mean()) if len(window) else np.isnan(mean)
