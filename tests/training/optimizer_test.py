"""Optimizers of supervised training: layer decay, LARS, one head per learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgpt_jax.config import roots
from dgpt_jax.distributed import param_rules
from dgpt_jax.training import layerwise, optimizer, tasks
from dgpt_jax.weights import mapping
from dgpt_jax.weights.types import encoder_shapes
from tests.support.classifying import settings
from tests.support.data import tiny_model


def test_layer_decay_of_every_parameter():
    """decay^(L+1-i): i = 0 before the blocks, 1 to L of the blocks, L+1 of last norm and head."""
    depth, decay = 3, 0.7
    tx = layerwise.scaled_by_layer(layerwise.layer_ids(depth), decay)
    shapes = encoder_shapes(tiny_model(), "mean", 2)
    ones = mapping.unflatten({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
    updates, _ = jax.jit(lambda ones: tx.update(ones, tx.init(ones)))(ones)
    for key_path, update in jax.tree_util.tree_leaves_with_path(updates):
        path = param_rules.path_of(key_path)
        if path.startswith("encoder/blocks/"):
            assert update.shape[0] == depth
            expected = np.broadcast_to(
                np.reshape([decay**3, decay**2, decay], (3, *(1,) * (update.ndim - 1))),
                update.shape,
            )
        elif path.startswith(("norm/", "head/")):
            expected = np.ones(update.shape)
        else:
            assert path.startswith(("encoder/patch_embed/", "encoder/cls_token", "pos_embed"))
            expected = np.full(update.shape, decay**4)
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=path)
    with pytest.raises(ValueError, match="other"):
        tx.update({"other": jnp.ones(2)}, tx.init({}))


def test_the_optimizer_is_adamw_per_layer():
    """optax.adamw with the rate of each layer, with weight decay of matrices only."""
    rng = np.random.default_rng(0)
    params = {
        "encoder": {"blocks": {"k": {"kernel": rng.standard_normal((3, 4, 5)),
                                     "bias": rng.standard_normal((3, 5))}},
                    "cls_token": rng.standard_normal((1, 1, 5))},
        "pos_embed": rng.standard_normal((1, 6, 5)),
        "head": {"kernel": rng.standard_normal((5, 2))},
    }  # fmt: skip
    params = jax.tree.map(jnp.float32, params)
    grads = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
    tx = tasks.task_without_data(
        settings("x", optim={"b1": 0.9, "b2": 0.999, "weight_decay": 0.3})
    ).optimizer(lambda _: 0.1)
    updates, _ = jax.jit(
        lambda grads, params: tx.update(grads, tx.init(params), params, value=jnp.ones(()))
    )(grads, params)

    @jax.jit
    def adamw_update(rate, weight_decay, value, grad):
        one = optax.adamw(rate, b1=0.9, b2=0.999, weight_decay=weight_decay)
        return one.update(grad, one.init(value), value)[0]

    blocks, block_grads, block_updates = (
        tree["encoder"]["blocks"]["k"] for tree in (params, grads, updates)
    )
    for i in range(3):
        for name, decay in (("kernel", 0.3), ("bias", 0.0)):
            expected = adamw_update(
                0.1 * 0.7 ** (3 - i), decay, blocks[name][i], block_grads[name][i]
            )
            np.testing.assert_allclose(block_updates[name][i], expected, rtol=1e-5, atol=1e-7)
    for path in (("pos_embed",), ("encoder", "cls_token")):
        value, grad, update = params, grads, updates
        for name in path:
            value, grad, update = value[name], grad[name], update[name]
        expected = adamw_update(0.1 * 0.7**4, 0.0, value, grad)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7)
    expected = adamw_update(0.1, 0.3, params["head"]["kernel"], grads["head"]["kernel"])
    np.testing.assert_allclose(updates["head"]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_the_schedule_ends_at_end_value():
    rate = optimizer.schedule(1e-3, 10, 100, 1e-6)
    assert float(rate(0)) == 0 and float(rate(5)) == pytest.approx(5e-4)
    assert float(rate(10)) == pytest.approx(1e-3) and float(rate(100)) == pytest.approx(1e-6)
    assert float(rate(55)) == pytest.approx((1e-3 + 1e-6) / 2)


def test_lars_matches_mae():
    """Two steps by hand with different rates; biases are not scaled."""
    rng = np.random.default_rng(0)
    value, bias = rng.standard_normal((4, 3)), rng.standard_normal(3)
    rates, decay, momentum, trust = (0.3, 0.2), 0.01, 0.9, 0.001
    config = roots.OptimConfig(kind="lars", weight_decay=decay, b1=momentum)
    tx = optimizer.optimizer(config, lambda step: jnp.array(rates)[step], running=True)
    params = {"head": {"kernel": jnp.float32(value), "bias": jnp.float32(bias)},
              "running_mean": jnp.ones(3)}  # fmt: skip
    opt_state, trace, bias_trace = tx.init(params), 0.0, 0.0
    for rate in rates:
        grads = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
        mean = np.asarray(params["running_mean"]) - 0.1 * np.asarray(grads["running_mean"])
        updates, opt_state = tx.update(grads, opt_state, params, value=jnp.ones(()))
        params = optax.apply_updates(params, updates)
        grad = np.float64(grads["head"]["kernel"]) + decay * value
        grad *= trust * np.linalg.norm(value) / np.linalg.norm(grad)
        trace = momentum * trace + grad
        bias_trace = momentum * bias_trace + np.float64(grads["head"]["bias"])
        value, bias = value - rate * trace, bias - rate * bias_trace
        np.testing.assert_allclose(params["head"]["kernel"], value, rtol=1e-5)
        np.testing.assert_allclose(params["head"]["bias"], bias, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(params["running_mean"], mean, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.3, "clip_norm": 0.5},
        pytest.param({"kind": "lars", "clip_norm": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_heads_of_a_stack_are_updated_independently(changes):
    """Moments, clipping, trust ratio, decay and schedule: three steps of each head of two stacks
    against the optimizer of a single head."""
    config = roots.OptimConfig(**{"weight_decay": 0.0} | changes)
    rng, peaks = np.random.default_rng(0), np.array([0.1, 0.02, 0.5])
    tx = optimizer.optimizer(
        config, optimizer.schedule(peaks, 2, 5, 0.01), running=True, stacks=("first", "second")
    )
    single = [optimizer.optimizer(config, optimizer.schedule(peak, 2, 5, 0.01)) for peak in peaks]

    def sample():
        tree = {
            name: {
                "kernel": rng.standard_normal((3, width, 4)),
                "bias": rng.standard_normal((3, 4)),
            }
            for name, width in (("first", 5), ("second", 2))
        }
        return jax.tree.map(jnp.float32, tree)

    def head(tree, name, i):
        return jax.tree.map(lambda x: x[i], tree[name])

    params = sample() | {"running_mean": jnp.ones(5)}
    opt_state = tx.init(params)
    alone = {(n, i): head(params, n, i) for n in ("first", "second") for i in range(3)}
    states = {(name, i): single[i].init(one) for (name, i), one in alone.items()}
    one = jnp.ones(())
    stepped, *each = (jax.jit(transformation.update) for transformation in (tx, *single))
    for _ in range(3):
        grads = sample() | {"running_mean": jnp.full(5, 2.0)}
        mean = params["running_mean"] - 0.2
        updates, opt_state = stepped(grads, opt_state, params, value=one)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["running_mean"], mean, rtol=1e-6)
        for key, before in alone.items():
            grad = head(grads, *key)
            updates, states[key] = each[key[1]](grad, states[key], before, value=one)
            alone[key] = optax.apply_updates(before, updates)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
                head(params, *key), alone[key],
            )  # fmt: skip
