"""Codecs of stored teacher tokens: float16, int8 or int4, optionally after PCA.

Integer codecs have two scales. The static one per channel is measured on a sample: a few channels
of CLIP are 20 to 50 times the others and would dominate. The one per token is not stored, because
losses normalize every token. Encoding and decoding run on the device, so that only stored bytes are
transferred.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.errors import UserError

# Stored dtype of each codec; int4 packs two channels per byte.
CODECS = {"float16": np.float16, "int8": np.int8, "int4": np.uint8}
LEVELS = {"int8": 127, "int4": 7}
# Channel scales are clipped to this range and tokens rescaled to it: no product overflows float32.
SMALL, LARGE = 1e-15, 1e15
# int4 clips at this multiple of a token's RMS: finer steps than with its maximum.
CLIP_INT4 = 2.6


def stored_width(codec: str, width: int) -> int:
    """Returns the stored length of a token of `width` channels. Raises UserError if int4 cannot
    pack them."""
    if codec == "int4" and width % 2:
        raise UserError(f"codec int4 packs pairs of channels and needs an even number, not {width}")
    return width // 2 if codec == "int4" else width


@dataclass(frozen=True, eq=False)
class Codec:
    """name: one of CODECS. scale: (C′,), empty for floats. basis: PCA's (C, C′), or None."""

    name: str
    scale: np.ndarray
    basis: np.ndarray | None = None

    def equals(self, other: "Codec") -> bool:
        """True if each can decode what the other has encoded."""
        if self.name != other.name or not np.array_equal(self.scale, other.scale):
            return False
        if self.basis is None or other.basis is None:
            return self.basis is other.basis
        return np.array_equal(self.basis, other.basis)

    def project(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """Projects tokens (..., C) on the basis: float32 (..., C′), as before quantization."""
        tokens = jnp.asarray(tokens, jnp.float32)
        if self.basis is None:
            return tokens
        return jnp.matmul(tokens, self.basis, precision="highest")

    def encode(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """Encodes finite tokens (..., C) as (..., stored_width)."""
        tokens = self.project(tokens)
        if self.name == "float16":
            limit = float(np.finfo(np.float16).max)
            return jnp.clip(tokens, -limit, limit).astype(jnp.float16)
        levels = LEVELS[self.name]
        scaled = _rescale_extremes(tokens) / jnp.asarray(self.scale, jnp.float32)
        absmax = jnp.abs(scaled).max(axis=-1, keepdims=True)
        scaled = scaled / jnp.where(absmax > 0, absmax, 1)
        if self.name == "int4":
            rms = jnp.sqrt(jnp.square(scaled).mean(axis=-1, keepdims=True))
            scaled = scaled / jnp.clip(CLIP_INT4 * rms, 1e-9, 1)
        steps = jnp.rint(scaled * levels)
        steps = jnp.clip(steps, -levels, levels)
        if self.name == "int8":
            return steps.astype(jnp.int8)
        low, high = jnp.split((steps + 8).astype(jnp.uint8), 2, axis=-1)
        return low | (high << 4)

    def decode(self, stored: jax.Array | np.ndarray) -> jax.Array:
        """Decodes stored tokens to float32 (..., C′), up to a positive factor per token."""
        stored = jnp.asarray(stored)
        if self.name == "int4":
            stored = jnp.concatenate([stored & 15, stored >> 4], axis=-1).astype(jnp.int8) - 8
        tokens = stored.astype(jnp.float32)
        return tokens * jnp.asarray(self.scale, jnp.float32) if len(self.scale) else tokens


def _rescale_extremes(tokens):
    """Multiplies each token by a factor, 1 except for extremely small and large tokens, so that
    division by the scales neither overflows nor underflows to zero."""
    largest = jnp.abs(tokens).max(axis=-1, keepdims=True)
    return tokens * jnp.where(largest > LARGE, 1 / LARGE, jnp.where(largest < SMALL, 1 / SMALL, 1))


def is_finite(stored: np.ndarray) -> bool:
    """True if stored tokens (C-contiguous) have neither NaN nor Inf, which only float16 can have.

    Compares their bits as integers: 14 µs for 257 × 1024 values, where np.isfinite takes 980.
    """
    if stored.dtype != np.float16 or not stored.size:
        return True
    infinity = 0x7C00
    return bool(
        stored.view(np.int16).max() < infinity and stored.view(np.uint16).max() < infinity | 0x8000
    )


def fit(tokens: np.ndarray, codec: str, pca: int | None = None) -> tuple[Codec, float]:
    """Fits a codec to a sample of tokens (..., C); returns it and the fraction of variance kept.

    `pca`: number of principal axes to keep, or None. The tokens are not centered, like in a cosine:
    the loss is then the cosine in that space. Raises UserError.
    """
    flat = np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1])
    basis, variance = None, 1.0
    if pca is not None:
        if not 1 <= pca <= flat.shape[1]:
            raise UserError(
                f"config.pca={pca} is outside 1…{flat.shape[1]}, the channels of tokens"
            )
        values, axes = np.linalg.eigh(flat.T @ flat)
        basis = np.ascontiguousarray(axes[:, ::-1][:, :pca]).astype(np.float32)
        variance = float(values[::-1][:pca].sum() / values.sum())
        flat = flat @ basis
    stored_width(codec, flat.shape[1])
    rms = np.sqrt(np.square(flat).mean(axis=0))
    scale = np.where(rms > 0, rms.clip(SMALL, LARGE), 1.0) if codec in LEVELS else np.zeros(0)
    return Codec(codec, scale.astype(np.float32), basis), variance


def cosines(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> np.ndarray:
    """Returns cosines along the last axis, float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(norms, 1e-30)
