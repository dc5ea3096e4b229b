"""Schedule and optimizer, as in the official lr_sched.py, lr_decay.py, main_pretrain.py and
main_finetune.py; and a guard against bad numbers, where the official code exits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax import param_rules
from dgpt_jax.config import Optim

# Biases and norms do not decay; tokens (cls, next, visible) do, as in the official code.
DECAY = ((r"(bias|scale)$", False), (r".*", True))


# Running statistics (probe_heads.py) follow their own rule; everything else is trained.
TRAINED = ((r"running_(mean|var)$", "running"), (r".*", "trained"))
# In fine-tuning, where positions are learned, no token decays (timm's no_weight_decay).
FINE_TUNING_DECAY = ((r"(bias|scale|pos_embed|cls_token)$", False), (r".*", True))


def layer_ids(depth: int) -> param_rules.Rules:
    """Which layer a parameter of heads.Classifier counts to: 0 before the blocks, which are 1 to
    `depth`, then depth + 1, for the last norm too. Source: MAE's lr_decay.py."""
    return (
        (r"^(encoder/(patch_embed/|cls_token$)|pos_embed$)", 0),
        (r"^encoder/blocks/", np.arange(1, depth + 1)),
        (r"^(norm|head)/", depth + 1),
    )


def peaks(config: Optim, batch_size: int) -> np.ndarray:
    """The largest learning rate; with config.grid, (G,) of them."""
    return np.asarray(config.grid or config.blr) * batch_size / 256


def schedule(peak, warmup: int, total: int, least: float = 0.0):
    """Steps to learning rates: linear from 0 over `warmup` steps, then half a cosine to `least`.

    peak: a number, or an array of them.
    """

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        done = (step - warmup) / max(total - warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        falling = least + (peak - least) * cosine
        return jnp.where(step < warmup, peak * (step / max(warmup, 1)), falling)

    return rate


def optimizer(
    config: Optim,
    rate,
    *,
    decay: param_rules.Rules = DECAY,
    layers: param_rules.Rules | None = None,
    running: bool = False,
    stacks: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of config.kind after optional clipping, guarded.

    With `running`, running statistics step by plain SGD. With `layers`, rules from paths to layer
    ids (on stacked leaves a vector of them), rate and decay of all but the last layer shrink by
    config.layer_decay a layer. `stacks` names the parts of the parameters, at the top of the tree,
    whose leaves are stacked heads (G, …): each head is clipped and steps alone, with its own of the
    G rates that `rate` gives.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if stacks:
        alone = of_each_head(optax.chain(clip, _kind(config, 1.0, decay)), rate)
        rules = dict.fromkeys(stacks, alone) | {"running": optax.sgd(0.1)}
        tx = optax.partition(
            rules, lambda params: {name: name if name in stacks else "running" for name in params}
        )
    else:
        tx = _kind(config, rate, decay)
        if running:
            rules = {"trained": tx, "running": optax.sgd(0.1)}
            tx = optax.partition(rules, lambda params: param_rules.apply(TRAINED, params))
        if layers:
            tx = optax.chain(tx, scaled_by_layer(layers, config.layer_decay))
        tx = optax.chain(clip, tx)
    if config.ema:
        tx = averaged(tx, config.ema)
    return guarded(tx, most=config.bad_steps, spike=config.spike)


def _kind(config: Optim, rate, decay: param_rules.Rules) -> optax.GradientTransformation:
    """AdamW has eps 1e-8 and decoupled decay by rules. SGD and LARS add the decay to the gradient;
    LARS scales what decays to a thousandth of its parameter's norm; momentum b1 gathers that, and
    the rate comes last. Source of LARS: MAE's lars.py."""

    def decaying(params):
        return param_rules.apply(decay, params)

    if config.kind == "adamw":
        return optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decaying,
            mu_dtype=config.mu_dtype,
        )
    trust = optax.scale_by_trust_ratio(trust_coefficient=0.001)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, decaying),
        optax.masked(trust, decaying) if config.kind == "lars" else optax.identity(),
        optax.trace(config.b1),
        optax.scale_by_learning_rate(rate),
    )


def of_each_head(tx: optax.GradientTransformation, rate: Callable) -> optax.GradientTransformation:
    """`tx`, of rate 1, on every head of stacked parameters (G, …) as if it were alone, times its
    rate: `rate` maps steps to (G,)."""

    def init(params):
        return jnp.zeros((), jnp.int32), jax.vmap(tx.init)(params)

    def update(grads, state, params=None):
        count, inner = state
        updates, inner = jax.vmap(tx.update)(grads, inner, params)
        scale = rate(count)
        updates = jax.tree.map(lambda x: x * scale.reshape(-1, *(1,) * (x.ndim - 1)), updates)
        return updates, (count + 1, inner)

    return optax.GradientTransformation(init, update)


def scaled_by_layer(layers: param_rules.Rules, decay: float) -> optax.GradientTransformation:
    """Updates times decay^(last - id)."""

    def scale(ids, update):
        factor = jnp.asarray(decay ** (last - np.asarray(ids)), update.dtype)
        return update * factor.reshape(factor.shape + (1,) * (update.ndim - factor.ndim))

    last = max(np.max(ids) for _, ids in layers)
    return optax.stateless(
        lambda updates, params: jax.tree.map(scale, param_rules.apply(layers, updates), updates)
    )


class Averaged(NamedTuple):
    """State of `averaged`: the running mean of the parameters, and the inner state."""

    ema: Any
    inner: Any


def averaged(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`tx`, with an exponential moving average of the parameters that its updates lead to."""
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return Averaged(jax.tree.map(jnp.copy, params), tx.init(params))

    def update(grads, state, params=None, **extra):
        updates, inner = tx.update(grads, state.inner, params, **extra)
        after = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda mean, p: decay * mean + (1 - decay) * p, state.ema, after)
        return updates, Averaged(ema, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def measured(state):
    """The parameters of a TrainState that are evaluated: their moving average, if there is one."""
    inner = getattr(state.opt_state, "inner", None)
    return inner.ema if isinstance(inner, Averaged) else state.params


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
