"""Pretrained models: compiled once, computed in chunks, traceable."""

from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax.config import MeshConfig
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import feature_maps
from dgpt_jax.models import classifier as classifiers
from dgpt_jax.models import digpt
from dgpt_jax.weights import api, chunking
from tests.support import processes
from tests.support.data import tiny_model

MODEL = tiny_model()


def random_params(module, *inputs, seed: int = 0) -> dict:
    """NumPy arrays without any value of the initialization."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def classifier(seed: int = 0) -> api.PretrainedClassifier:
    module = classifiers.classifier(MODEL, "mean", 5)
    params = random_params(module, jnp.zeros((1, 16, 16, 3)), seed=seed)
    return api.PretrainedClassifier(MODEL, params, "random", num_classes=5)


def encoder(seed: int = 0) -> api.PretrainedEncoder:
    params = {name: x for name, x in classifier(seed).params.items() if name != "head"}
    return api.PretrainedEncoder(MODEL, params, "random")


def pretrained(seed: int = 0) -> api.PretrainedDiGPT:
    module = digpt.build(MODEL, out_width=7)
    return api.PretrainedDiGPT(MODEL, random_params(module, *digpt.dummy_inputs(MODEL)), module)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def normalized(count: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 16, 16, 3)).astype(np.float32)


def orders(count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(4) for _ in range(count)])


def tokens(count: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((count, 17, 7)).astype(np.float32)


# {name: (loader, function of model and number of images)}
FUNCTIONS = {
    "features": (encoder, lambda e, n: e.features(images(n), "mean")),
    "tokens": (encoder, lambda e, n: e.tokens(images(n))),
    "pooled": (encoder, lambda e, n: e.pooled(images(n), ["cls", "mean"])),
    "logits": (classifier, lambda c, n: c.logits(images(n))),
    "predictions": (pretrained, lambda p, n: p.predictions(normalized(n), orders(n))),
    "losses": (pretrained, lambda p, n: p.losses(normalized(n), tokens(n), orders(n))),
    "cls_attention": (encoder, lambda e, n: feature_maps.cls_attention(e, images(n))),
    "last_attention": (encoder, lambda e, n: feature_maps.last_attention(e, images(n))),
    "prediction_maps": (
        pretrained,
        lambda p, n: feature_maps.prediction_maps(p, images(n), tokens(n), orders(n), True),
    ),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


@contextmanager
def compilations():
    """List of tracing, lowering and compilation events within the context."""
    events = []

    def record(event: str, _seconds: float, **_):
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(record)


def test_compilations_are_counted():
    with compilations() as events:
        jax.jit(lambda x: 2 * x)(1.0)
    assert events


@every_function
def test_only_the_first_call_compiles(name):
    loaded, call = FUNCTIONS[name]
    first, second = loaded(), loaded(seed=1)
    results = call(first, 3)
    with compilations() as events:
        again = call(first, 3)
        call(second, 3)  # other weights of the same shape
    assert not events
    jax.tree.map(np.testing.assert_array_equal, results, again)


@every_function
def test_batches_of_any_size_are_computed_in_few_shapes(monkeypatch, name):
    """Results equal those of one call, to 1e-5 of the largest value."""
    loaded, call = FUNCTIONS[name]
    model = loaded()
    at_once = call(model, 8)
    monkeypatch.setattr(chunking, "CHUNK", 4)
    shapes, in_chunks = set(), api.in_chunks

    def recording(run, params, *arrays):
        def record(params, *chunks):
            shapes.update(len(x) for x in chunks)
            return run(params, *chunks)

        return in_chunks(record, params, *arrays)

    monkeypatch.setattr(api, "in_chunks", recording)
    results = [call(model, count) for count in range(1, 9)]
    assert shapes == {1, 2, 4}
    jax.tree.map(almost_equal, results[-1], at_once)
    kinds = [jax.tree.map(type, result) for result in results]  # one chunk, padded ones, several
    assert all(kind == kinds[0] for kind in kinds)


def almost_equal(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.nanmax(np.abs(b)))


@pytest.mark.parametrize("name", ["features", "logits", "losses"])
def test_within_a_callers_jit(name):
    """Traced weights are computed in one call; an untraced batch may be a constant."""
    loaded, call = FUNCTIONS[name]
    model, other = loaded(), loaded(seed=1)
    traced = jax.jit(lambda params: call(replace(model, params=params), 6))
    jax.tree.map(almost_equal, traced(other.params), call(other, 6))
    jax.tree.map(almost_equal, jax.jit(lambda: call(model, 6))(), call(model, 6))


def test_gradients():
    model = encoder()

    def total(params):
        return replace(model, params=params).features(images(6)).sum()

    gradients = jax.grad(total)(model.params)
    squares = sum(float((g**2).sum()) for g in jax.tree.leaves(gradients))
    step = 1e-3 / squares**0.5
    moved = jax.tree.map(lambda p, g: p + step * g, model.params, gradients)
    assert float(total(moved) - total(model.params)) == pytest.approx(step * squares, rel=0.1)


def test_weights_go_to_the_device_once(monkeypatch):
    model = encoder()
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(model.params))
    calls, device_put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x: calls.append(x) or device_put(x))
    for count in (1, 3, 3, 100):
        model.features(images(count))
    model.tokens(images(2))
    feature_maps.cls_attention(model, images(2))
    assert len(calls) == 1
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(model.device_params))
    other = replace(model, params=encoder(seed=1).params)
    assert np.any(other.features(images(2)) != model.features(images(2)))


@pytest.mark.parametrize("lengths", [(4, 3), (3, 4), (100, 99)])
def test_arrays_of_different_lengths_are_refused(lengths):
    with pytest.raises(UserError, match=f"{lengths[0]}, {lengths[1]}"):
        pretrained().predictions(normalized(lengths[0]), orders(lengths[1]))


def over_devices():
    """Sharded images are computed on their devices in one call."""
    mesh = sharding.make_mesh(MeshConfig())
    layout = sharding.batch_sharding(mesh)
    model = replace(encoder(), params=jax.device_put(encoder().params, sharding.replicated(mesh)))
    features = model.features(jax.device_put(images(256), layout))
    assert features.sharding.is_equivalent_to(layout, features.ndim)
    almost_equal(features, encoder().features(images(256)))
    almost_equal(model.features(images(6)), encoder().features(images(6)))


def test_over_devices():
    processes.on_devices(4, over_devices)


@pytest.mark.parametrize("build", [encoder, classifier, pretrained])
def test_models_print_without_their_arrays(build):
    text = repr(build())
    assert text.startswith(type(build()).__name__) and "width=24" in text and "mean=" in text
    assert "array" not in text and len(text) < 600
