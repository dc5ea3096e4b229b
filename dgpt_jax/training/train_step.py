"""The train step: loss, gradients over micro-batches, one optimizer update. Pure and jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgpt_jax import optim, sharding
from dgpt_jax.metrics import Metrics
from dgpt_jax.state import TrainState


def step_key(seed: int, step) -> jax.Array:
    """What is random in a step beyond its examples: a function of (seed, step)."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_train_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    mesh,
    *,
    accum_steps: int,
    prepare: Callable[[jax.Array, Any], Any] | None = None,
    seed: int = 0,
    places: TrainState | None = None,
) -> Callable:
    """The step (state, metrics, batch, frozen) → (state, metrics); the first two are donated.

    `loss(params, frozen, batch) → (scalar, {name: (b,) values an example})`. The batch is cut into
    `accum_steps` micro-batches that a scan runs through, and their gradients are averaged: the same
    update as one big batch. Before that, `prepare(key, batch)`, if given, makes of the whole batch
    what the loss gets, with the key of (seed, step). Metrics leave out steps whose numbers are not
    finite. `places` are the shardings of the state: told them, the step leaves state and metrics
    (replicated) placed as it wants them, or else its own result is new to it, and it is compiled a
    second time.
    """
    tx = optax.with_extra_args_support(tx)
    gradient = sharding.on_mesh(jax.value_and_grad(loss, has_aux=True), mesh)

    def accumulate(params, frozen, batch):
        if accum_steps == 1:
            return gradient(params, frozen, batch)
        # Neighbouring rows go to different micro-batches, so that each device keeps its own rows.
        batch = jax.tree.map(
            lambda x: x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1), batch
        )
        batch = jax.lax.with_sharding_constraint(batch, sharding.microbatch_sharding(mesh))

        def add(total, microbatch):
            (value, values), grads = gradient(params, frozen, microbatch)
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
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        seen = values | {"loss": value, "grad_norm": optax.tree.norm(grads)}
        merged = metrics.merge(type(metrics).single_from_model_output(**seen))
        good = optim.is_finite(value, grads)
        metrics = jax.tree.map(lambda new, old: jnp.where(good, new, old), merged, metrics)
        return TrainState(state.step + 1, params, opt_state), metrics

    out = None if places is None else (places, sharding.replicated(mesh))
    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=out)
