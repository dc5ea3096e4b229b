"""Schedule and optimizer, as in the official pretraining's lr_sched.py and main_pretrain.py; and a
guard against bad numbers, where the official code exits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dgpt_jax import param_rules
from dgpt_jax.config import Optim

# Biases and norms do not decay; tokens (cls, next, visible) do, as in the official code.
DECAY = ((r"(bias|scale)$", False), (r".*", True))


def schedule(peak: float, warmup: int, total: int):
    """Steps to learning rates: linear from 0 over `warmup` steps, then half a cosine to 0."""

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        done = (step - warmup) / max(total - warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        return peak * jnp.where(step < warmup, step / max(warmup, 1), cosine)

    return rate


def optimizer(config: Optim, rate) -> optax.GradientTransformation:
    """AdamW (eps 1e-8, decoupled decay by rules) after optional clipping, guarded."""
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=lambda params: param_rules.apply(DECAY, params),
        mu_dtype=config.mu_dtype,
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return guarded(optax.chain(clip, adamw), most=config.bad_steps, spike=config.spike)


class Guarded(NamedTuple):
    """State of `guarded`: int32 counts of updates left out, in all and in a row; the running mean
    of the loss over so many (float32) steps; and the inner state."""

    skipped: jax.Array
    in_a_row: jax.Array
    mean_loss: jax.Array
    weight: jax.Array
    inner: Any


LOSS_DECAY = 0.98  # of the running mean: about the last 50 steps
SPIKES_FROM = 0.85  # how much of its weight the mean must have: some 100 steps


def guarded(
    tx: optax.GradientTransformation, *, most: int, spike: float
) -> optax.GradientTransformationExtraArgs:
    """`tx`, but an update from numbers that are not finite is left out: parameters and the state of
    `tx` stay as they are. So is, with `spike` > 0, one at a loss above `spike` times the running
    mean. After `most` in a row every further one is left out, for the loop to stop and look.

    Its update takes the loss as `value`.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        count, mean = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return Guarded(count, count, mean, mean, tx.init(params))

    def update(grads, state, params=None, *, value, **extra):
        good = is_finite(value, grads) & (state.in_a_row < most)
        if spike:
            mean = state.mean_loss / jnp.maximum(state.weight, 1e-6)
            good &= (state.weight < SPIKES_FROM) | (value <= spike * mean)
        updates, inner = tx.update(grads, state.inner, params, value=value, **extra)
        updates, inner = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (updates, inner),
            (jax.tree.map(jnp.zeros_like, updates), state.inner),
        )
        decay = jnp.where(good, LOSS_DECAY, 1.0)
        mean_loss = decay * state.mean_loss + jnp.where(good, (1 - LOSS_DECAY) * value, 0)
        return updates, Guarded(
            state.skipped + ~good,
            jnp.where(good, 0, state.in_a_row + 1),
            mean_loss,
            decay * state.weight + (1 - decay),
            inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def counts(state: Guarded) -> dict[str, jax.Array]:
    """Copies of the counters, to be read while the next step runs."""
    return {"skipped": jnp.copy(state.skipped), "in_a_row": jnp.copy(state.in_a_row)}


def recount(state: Guarded) -> Guarded:
    """The state of a run that continues: bad steps in a row count anew. What stopped the run may be
    mended, and a checkpoint may be of a step after which no update is made any more."""
    zero = jnp.zeros((), state.in_a_row.dtype)
    return state._replace(in_a_row=jax.device_put(zero, state.in_a_row.sharding))


def is_finite(loss, grads) -> jax.Array:
    """Whether the loss and all gradients are: their norm is not, where one of them is not."""
    return jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
