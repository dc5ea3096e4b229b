"""Teacher tokens as they are stored: float16, int8 or int4, of all channels or of PCA's.

The integers have two scales. One a channel is static, measured on a sample: a few channels of CLIP
are 20 to 50 times the rest and would drown them. One a token is not stored, because losses
normalise every token. Encoding and decoding run on the device, so that only what is stored travels.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dgpt_jax.schema import UserError

# What is stored of each codec; int4 packs two channels a byte.
CODECS = {"float16": np.float16, "int8": np.int8, "int4": np.uint8}
LEVELS = {"int8": 127, "int4": 7}
# Channel scales are kept within these, tokens brought there: no product of both overflows float32.
SMALL, LARGE = 1e-15, 1e15
# int4 clips at so many root mean squares of a token: steps are finer than up to its largest value.
CLIP_INT4 = 2.6


def stored_width(codec: str, width: int) -> int:
    """Length of a stored token of `width` channels; UserError where they cannot be packed."""
    if codec == "int4" and width % 2:
        raise UserError(f"codec int4 packs pairs of channels, and there are {width}")
    return width // 2 if codec == "int4" else width


@dataclass(frozen=True, eq=False)
class Codec:
    """name: of CODECS. scale: (C′,) of the integers, else empty. basis: (C, C′) of PCA, or None."""

    name: str
    scale: np.ndarray
    basis: np.ndarray | None = None

    def equals(self, other: "Codec") -> bool:
        """Whether what one has stored the other can read."""
        arrays = ((self.scale, other.scale), (self.basis, other.basis))
        return self.name == other.name and all(np.array_equal(a, b) for a, b in arrays)

    def project(self, tokens):
        """Tokens (..., C) as the store has them before packing: (..., C′) float32."""
        tokens = jnp.asarray(tokens, jnp.float32)
        if self.basis is None:
            return tokens
        return jnp.matmul(tokens, self.basis, precision="highest")

    def encode(self, tokens):
        """Finite tokens (..., C) as stored: (..., stored_width)."""
        tokens = self.project(tokens)
        if self.name == "float16":
            limit = float(np.finfo(np.float16).max)
            return jnp.clip(tokens, -limit, limit).astype(jnp.float16)
        levels = LEVELS[self.name]
        scaled = _ordinary(tokens) / jnp.asarray(self.scale, jnp.float32)
        full = jnp.abs(scaled).max(axis=-1, keepdims=True)
        scaled = scaled / jnp.where(full > 0, full, 1)
        if self.name == "int4":
            rms = jnp.sqrt(jnp.square(scaled).mean(axis=-1, keepdims=True))
            scaled = scaled / jnp.clip(CLIP_INT4 * rms, 1e-9, 1)
        steps = jnp.rint(scaled * levels)
        steps = jnp.clip(steps, -levels, levels)
        if self.name == "int8":
            return steps.astype(jnp.int8)
        low, high = jnp.split((steps + 8).astype(jnp.uint8), 2, axis=-1)
        return low | (high << 4)

    def decode(self, stored):
        """Stored tokens as float32 (..., C′), up to a positive factor a token."""
        stored = jnp.asarray(stored)
        if self.name == "int4":
            stored = jnp.concatenate([stored & 15, stored >> 4], axis=-1).astype(jnp.int8) - 8
        tokens = stored.astype(jnp.float32)
        return tokens * jnp.asarray(self.scale, jnp.float32) if len(self.scale) else tokens


def _ordinary(tokens):
    """Each token times a factor, 1 but for the tiniest and the hugest: so that nothing overflows
    when scales divide it, nor is it less than the device tells from zero."""
    largest = jnp.abs(tokens).max(axis=-1, keepdims=True)
    return tokens * jnp.where(largest > LARGE, 1 / LARGE, jnp.where(largest < SMALL, 1 / SMALL, 1))


def is_finite(stored: np.ndarray) -> bool:
    """Whether stored tokens, C-contiguous, hold neither NaN nor Inf, which only float16 can.

    By their bits, as integers: 14 µs for 257 × 1024 values, where np.isfinite takes 980.
    """
    if stored.dtype != np.float16 or not stored.size:
        return True
    infinity = 0x7C00
    return bool(
        stored.view(np.int16).max() < infinity and stored.view(np.uint16).max() < infinity | 0x8000
    )


def fit(tokens: np.ndarray, codec: str, pca: int | None = None) -> tuple[Codec, float]:
    """A codec for tokens like the sample (..., C), and the share of their variance that it keeps.

    `pca` keeps so many principal axes. They are not centred, as a cosine is not: the loss then is
    the cosine in their space. Raises UserError.
    """
    flat = np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1])
    basis, kept = None, 1.0
    if pca is not None:
        if not 1 <= pca <= flat.shape[1]:
            raise UserError(f"config.pca is {pca}, and tokens have {flat.shape[1]} channels")
        values, axes = np.linalg.eigh(flat.T @ flat)
        basis = np.ascontiguousarray(axes[:, ::-1][:, :pca]).astype(np.float32)
        kept = float(values[::-1][:pca].sum() / values.sum())
        flat = flat @ basis
    stored_width(codec, flat.shape[1])
    rms = np.sqrt(np.square(flat).mean(axis=0))
    scale = np.where(rms > 0, rms.clip(SMALL, LARGE), 1.0) if codec in LEVELS else np.zeros(0)
    return Codec(codec, scale.astype(np.float32), basis), kept


def cosines(a, b) -> np.ndarray:
    """Cosine along the last axis, float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(norms, 1e-30)
