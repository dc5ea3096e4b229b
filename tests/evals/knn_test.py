"""Extraction and kNN against NumPy on 1, 2 and 8 devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax import evaluate
from dgpt_jax.config import roots, schema
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import feature_bank, features, knn, probe
from dgpt_jax.evals.feature_bank import FeatureBank
from dgpt_jax.weights import api, mapping
from dgpt_jax.weights.types import encoder_shapes
from tests.support.banks import clusters, in_processes, mesh_of
from tests.support.data import tiny_model
from tests.support.processes import on_devices


def direct_knn(x, y, x_test, y_test, k, temperature):
    """Number of correct answers."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x_test = x_test / np.linalg.norm(x_test, axis=1, keepdims=True)
    hits = 0
    for query, answer in zip(x_test, y_test, strict=True):
        similarity = x @ query
        nearest = np.argsort(-similarity)[:k]
        votes = np.zeros(y.max() + 1)
        np.add.at(votes, y[nearest], np.exp(similarity[nearest] / temperature))
        hits += int(votes.argmax() == answer)
    return hits


def knn_is_direct(devices: int, length: int, queries: int):
    x, y = clusters(length, seed=1)
    x_test, y_test = clusters(queries, seed=2)
    mesh = mesh_of(devices)
    banks = [
        FeatureBank.from_arrays(x, y, mesh, batch_size=48),
        FeatureBank.from_arrays(x_test, y_test, mesh, batch_size=32),
    ]
    for bank in banks:
        assert {s.data.shape[1] for s in bank.rows.addressable_shards} == {
            bank.rows.shape[1] // devices
        }
    ks = (1, 10, 20, 150, 300)
    for temperature in (0.07, 1.0):
        hits = knn.correct(*banks, ks=ks, temperature=temperature)
        assert hits == {k: direct_knn(x, y, x_test, y_test, k, temperature) for k in ks}
    assert len(set(hits.values())) > 2 or queries < 50  # hits depend on k
    chosen = probe.few_labels(y, 7, seed=0)
    hits = knn.correct(*banks, ks=(3, 20, 100), chosen=chosen)
    direct = partial(direct_knn, x[chosen], y[chosen], x_test, y_test, temperature=0.07)
    assert hits == {k: direct(k=k) for k in (3, 20, 100)}


class Fake:
    """Images whose pixels encode their index."""

    classes = None

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def read(self, index):
        image = np.full((4, 4, 3), index % 251, np.uint8)
        image[0, 0, 0] = index // 251
        return image, np.int32(index % 7)


def extraction_is_exact(devices: int, length: int):
    """Every example once, in order, for any padding, sharded over the devices."""

    def encode(params, images):
        x = images.astype(jnp.float32)
        number = x[:, 1, 1, 0] + 251 * x[:, 0, 0, 0]
        return {"number": number, "pair": params * jnp.stack([number, -number], axis=1)}

    mesh = mesh_of(devices)
    extract = features.Extractor(encode, mesh, batch_size=16)
    extracted = extract(jnp.float32(2), Fake(length), view=lambda image: image)
    numbers = np.arange(length)
    np.testing.assert_array_equal(extracted["number"].gathered(), numbers)
    pair = extracted["pair"]
    np.testing.assert_array_equal(pair.gathered(), 2 * np.stack([numbers, -numbers], 1))
    np.testing.assert_array_equal(pair.labels, numbers % 7)
    rows = pair.rows
    assert rows.sharding.is_equivalent_to(sharding.microbatch_sharding(mesh), rows.ndim)
    assert {s.data.shape[1] for s in rows.addressable_shards} == {16 // devices}


def many_devices():
    """In a process with 8 devices; small chunks, so that there are several."""
    feature_bank.ROWS = 20
    knn_is_direct(8, 203, 77)
    knn_is_direct(8, 250, 5)
    knn_is_direct(2, 203, 77)
    extraction_is_exact(8, 130)
    extraction_is_exact(8, 15)
    extraction_is_exact(2, 33)


def two_processes():
    """Each process reads and keeps its own half."""
    feature_bank.ROWS = 20
    knn_is_direct(4, 203, 77)
    extraction_is_exact(4, 131)


@pytest.mark.slow
def test_two_processes():
    in_processes(2, 2, two_processes)


@pytest.mark.slow
def test_many_devices():
    on_devices(8, many_devices)


@pytest.mark.parametrize("rows", [32, 8192])
def test_knn_is_the_direct_computation(monkeypatch, rows):
    monkeypatch.setattr(feature_bank, "ROWS", rows)
    knn_is_direct(1, 203, 77)


def test_extraction_on_one_device():
    for length in (1, 16, 37):
        extraction_is_exact(1, length)


def test_both_poolings_come_from_one_pass():
    model, rng = tiny_model(), np.random.default_rng(0)
    shapes = encoder_shapes(model, "cls", 0).items()
    flat = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes}
    encoder = api.PretrainedEncoder(model, mapping.unflatten(flat), "random")
    images = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    pooled = jax.jit(lambda x: encoder.pooled(x, ("mean", "cls")))(images)
    assert set(pooled) == {"mean", "cls"} and np.abs(pooled["mean"] - pooled["cls"]).max() > 0.1
    for pooling, x in pooled.items():
        one = jax.jit(lambda x, pooling=pooling: encoder.features(x, pooling))(images)
        np.testing.assert_allclose(x, one, atol=1e-5)


def test_chunk_steps_are_idempotent():
    for steps in (1, 2, 7, 100, 5005):
        for rows in (1, 4, 256, 9000):
            padded, size = feature_bank.chunk_steps(steps, rows)
            assert feature_bank.chunk_steps(padded, rows) == (padded, size)
            assert padded >= steps and padded % size == 0
            assert padded - steps < padded // size  # less than one step of padding per chunk
            assert size == 1 or size * rows <= feature_bank.ROWS


def test_missing_classes_are_refused():
    """For example by train[:65000] of an imported folder, which is sorted by class."""
    settings = schema.parse(roots.EvaluateConfig, dict(data="d", protocol="fewshot", shots=(1,)))
    x, mesh = np.zeros((4, 2), np.float32), mesh_of(1)
    train, test = (
        FeatureBank.from_arrays(x, np.array(y), mesh) for y in ([0, 0, 1, 1], [0, 1, 2, 3])
    )
    with pytest.raises(UserError, match="test.* 2 .*train.*config.train"):
        list(evaluate.measure(settings, train, test))


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
    with pytest.raises(UserError, match="config.shots=4: 1 of 3 .*class 1.* config.shots to 3"):
        probe.few_labels(labels, 4, seed=1)


def test_resize_below_the_crop_is_refused():
    with pytest.raises(UserError, match="16 .*32.*config.resize"):
        features.center_view(32, 16, squash=False)
