"""Stochastic depth: how often branches are left out, and what is then computed."""

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import heads, vit
from tests.data import tiny_model


def test_how_often_paths_are_dropped():
    paths = np.asarray(vit.drop_paths(jax.random.key(0), 20_000, 5, 0.4))
    assert paths.shape == (20_000, 5, 2)
    for block, rate in enumerate((0, 0.1, 0.2, 0.3, 0.4)):
        values = np.unique(paths[:, block])
        np.testing.assert_allclose(values, [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
        assert abs((paths[:, block] == 0).mean() - rate) < 0.012
    assert abs(paths.mean() - 1) < 0.01
    both = (paths[:, -1] == 0).all(axis=1).mean()
    assert abs(both - 0.16) < 0.015  # the two branches are drawn apart


def test_dropped_paths_leave_a_block_out():
    """An example without its second block is one of an encoder without that block."""
    model = tiny_model(remat="full")
    whole = heads.classifier(model, "mean", 2)
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    params = jax.jit(whole.init)(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = np.random.default_rng(1).standard_normal((24, 2))
    paths = np.ones((3, 2, 2), np.float32)
    paths[1, 0] = 0
    made = jax.jit(whole.apply)({"params": params}, images, paths)
    shorter = heads.classifier(tiny_model(depth=2), "mean", 2)
    blocks = jax.tree.map(lambda x: x[jnp.array([0, 2])], params["encoder"]["blocks"])
    without = params | {"encoder": params["encoder"] | {"blocks": blocks}}
    expected = jax.jit(shorter.apply)({"params": without}, images[:1])
    np.testing.assert_allclose(made[:1], expected, rtol=1e-4, atol=1e-5)
    plain = jax.jit(whole.apply)({"params": params}, images)
    np.testing.assert_allclose(made[1:], plain[1:], rtol=1e-4, atol=1e-5)
    assert np.abs(made[0] - plain[0]).max() > 1e-3
