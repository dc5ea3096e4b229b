"""Losses per example and norms per layer of a bad step: when it is dumped, and when replayed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.distributed import param_rules, sharding
from dgpt_jax.training import train_step
from dgpt_jax.training.tasks.base import Task


def layer_norms(tree: Any) -> dict[str, jax.Array]:
    """{path: L2 norms (L,)} of the arrays of a tree: L layers for stacked blocks, else 1."""
    norms = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = param_rules.path_of(path)
        stacked = "blocks/" in name
        axes = tuple(range(int(stacked), leaf.ndim))
        squares = jnp.square(leaf.astype(jnp.float32)).sum(axis=axes)
        norms[name] = jnp.sqrt(jnp.atleast_1d(squares))
    return norms


def accumulator(task: Task, mesh: jax.sharding.Mesh, params: Any) -> jax.stages.Wrapped:
    """Jitted (totals, params, frozen, microbatch, weight) → (totals, {decoder: (b,) losses}).

    totals: float32 (loss, gradients), donated, to which `weight` times those of the micro-batch are
    added. `params` here may be abstract.
    """
    value_and_grad = sharding.on_mesh(jax.value_and_grad(task.loss, has_aux=True), mesh)

    def add(totals, params, frozen, microbatch, weight):
        (loss, losses), grads = value_and_grad(params, frozen, microbatch)
        return jax.tree.map(lambda total, x: total + weight * x, totals, (loss, grads)), losses

    replicated = sharding.replicated(mesh)
    out = (replicated, sharding.shard_state(mesh, params)), replicated
    return jax.jit(add, donate_argnums=0, out_shardings=out)


def measure(
    task: Task,
    params: Any,
    number: int,
    local: Mapping[str, np.ndarray],
    mesh: jax.sharding.Mesh,
    *,
    microbatches: int,
    rows: slice | None = None,
) -> dict[str, Any]:
    """{"loss", "losses": {decoder: per example}, "params", "grads": layer_norms} as JSON.

    local: this process's rows of the batch of step `number`, host arrays. One micro-batch at a time
    is on the devices, of every `microbatches`-th row as in the train step. Every process of the
    mesh calls it. rows: of the batch, in a single process; default: all.
    """
    shardings, replicated = sharding.shard_state(mesh, params), sharding.replicated(mesh)
    params, frozen = jax.device_put((params, task.frozen), (shardings, replicated))
    local, size = _prepare(task, number, local, mesh), task.config.batch_size
    if rows is not None:
        local, size = {name: x[rows] for name, x in local.items()}, rows.stop - rows.start
    add, example_losses = accumulator(task, mesh, params), {}
    totals = jax.jit(
        lambda params: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)),
        out_shardings=(replicated, shardings),
    )(params)
    for first in range(microbatches):
        every = slice(first, size, microbatches)
        count = len(range(size)[every])
        microbatch = {name: x[every] for name, x in local.items()}
        microbatch = sharding.global_batch(mesh, count, microbatch)
        totals, losses = add(totals, params, frozen, microbatch, np.float32(count / size))
        for name, values in losses.items():
            example_losses.setdefault(name, np.empty(size, np.float32))[every] = values
    loss, grads = totals
    norms = jax.jit(lambda *trees: [*map(layer_norms, trees)], out_shardings=replicated)
    measured = dict(zip(("params", "grads"), jax.device_get(norms(params, grads)), strict=True))
    measured |= {"loss": jax.device_get(loss), "losses": example_losses}
    return jax.tree.map(lambda x: np.asarray(x).tolist(), measured)


def _prepare(task: Task, number: int, local, mesh):
    """This process's rows of the input of `task.loss`, host arrays. The full batch is prepared at
    once, because examples may be mixed with any others of it."""
    if (prepare_batch := task.prepare) is None:
        return local

    def prepare(batch):
        return prepare_batch(train_step.step_key(task.config.seed, number), batch)

    batch = sharding.global_batch(mesh, task.config.batch_size, local)
    batch = jax.jit(prepare, out_shardings=sharding.batch_sharding(mesh))(batch)
    return jax.tree.map(_local_rows, batch)


def _local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of a global batch, ascending, without duplicates."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
