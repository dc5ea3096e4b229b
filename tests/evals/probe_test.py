"""The linear probe and few-shot classification of a bank that is split over devices and processes,
against scikit-learn and NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dgpt_jax import config, evaluate, schema
from dgpt_jax.evals import features, probe
from tests.banks import clusters, in_processes, mesh_of
from tests.fewshot_test import few_shot_is_direct
from tests.processes import on_devices

GRID = (1e-3, 1e-2, 1e-1, 1.0)


def standardised(x, x_test):
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    return (x - mean) / std, (x_test - mean) / std


def scikit_learns(x, y, l2):
    return LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=5000).fit(x, y)


def scikit_learns_choice(x, y) -> float:
    folds = probe.stratified_folds(y)
    hits = [
        sum(
            (scikit_learns(x[folds != f], y[folds != f], l2).predict(x) == y)[folds == f].sum()
            for f in range(folds.max() + 1)
        )
        for l2 in GRID
    ]
    return GRID[max(i for i, n in enumerate(hits) if n == max(hits))]


def probe_is_scikit_learns(devices: int, length: int):
    """Strength, weights and answers."""
    x, y = clusters(length, seed=1)
    x_test, y_test = clusters(150, seed=2)
    x, x_test = x * np.arange(1, 17) + 5, x_test * np.arange(1, 17) + 5  # scales and a mean
    train, test = (
        features.Bank.of(rows.astype(np.float32), labels, mesh_of(devices), batch_size)
        for rows, labels, batch_size in ((x, y, 48), (x_test, y_test, 32))
    )
    result = probe.linear_probe(train, test, l2_grid=GRID)
    x, x_test = standardised(x, x_test)
    assert result.l2 == scikit_learns_choice(x, y)
    theirs = scikit_learns(x, y, result.l2)
    np.testing.assert_allclose(result.weights, theirs.coef_.T, atol=2e-4)
    bias = result.bias - result.bias.mean()  # a constant changes nothing
    np.testing.assert_allclose(bias, theirs.intercept_ - theirs.intercept_.mean(), atol=2e-4)
    assert result.correct == (theirs.predict(x_test) == y_test).sum()


def banks_are_whole(devices: int):
    """What a process holds, all together, and what is selected of it."""
    x, y = clusters(203, seed=1)
    bank = features.Bank.of(x, y, mesh_of(devices), batch_size=48)
    counts, sums = np.zeros(len(y)), np.zeros(x.shape)
    for rows, indices in bank.local():
        counts[indices] += 1
        sums[indices] += rows
    np.testing.assert_array_equal(features.sum_over_processes(counts), 1)
    np.testing.assert_array_equal(features.sum_over_processes(sums), x)
    for found, expected in zip(bank.moments(), (x.mean(0), x.std(0)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    chosen = np.array([0, 3, 47, 48, 150, 202])
    some = bank.select(chosen)
    np.testing.assert_array_equal(some.gathered(), x[chosen])
    np.testing.assert_array_equal(some.labels, y[chosen])
    assert bank.select(np.arange(203)) is bank


def everything(devices: int):
    """Several chunks on a device, and sums between processes in several blocks."""
    features.ROWS, features.LOGITS, features.GATHERED = 20, 60, 64
    banks_are_whole(devices)
    probe_is_scikit_learns(devices, 203)
    few_shot_is_direct(devices, 24, 0.5)
    few_shot_is_direct(devices, 300, 2.0**10)


def eight_devices():
    everything(8)


def three_processes():
    everything(6)


def test_one_device(monkeypatch):
    for name in ("ROWS", "LOGITS", "GATHERED"):
        monkeypatch.setattr(features, name, getattr(features, name))  # `everything` changes them
    everything(1)


def test_eight_devices():
    on_devices(8, eight_devices)


@pytest.mark.slow
def test_three_processes():
    in_processes(3, 2, three_processes)


def test_one_program_fits_all_folds_and_strengths():
    x, y = clusters(120, seed=1)
    train = features.Bank.of(x, y, mesh_of(1))
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

    count, in_order = features.scan_chunks(add, 0, numbers, classes)
    assert count == numbers.size and in_order.all() and len(in_order) * sizes[0] == count
    assert sizes[0] <= expected and sizes[0] * classes <= features.LOGITS


@pytest.mark.parametrize("protocol", ["linear", "fewshot", "knn"])
def test_features_are_not_gathered(protocol, monkeypatch):
    """All labels: on no host are all features. Few: only those that were chosen."""
    gathered = []
    take = features._take

    def watched(rows, step, where):
        gathered.append(rows.shape[1])
        return take(rows, step, where)

    x, y = clusters(200, seed=1)
    train, test = (features.Bank.of(x, y, mesh_of(1), batch_size=8) for _ in range(2))
    monkeypatch.setattr(features, "_take", watched)
    monkeypatch.setattr(features.Bank, "gathered", None)
    monkeypatch.setattr(probe, "L2_GRID", GRID)
    settings = dict(data="d", protocol=protocol, shots=(0, 2))
    rows = list(evaluate.measure(schema.parse(config.Evaluate, settings), train, test))
    ks = len(config.Evaluate().k)
    assert len(rows) == 2 * (ks if protocol == "knn" else 1)
    queries = 2 * 25 if protocol == "knn" else 0  # kNN's queries go to all devices
    assert len(gathered) - queries <= 10


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_probe_finds_scikit_learns_minimum(l2):
    x, y = clusters(300, seed=1)
    bank = features.Bank.of(x, y, mesh_of(1))
    result = probe.linear_probe(bank, bank, l2_grid=(l2,), iterations=500)
    standard, _ = standardised(x, x)
    theirs = scikit_learns(standard, y, l2)

    def objective(weights, bias):
        logits = standard @ weights + bias
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
        return losses.mean() + 0.5 * l2 * np.square(weights).sum()

    expected = objective(theirs.coef_.T, theirs.intercept_)
    assert objective(result.weights, result.bias) == pytest.approx(expected, rel=1e-6)


def test_probe_never_looks_at_test_labels():
    x, y = clusters(100, seed=1)
    x_test, y_test = clusters(60, seed=2)
    train = features.Bank.of(x, y, mesh_of(1))
    orders = y_test, np.roll(np.sort(y_test), 7)
    honest, shuffled = (
        probe.linear_probe(train, features.Bank.of(x_test, labels, mesh_of(1))) for labels in orders
    )
    assert honest.l2 == shuffled.l2
    np.testing.assert_array_equal(honest.weights, shuffled.weights)
    assert honest.correct > shuffled.correct


def test_probe_with_one_label_a_class():
    x, y = clusters(200, seed=1, spread=0.5)
    bank = features.Bank.of(x, y, mesh_of(1))
    some = bank.select(probe.few_labels(y, 1, seed=0))
    assert len(some) == 5
    assert probe.linear_probe(some, bank).correct > 0.6 * len(bank)
