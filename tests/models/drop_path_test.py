"""Stochastic depth: drop rates, and outputs without the dropped branches."""

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.models import classifier, vit
from tests.support.data import tiny_model


def test_drop_rates():
    scales = np.asarray(vit.sample_drop_path(jax.random.key(0), 20_000, 5, 0.4))
    assert scales.shape == (20_000, 5, 2)
    for block, rate in enumerate((0, 0.1, 0.2, 0.3, 0.4)):
        values = np.unique(scales[:, block])
        np.testing.assert_allclose(values, [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
        assert abs((scales[:, block] == 0).mean() - rate) < 0.012
    assert abs(scales.mean() - 1) < 0.01
    both = (scales[:, -1] == 0).all(axis=1).mean()
    assert abs(both - 0.16) < 0.015  # the two branches are sampled independently


def test_dropping_both_branches_skips_the_block():
    """The result is that of an encoder without the block."""
    model = tiny_model(remat="full")
    module = classifier.classifier(model, "mean", 2)
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = np.random.default_rng(1).standard_normal((24, 2))
    scales = np.ones((3, 2, 2), np.float32)
    scales[1, 0] = 0
    dropped = jax.jit(module.apply)({"params": params}, images, scales)
    shorter = classifier.classifier(tiny_model(depth=2), "mean", 2)
    blocks = jax.tree.map(lambda x: x[jnp.array([0, 2])], params["encoder"]["blocks"])
    without = params | {"encoder": params["encoder"] | {"blocks": blocks}}
    expected = jax.jit(shorter.apply)({"params": without}, images[:1])
    np.testing.assert_allclose(dropped[:1], expected, rtol=1e-4, atol=1e-5)
    plain = jax.jit(module.apply)({"params": params}, images)
    np.testing.assert_allclose(dropped[1:], plain[1:], rtol=1e-4, atol=1e-5)
    assert np.abs(dropped[0] - plain[0]).max() > 1e-3
