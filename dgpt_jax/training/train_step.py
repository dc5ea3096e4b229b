"""The training state and the train step: loss, gradients over micro-batches, one optimizer update.

All functions are pure; the state is initialized sharded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgpt_jax.distributed import sharding
from dgpt_jax.monitoring.metrics import Metrics
from dgpt_jax.training import optimizer

Params = dict[str, Any]  # nested, of arrays
InitFn = Callable[[jax.Array], Params]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, number of finished steps; params: nested dict of float32; opt_state: optax's."""

    step: jax.Array
    params: Any
    opt_state: Any


def _init_state(
    init_params: InitFn,
    tx: optax.GradientTransformation,
    key: jax.Array,
    overrides: Mapping[str, Any] | None = None,
) -> TrainState:
    params = _override(init_params(key), overrides or {})
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def _override(params: Params, overrides: Mapping[str, Any]) -> Params:
    """Returns nested parameters with the leaves of `overrides`, a subtree, in place of theirs."""
    return params | {
        name: _override(params[name], value) if isinstance(value, dict) else value
        for name, value in overrides.items()
    }


def abstract_state(
    init_params: InitFn, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, a TrainState of jax.ShapeDtypeStruct."""
    shapes = jax.eval_shape(partial(_init_state, init_params, tx), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, leaf_sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf_sharding
        ),
        shapes,
        sharding.shard_state(mesh, shapes),
    )


def init_state(
    init_params: InitFn,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    seed: int,
    overrides: Mapping[str, Any] | None = None,
) -> TrainState:
    """The initial state. Arrays are created sharded: no device ever holds an unsharded copy.

    overrides: nested host arrays to use instead of the initialized parameters of the same paths.
    """
    overrides = overrides or {}
    shardings = sharding.shard_state(mesh, overrides)
    overrides = jax.tree.map(sharding.make_global_array, overrides, shardings)
    return jit_init_state(init_params, tx, mesh)(jax.random.key(seed), overrides)


def jit_init_state(
    init_params: InitFn, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> jax.stages.Wrapped:
    """Jitted (key, overrides) → TrainState, sharded over the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init_params, tx, mesh))
    return jax.jit(partial(_init_state, init_params, tx), out_shardings=shardings)


def step_key(seed: int, step: int | jax.Array) -> jax.Array:
    """PRNG key of a step, a function of (seed, step)."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_train_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    accum_steps: int,
    prepare: Callable[[jax.Array, Any], Any] | None = None,
    seed: int = 0,
    state_sharding: TrainState | None = None,
) -> jax.stages.Wrapped:
    """Jitted (state, metrics, batch, frozen) → (state, metrics); the first two are donated.

    `loss(params, frozen, batch) → (scalar, {name: (b,) values per example})`. The batch is split
    into `accum_steps` micro-batches, which a scan runs through, and their gradients are averaged:
    the same update as with one big batch. `prepare(key, batch)`, if not None, is applied to the
    full batch before that, with the key of (seed, step). Steps with non-finite numbers do not
    enter the metrics. state_sharding: shardings of the state. With it the step returns the state
    and the (replicated) metrics with the shardings of its inputs; without, the second call may
    compile again.
    """
    tx = optax.with_extra_args_support(tx)
    value_and_grad = sharding.on_mesh(jax.value_and_grad(loss, has_aux=True), mesh)

    def accumulate(params, frozen, batch):
        if accum_steps == 1:
            return value_and_grad(params, frozen, batch)
        # Consecutive rows go to different micro-batches, so that every device keeps its own rows.
        batch = jax.tree.map(
            lambda x: x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1), batch
        )
        batch = jax.lax.with_sharding_constraint(batch, sharding.microbatch_sharding(mesh))

        def add(total, microbatch):
            (value, values), grads = value_and_grad(params, frozen, microbatch)
            return jax.tree.map(jnp.add, total, (value, grads)), values

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (value, grads), values = jax.lax.scan(add, zero, batch)
        value, grads = jax.tree.map(lambda x: x / accum_steps, (value, grads))
        return (value, jax.tree.map(jnp.ravel, values)), grads

    def train_step(state: TrainState, metrics: Metrics, batch, frozen):
        if prepare is not None:
            batch = prepare(step_key(seed, state.step), batch)
            batch = jax.lax.with_sharding_constraint(batch, sharding.batch_sharding(mesh))
        (value, values), grads = accumulate(state.params, frozen, batch)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value=value, step=state.step
        )
        params = optax.apply_updates(state.params, updates)
        outputs = values | {"loss": value, "grad_norm": optax.tree.norm(grads)}
        merged = metrics.merge(type(metrics).single_from_model_output(**outputs))
        good = optimizer.is_finite(value, grads)
        metrics = jax.tree.map(lambda new, old: jnp.where(good, new, old), merged, metrics)
        return TrainState(state.step + 1, params, opt_state), metrics

    out = None if state_sharding is None else (state_sharding, sharding.replicated(mesh))
    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=out)
