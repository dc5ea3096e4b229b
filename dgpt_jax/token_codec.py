"""Teacher tokens as they are stored: float16, or int8 with a static scale per channel."""

import numpy as np

from dgpt_jax.schema import UserError

CODECS = {"float16": np.float16, "int8": np.int8}


def channel_scale(tokens: np.ndarray) -> np.ndarray:
    """Root mean square of each channel of (..., C), never zero: the static scale of int8.

    A few channels of CLIP are 20 to 50 times the rest and would drown them in a per-token range.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    rms = np.sqrt(np.square(flat).mean(axis=0))
    return np.where(rms > 0, rms, 1.0).astype(np.float32)


def encode(tokens: np.ndarray, codec: str, scale: np.ndarray | None) -> np.ndarray:
    """Float tokens (..., C) as stored: float16, or int8 after the channel scale.

    int8 spans each token's own largest scaled value. That factor is not stored: losses normalise
    every token. Raises UserError on tokens that are not finite.
    """
    if not np.isfinite(tokens).all():
        raise UserError("the teacher gave tokens that are not finite: check its weights and dtype")
    if codec == "float16":
        limit = np.finfo(np.float16).max
        return np.clip(tokens, -limit, limit).astype(np.float16)
    scaled = tokens / scale
    largest = np.abs(scaled).max(axis=-1, keepdims=True)
    return np.rint(scaled * (127 / np.where(largest > 0, largest, 1))).astype(np.int8)


def decode(stored, scale):
    """Stored tokens (..., C) as float32, up to a positive factor a token; NumPy or JAX arrays."""
    tokens = stored.astype(np.float32)
    return tokens * np.asarray(scale, np.float32) if len(scale) else tokens


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine along the last axis, float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(norms, 1e-30)
