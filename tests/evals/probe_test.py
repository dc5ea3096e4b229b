"""Linear probe and few-shot classification of a bank sharded over devices and processes, against
scikit-learn and NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dgpt_jax import evaluate
from dgpt_jax.config import roots, schema
from dgpt_jax.evals import feature_bank, probe
from dgpt_jax.evals.feature_bank import FeatureBank
from tests.evals.fewshot_test import check_few_shot
from tests.support.banks import clusters, in_processes, mesh_of
from tests.support.processes import on_devices

GRID = (1e-3, 1e-2, 1e-1, 1.0)


def standardized(x, x_test):
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    return (x - mean) / std, (x_test - mean) / std


def fit_scikit_learn(x, y, l2):
    return LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=5000).fit(x, y)


def selected_by_scikit_learn(x, y) -> float:
    folds = probe.stratified_folds(y)
    hits = [
        sum(
            (fit_scikit_learn(x[folds != f], y[folds != f], l2).predict(x) == y)[folds == f].sum()
            for f in range(folds.max() + 1)
        )
        for l2 in GRID
    ]
    return GRID[max(i for i, n in enumerate(hits) if n == max(hits))]


def check_probe(devices: int, length: int):
    """Strength, weights and predictions equal scikit-learn's."""
    x, y = clusters(length, seed=1)
    x_test, y_test = clusters(150, seed=2)
    x, x_test = x * np.arange(1, 17) + 5, x_test * np.arange(1, 17) + 5  # scales and a mean
    train, test = (
        FeatureBank.from_arrays(rows.astype(np.float32), labels, mesh_of(devices), batch_size)
        for rows, labels, batch_size in ((x, y, 48), (x_test, y_test, 32))
    )
    result = probe.linear_probe(train, test, l2_grid=GRID)
    x, x_test = standardized(x, x_test)
    assert result.l2 == selected_by_scikit_learn(x, y)
    theirs = fit_scikit_learn(x, y, result.l2)
    np.testing.assert_allclose(result.weights, theirs.coef_.T, atol=2e-4)
    bias = result.bias - result.bias.mean()  # up to a constant
    np.testing.assert_allclose(bias, theirs.intercept_ - theirs.intercept_.mean(), atol=2e-4)
    assert result.correct == (theirs.predict(x_test) == y_test).sum()


def check_bank(devices: int):
    """Rows of all processes together, moments and selection."""
    x, y = clusters(203, seed=1)
    bank = FeatureBank.from_arrays(x, y, mesh_of(devices), batch_size=48)
    counts, sums = np.zeros(len(y)), np.zeros(x.shape)
    for rows, indices in bank.local():
        counts[indices] += 1
        sums[indices] += rows
    np.testing.assert_array_equal(feature_bank.sum_over_processes(counts), 1)
    np.testing.assert_array_equal(feature_bank.sum_over_processes(sums), x)
    for moment, expected in zip(bank.moments(), (x.mean(0), x.std(0)), strict=True):
        np.testing.assert_allclose(moment, expected, rtol=1e-5, atol=1e-6)
    chosen = np.array([0, 3, 47, 48, 150, 202])
    some = bank.select(chosen)
    np.testing.assert_array_equal(some.gathered(), x[chosen])
    np.testing.assert_array_equal(some.labels, y[chosen])
    assert bank.select(np.arange(203)) is bank


def everything(devices: int):
    """Several chunks on a device, and sums between processes in several blocks."""
    feature_bank.ROWS, feature_bank.LOGITS, feature_bank.GATHERED = 20, 60, 64
    check_bank(devices)
    check_probe(devices, 203)
    check_few_shot(devices, 24, 0.5)
    check_few_shot(devices, 300, 2.0**10)


def eight_devices():
    everything(8)


def three_processes():
    everything(6)


def test_one_device(monkeypatch):
    for name in ("ROWS", "LOGITS", "GATHERED"):
        # `everything` changes them: restore afterwards
        monkeypatch.setattr(feature_bank, name, getattr(feature_bank, name))
    everything(1)


