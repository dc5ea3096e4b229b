"""Updates by layer: learning-rate decay from the last layer down, and freezing for some steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax.config import TrainConfig
from dgpt_jax.distributed import param_rules


def layer_ids(depth: int) -> param_rules.Rules:
    """Layer ids of the parameters of a classifier or a pretraining model: 0 before the blocks, 1 to
    `depth` for the blocks, depth + 1 for the last norm and the head, or the decoders. Source: MAE's
    lr_decay.py."""
    return (
        (r"^(encoder/(patch_embed/|cls_token$)|pos_embed$)", 0),
        (r"^encoder/blocks/", np.arange(1, depth + 1)),
        (r"^(norm|head|next|visible|direct)/", depth + 1),
    )


def frozen_by_config(config: TrainConfig, steps: int) -> param_rules.Rules | None:
    """Number of first steps in which each parameter is not updated, for `freeze`; None if all are.

    config.init.freeze_blocks blocks of the encoder, if positive with patch embedding, CLS and
    positions, are frozen for `steps` steps; with freeze_positions these for the whole training.
    """
    init, depth = config.init, config.model.depth
    if not init.freeze_positions and not (init.freeze_blocks and steps):
        return None
    embeddings = steps if init.freeze_blocks else 0
    return (
        (r"^pos_embed$", np.iinfo(np.int32).max if init.freeze_positions else embeddings),
        (r"^encoder/(patch_embed/|cls_token$)", embeddings),
        (r"^encoder/blocks/", np.where(np.arange(depth) < init.freeze_blocks, steps, 0)),
        (r".*", 0),
    )


def scaled_by_layer(layers: param_rules.Rules, decay: float) -> optax.GradientTransformation:
    """Multiplies updates by decay^(last id - id)."""

    def scale(ids, update):
        factor = jnp.asarray(decay ** (last - np.asarray(ids)), update.dtype)
        return update * factor.reshape(factor.shape + (1,) * (update.ndim - factor.ndim))

    last = max(np.max(ids) for _, ids in layers)
    return optax.stateless(
        lambda updates, params: jax.tree.map(scale, param_rules.apply(layers, updates), updates)
    )


def freeze(
    tx: optax.GradientTransformation, steps: param_rules.Rules
) -> optax.GradientTransformationExtraArgs:
    """`tx` with updates, weight decay included, of zero in the first steps of some parameters.

    steps: rules from paths to their number (a vector for stacked leaves). The state is that of
    `tx`, whose moments follow the gradients meanwhile. `update` takes the number of finished steps
    as `step`, which is in every checkpoint, so that a resumed run is exact.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, *, step, **extra):
        def masked(count, update):
            count = np.asarray(count, np.int32)
            is_frozen = step < count.reshape(count.shape + (1,) * (update.ndim - count.ndim))
            return jnp.where(is_frozen, jnp.zeros_like(update), update)

        updates, state = tx.update(updates, state, params, **extra)
        return jax.tree.map(masked, param_rules.apply(steps, updates), updates), state

    return optax.GradientTransformationExtraArgs(
        tx.init,
        update,  # pyright: ignore[reportArgumentType]  # `step` is required
    )
