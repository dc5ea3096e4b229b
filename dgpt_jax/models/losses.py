"""Losses, in float32."""

import jax.numpy as jnp


def normalise(x, eps: float = 1e-12):
    """x over its L2 norm along the last axis; a zero vector gives zero and a finite gradient."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True) + eps)


def cosine_loss(prediction, target):
    """2 - 2·cos along the last axis, in [0, 4]. Source: `models_digpt.py` (`forward_loss`)."""
    return 2 - 2 * (normalise(prediction) * normalise(target)).sum(axis=-1)


def pixel_loss(prediction, target):
    """Mean squared error along the last axis, of iGPT's and MAE's pixel targets."""
    return jnp.square(prediction.astype(jnp.float32) - target).mean(axis=-1)


def normalise_patches(patches, eps: float = 1e-6):
    """Each patch's pixels (..., P) to mean 0 and variance 1. Source: MAE, `norm_pix_loss`."""
    patches = patches.astype(jnp.float32)
    mean = patches.mean(axis=-1, keepdims=True)
    return (patches - mean) / jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + eps)
