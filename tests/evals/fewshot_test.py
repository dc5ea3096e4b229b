"""Few-shot least squares against a direct solution, and samples against the protocol's."""

import numpy as np
import pytest

from dgpt_jax.evals import fewshot, probe
from dgpt_jax.evals.feature_bank import FeatureBank
from tests.support.banks import clusters, mesh_of


def direct(x, y, x_test, classes, l2):
    """Predictions by solving the normal equations."""
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64) + 1e-5
    x, x_test = (np.c_[(z - mean) / std, np.full(len(z), 100.0)] for z in (x, x_test))
    targets = np.where(np.arange(classes)[None] == y[:, None], 1.0, -1.0)
    weights = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ targets)
    return (x_test @ weights).argmax(axis=1)


def check_few_shot(devices: int, length: int, l2: float):
    x, y = clusters(length, seed=1, width=24)
    x_test, y_test = clusters(9000, seed=2, width=24)
    x, x_test = x * np.arange(1, 25) + 5, x_test * np.arange(1, 25) + 5  # scales and a mean
    expected = direct(x, y, x_test, 5, l2)
    mesh = mesh_of(devices)
    train, test = (
        FeatureBank.from_arrays(x, y, mesh, 16),
        FeatureBank.from_arrays(x_test, y_test, mesh),
    )
    np.testing.assert_array_equal(fewshot.least_squares(train, 5, l2)(x_test), expected)
    assert fewshot.correct(train, test, l2=l2) == (expected == y_test).sum()


@pytest.mark.parametrize("length", [12, 24, 25, 26, 300])  # 24 features and the constant
@pytest.mark.parametrize("l2", [0.5, 2.0**10])
def test_least_squares_is_the_direct_solution(length, l2):
    check_few_shot(1, length, l2)


def test_few_labels_follow_the_protocol():
    """One generator permutes each class in turn; shots are the first of it."""
    y = np.random.default_rng(3).integers(0, 6, 400)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        classes = [rng.permutation(np.where(y == c)[0]) for c in range(6)]
        for shots in (1, 5, 25):
            expected = np.concatenate([members[:shots] for members in classes])
            assert set(probe.few_labels(y, shots, seed)) == set(expected)