def test_eight_devices():
    on_devices(8, eight_devices)


@pytest.mark.slow
def test_three_processes():
    in_processes(3, 2, three_processes)


def test_fit_compiles_once_for_all_folds_and_strengths():
    x, y = clusters(120, seed=1)
    train = FeatureBank.from_arrays(x, y, mesh_of(1))
    probe.fit.clear_cache()
    probe.linear_probe(train, train, l2_grid=GRID)
    assert probe.fit._cache_size() == 1


@pytest.mark.parametrize(
    "rows,classes,expected", [(8, 1000, 8192), (8, 21841, 320), (256, 2, 8192)]
)
def test_chunks_bound_the_logits(rows, classes, expected):
    steps = 8192 // rows * 3
    numbers = jnp.arange(steps * rows, dtype=jnp.int32).reshape(steps, rows)
    sizes = []

    def add(first, chunk):
        sizes.append(len(chunk))
        return first + len(chunk), (chunk == first + jnp.arange(len(chunk))).all()

    count, in_order = feature_bank.scan_chunks(add, 0, numbers, classes)
    assert count == numbers.size and in_order.all() and len(in_order) * sizes[0] == count
    assert sizes[0] <= expected and sizes[0] * classes <= feature_bank.LOGITS


@pytest.mark.parametrize("protocol", ["linear", "fewshot", "knn"])
def test_features_are_not_gathered(protocol, monkeypatch):
    """With all labels no host has all features; with few labels only the selected ones."""
    gathered = []
    take = feature_bank._take

    def spy(rows, step, out_sharding):
        gathered.append(rows.shape[1])
        return take(rows, step, out_sharding)

    x, y = clusters(200, seed=1)
    train, test = (FeatureBank.from_arrays(x, y, mesh_of(1), batch_size=8) for _ in range(2))
    monkeypatch.setattr(feature_bank, "_take", spy)
    monkeypatch.setattr(feature_bank.FeatureBank, "gathered", None)
    monkeypatch.setattr(probe, "L2_GRID", GRID)
    settings = dict(data="d", protocol=protocol, shots=(0, 2))
    rows = list(evaluate.measure(schema.parse(roots.EvaluateConfig, settings), train, test))
    ks = len(roots.EvaluateConfig().k)
    assert len(rows) == 2 * (ks if protocol == "knn" else 1)
    queries = 2 * 25 if protocol == "knn" else 0  # kNN replicates its queries
    assert len(gathered) - queries <= 10


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_probe_reaches_scikit_learns_minimum(l2):
    x, y = clusters(300, seed=1)
    bank = FeatureBank.from_arrays(x, y, mesh_of(1))
    result = probe.linear_probe(bank, bank, l2_grid=(l2,), iterations=500)
    standard, _ = standardized(x, x)
    theirs = fit_scikit_learn(standard, y, l2)

    def objective(weights, bias):
        logits = standard @ weights + bias
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
        return losses.mean() + 0.5 * l2 * np.square(weights).sum()

    expected = objective(theirs.coef_.T, theirs.intercept_)
    assert objective(result.weights, result.bias) == pytest.approx(expected, rel=1e-6)


def test_probe_ignores_test_labels():
    x, y = clusters(100, seed=1)
    x_test, y_test = clusters(60, seed=2)
    train = FeatureBank.from_arrays(x, y, mesh_of(1))
    orders = y_test, np.roll(np.sort(y_test), 7)
    honest, shuffled = (
        probe.linear_probe(train, FeatureBank.from_arrays(x_test, labels, mesh_of(1)))
        for labels in orders
    )
    assert honest.l2 == shuffled.l2
    np.testing.assert_array_equal(honest.weights, shuffled.weights)
    assert honest.correct > shuffled.correct


def test_probe_with_one_label_per_class():
    x, y = clusters(200, seed=1, spread=0.5)
    bank = FeatureBank.from_arrays(x, y, mesh_of(1))
    some = bank.select(probe.few_labels(y, 1, seed=0))
    assert len(some) == 5
    assert probe.linear_probe(some, bank).correct > 0.6 * len(bank)
