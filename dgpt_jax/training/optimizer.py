"""Learning-rate schedule and optimizers, as in the official lr_sched.py, lr_decay.py,
main_pretrain.py and main_finetune.py; updates from non-finite numbers are skipped, where the
official code exits."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax.config import OptimConfig
from dgpt_jax.distributed import param_rules
from dgpt_jax.training import layerwise

# Tokens (cls, next, visible) decay, biases and norms do not, as in the official code. Learned
# positions, which it does not have, do not either.
DECAY = ((r"(bias|scale|pos_embed)$", False), (r".*", True))
# Running statistics (models/probes.py) have an update rule of their own.
TRAINED = ((r"running_(mean|var)$", "running"), (r".*", "trained"))
# Fine-tuning, where positions are trained, excludes tokens from decay (timm's no_weight_decay).
FINE_TUNING_DECAY = ((r"(bias|scale|pos_embed|cls_token)$", False), (r".*", True))


def peak_learning_rates(config: OptimConfig, batch_size: int) -> np.ndarray:
    """The peak learning rate, a scalar array; with config.base_lr_grid (G,)."""
    return np.asarray(config.base_lr_grid or config.blr) * batch_size / 256


def schedule(
    peak: float | np.ndarray, warmup: int, total: int, end_value: float = 0.0
) -> optax.Schedule:
    """Schedule from 0 to `peak`, a scalar or (G,), over `warmup` steps, then to `end_value` with
    half a cosine.

    optax.warmup_cosine_decay_schedule takes no arrays and rounds differently: 20 to 50% of the
    steps differ, by up to 7e-5 relative, and earlier runs would not resume to the bit.
    """

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        progress = (step - warmup) / max(total - warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        decayed = end_value + (peak - end_value) * cosine
        return jnp.where(step < warmup, peak * (step / max(warmup, 1)), decayed)

    return rate


def optimizer(
    config: OptimConfig,
    rate: optax.ScalarOrSchedule,
    *,
    decay: param_rules.Rules = DECAY,
    layers: param_rules.Rules | None = None,
    frozen: param_rules.Rules | None = None,
    running: bool = False,
    stacks: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of config.kind, with clipping, layer decay, EMA and `skip_nonfinite`.

    running: update running statistics with plain SGD. layers: rules from paths to layer ids (a
    vector for stacked leaves); rate and weight decay are multiplied by config.layer_decay per layer
    from the last one down. frozen: rules of `layerwise.freeze`; updates then need the keyword
    `step`. stacks: top-level names of parameters that are stacked heads (G, …); each head is
    clipped and updated independently, at its own one of the G rates of `rate`.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rules: dict[Hashable, optax.GradientTransformation] = {"running": optax.sgd(0.1)}
    if stacks:
        assert callable(rate)
        heads = per_head(optax.chain(clip, _base_optimizer(config, 1.0, decay)), rate)
        rules |= dict.fromkeys(stacks, heads)
        tx = optax.partition(
            rules, lambda params: {name: name if name in stacks else "running" for name in params}
        )
    else:
        tx = _base_optimizer(config, rate, decay)
        if running:
            rules["trained"] = tx
            tx = optax.partition(rules, lambda params: param_rules.apply(TRAINED, params))
        if layers:
            tx = optax.chain(tx, layerwise.scaled_by_layer(layers, config.layer_decay))
        tx = optax.chain(clip, tx)
        if frozen:
            tx = layerwise.freeze(tx, frozen)
    if config.ema:
        tx = with_ema(tx, config.ema)
    return skip_nonfinite(
        tx, max_in_a_row=config.max_skipped_in_a_row, spike_factor=config.loss_spike_factor
    )


def _base_optimizer(
    config: OptimConfig, rate: optax.ScalarOrSchedule, decay: param_rules.Rules
) -> optax.GradientTransformation:
    """AdamW (eps 1e-8, decoupled weight decay), SGD or LARS, with momentum b1.

    SGD and LARS add the decay to the gradient; LARS then scales the gradients of decayed parameters
    to 0.001 of the parameter's norm; the rate is applied after the momentum. Source of LARS: MAE's
    lars.py.
    """

    def decay_mask(params):
        return param_rules.apply(decay, params)

    if config.kind == "adamw":
        return optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
            mu_dtype=config.mu_dtype,
        )
    trust = optax.scale_by_trust_ratio(trust_coefficient=0.001)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.masked(trust, decay_mask) if config.kind == "lars" else optax.identity(),
        optax.trace(config.b1),
        optax.scale_by_learning_rate(rate),
    )


def per_head(
    tx: optax.GradientTransformation, rate: optax.Schedule
) -> optax.GradientTransformation:
    """Applies `tx`, of learning rate 1, to each head of stacked parameters (G, …) independently,
    then multiplies by its rate; `rate` maps steps to (G,)."""

    def init(params):
        return jnp.zeros((), jnp.int32), jax.vmap(tx.init)(params)

    def update(updates, state, params=None):
        count, inner = state
        updates, inner = jax.vmap(tx.update)(updates, inner, params)
        scale = jnp.asarray(rate(count))
        updates = jax.tree.map(lambda x: x * scale.reshape(-1, *(1,) * (x.ndim - 1)), updates)
        return updates, (count + 1, inner)

    return optax.GradientTransformation(init, update)


class EmaState(NamedTuple):
    """State of `with_ema`: moving average of the parameters, state of the inner optimizer."""

    ema: Any
    inner: Any


def with_ema(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`tx` with an exponential moving average of the updated parameters in its state."""
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return EmaState(jax.tree.map(jnp.copy, params), tx.init(params))

    def update(updates, state, params: Any = None, **extra):
        updates, inner = tx.update(updates, state.inner, params, **extra)
        after = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda mean, p: decay * mean + (1 - decay) * p, state.ema, after)
        return updates, EmaState(ema, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(state: Any) -> Any:
    """The parameters of a TrainState to evaluate: their moving average if it has one."""
    inner = getattr(state.opt_state, "inner", None)
    return inner.ema if isinstance(inner, EmaState) else state.params


class SkipState(NamedTuple):
    """State of `skip_nonfinite`: int32 counts of skipped updates, in total and in a row; float32
    running mean of the loss and its weight; state of the inner optimizer."""

    skipped: jax.Array
    in_a_row: jax.Array
    mean_loss: jax.Array
    weight: jax.Array
    inner: Any


LOSS_DECAY = 0.98  # of the running mean: about the last 50 steps
MIN_MEAN_WEIGHT = 0.85  # of the running mean before spikes are detected: about 100 steps


def skip_nonfinite(
    tx: optax.GradientTransformation, *, max_in_a_row: int, spike_factor: float
) -> optax.GradientTransformationExtraArgs:
    """`tx`, skipping updates whose loss or gradients are not finite: parameters and the state of
    `tx` stay as they are. With spike_factor > 0 also updates whose loss is above spike_factor times
    the running mean. After max_in_a_row skips in a row all further updates are skipped, so that the
    parameters are still those of the first of them when the loop stops.

    `update` takes the loss as `value`.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        count, mean = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return SkipState(count, count, mean, mean, tx.init(params))

    def update(grads, state, params=None, *, value, **extra):
        good = is_finite(value, grads) & (state.in_a_row < max_in_a_row)
        if spike_factor:
            mean = state.mean_loss / jnp.maximum(state.weight, 1e-6)
            good &= (state.weight < MIN_MEAN_WEIGHT) | (value <= spike_factor * mean)
        updates, inner = tx.update(grads, state.inner, params, value=value, **extra)
        updates, inner = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (updates, inner),
            (jax.tree.map(jnp.zeros_like, updates), state.inner),
        )
        decay = jnp.where(good, LOSS_DECAY, 1.0)
        mean_loss = decay * state.mean_loss + jnp.where(good, (1 - LOSS_DECAY) * value, 0)
        return updates, SkipState(
            state.skipped + ~good,
            jnp.where(good, 0, state.in_a_row + 1),
            mean_loss,
            decay * state.weight + (1 - decay),
            inner,
        )

    return optax.GradientTransformationExtraArgs(
        init,
        update,  # pyright: ignore[reportArgumentType]  # `value` is required
    )


def skip_counters(state: SkipState) -> dict[str, jax.Array]:
    """Copies of the counters, which stay readable when the state is donated to the next step."""
    return {"skipped": jnp.copy(state.skipped), "in_a_row": jnp.copy(state.in_a_row)}


def reset_skip_counter(state: SkipState) -> SkipState:
    """Sets the count of skips in a row to 0, when a run resumes: the cause may be fixed, and the
    checkpoint may be of a step after which all updates are skipped."""
    zero = jnp.zeros((), state.in_a_row.dtype)
    return state._replace(in_a_row=jax.device_put(zero, state.in_a_row.sharding))


def is_finite(loss: jax.Array, grads: Any) -> jax.Array:
    """True if loss and gradients are finite; the norm is not if any gradient is not."""
    return jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
