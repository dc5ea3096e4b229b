"""Losses, in float32."""

import jax
import jax.numpy as jnp


def l2_normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x over its L2 norm along the last axis; a zero vector gives zero and a finite gradient."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True) + eps)


def cosine_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """2 - 2·cos along the last axis, in [0, 4]. Source: `models_digpt.py` (`forward_loss`)."""
    return 2 - 2 * (l2_normalize(prediction) * l2_normalize(target)).sum(axis=-1)


def pixel_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error along the last axis, for the pixel targets of iGPT and MAE."""
    return jnp.square(prediction.astype(jnp.float32) - target).mean(axis=-1)


def normalize_patches(patches: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Each patch's pixels (..., P) with mean 0 and variance 1. Source: MAE, `norm_pix_loss`."""
    patches = patches.astype(jnp.float32)
    mean = patches.mean(axis=-1, keepdims=True)
    return (patches - mean) / jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + eps)
