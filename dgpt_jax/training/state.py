"""The training state, and making it in place on a mesh."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgpt_jax import sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, finished optimizer steps; params: float32; opt_state: optax's."""

    step: jax.Array
    params: Any
    opt_state: Any


def _initial(init_params, tx, key, given=()) -> TrainState:
    params = _replaced(init_params(key), dict(given))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def _replaced(params: dict, given: dict) -> dict:
    """Nested parameters with those that `given`, a part of the same tree, holds."""
    return params | {
        name: _replaced(params[name], value) if isinstance(value, dict) else value
        for name, value in given.items()
    }


def abstract(init_params, tx: optax.GradientTransformation, mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it."""
    shapes = jax.eval_shape(partial(_initial, init_params, tx), jax.random.key(0))
    places = sharding.shard_state(mesh, shapes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )


def create(
    init_params, tx: optax.GradientTransformation, mesh, seed: int, given: dict | None = None
) -> TrainState:
    """The initial state. Every array is made sharded: no unsharded copy ever exists on a device.

    `given`: nested host arrays that take the place of initial parameters.
    """
    given = given or {}
    places = sharding.shard_state(mesh, given)
    return maker(init_params, tx, mesh)(
        jax.random.key(seed), jax.tree.map(sharding.placed, given, places)
    )


def maker(init_params, tx: optax.GradientTransformation, mesh):
    """The jitted function that makes the initial state from a key, and the parameters that are
    given, in place."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract(init_params, tx, mesh))
    return jax.jit(partial(_initial, init_params, tx), out_shardings=places)
