"""kNN against NumPy, the linear probe against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dgpt_jax.evals import features, knn, probe
from dgpt_jax.schema import UserError


def clusters(n, seed, classes=5, width=16, spread=2.5):
    centres = np.random.default_rng(0).standard_normal((classes, width)) * 1.2
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = centres[labels] + spread * rng.standard_normal((n, width))
    return x.astype(np.float32), labels


def direct_knn(x, y, x_test, y_test, k, temperature):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x_test = x_test / np.linalg.norm(x_test, axis=1, keepdims=True)
    hits = 0
    for query, answer in zip(x_test, y_test, strict=True):
        similarity = x @ query
        near = np.argsort(-similarity)[:k]
        votes = np.zeros(y.max() + 1)
        np.add.at(votes, y[near], np.exp(similarity[near] / temperature))
        hits += votes.argmax() == answer
    return hits / len(y_test)


@pytest.mark.parametrize("chunk", [32, 1024])
def test_knn_is_the_direct_computation(chunk):
    x, y = clusters(203, seed=1)
    x_test, y_test = clusters(77, seed=2)
    ks = (1, 10, 20, 150, 300)
    for temperature in (0.07, 1.0):
        found = knn.knn_accuracy(x, y, x_test, y_test, ks=ks, temperature=temperature, chunk=chunk)
        direct = {k: direct_knn(x, y, x_test, y_test, k, temperature) for k in ks}
        assert found == pytest.approx(direct, abs=1e-9)
    assert len(set(found.values())) > 2  # the ks really differ here


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_probe_finds_scikit_learns_minimum(l2):
    x, y = clusters(300, seed=1)
    x_test, y_test = clusters(200, seed=2)
    result = probe.linear_probe(x, y, x_test, y_test, l2_grid=(l2,), iterations=500)
    mean, std = x.mean(axis=0), x.std(axis=0)
    standard = (x - mean) / std
    sklearn = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(standard, y)

    def objective(weights, bias):
        logits = standard @ weights + bias
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
        return losses.mean() + 0.5 * l2 * np.square(weights).sum()

    theirs = objective(sklearn.coef_.T, sklearn.intercept_)
    assert objective(result.weights, result.bias) == pytest.approx(theirs, rel=1e-4)
    accuracy = sklearn.score((x_test - mean) / std, y_test)
    assert abs(result.accuracy - accuracy) <= 1 / len(y_test)


def test_probe_never_looks_at_test_labels():
    x, y = clusters(100, seed=1)
    x_test, y_test = clusters(60, seed=2)
    honest = probe.linear_probe(x, y, x_test, y_test)
    shuffled = probe.linear_probe(x, y, x_test, np.roll(np.sort(y_test), 7))
    assert honest.l2 == shuffled.l2
    np.testing.assert_array_equal(honest.weights, shuffled.weights)
    assert honest.accuracy > shuffled.accuracy


def test_probe_with_one_label_a_class():
    x, y = clusters(200, seed=1, spread=0.5)
    chosen = probe.few_labels(y, 1, seed=0)
    assert len(chosen) == 5
    assert probe.linear_probe(x[chosen], y[chosen], x, y).accuracy > 0.6


def test_folds_and_few_labels():
    labels = np.array([0] * 7 + [1] * 3 + [2] * 12)
    folds = probe.stratified_folds(labels)
    assert folds.max() == 2
    for label in range(3):
        counts = np.bincount(folds[labels == label], minlength=3)
        assert counts.max() - counts.min() <= 1
    chosen = probe.few_labels(labels, 3, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [3, 3, 3]
    assert not np.array_equal(chosen, probe.few_labels(labels, 3, seed=2))
    assert len(probe.few_labels(labels, 0, seed=1)) == 22
    with pytest.raises(UserError, match="class 1 has 3 examples, 4 shots"):
        probe.few_labels(labels, 4, seed=1)


def test_pictures_are_not_resized_to_less_than_the_crop():
    with pytest.raises(UserError, match="to 16 pixels, fewer than the 32 .*config.resize"):
        features.Extractor(None, None, size=32, resize=16, batch_size=4)
