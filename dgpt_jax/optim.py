"""Schedule and optimizer, as in the official pretraining's lr_sched.py and main_pretrain.py."""

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
    """AdamW (eps 1e-8, decoupled decay by rules) after optional clipping."""
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=lambda params: param_rules.apply(DECAY, params),
        mu_dtype=config.mu_dtype,
    )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return adamw
