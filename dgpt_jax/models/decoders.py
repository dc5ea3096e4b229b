"""The decoders of D-iGPT, which are discarded after pretraining. Shape suffixes as in digpt.py."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.models.remat import rematerialized, save_for_backward
from dgpt_jax.models.transformer import (
    Attention,
    CrossAttention,
    LayerNorm,
    Mlp,
    scan_blocks,
    xavier,
)


class DecoderBlock(nn.Module):
    """Pre-LN block: q += self-attention; q += cross-attention to features; q += MLP."""

    heads: int
    mlp_ratio: float
    dtype: Any

    @nn.compact
    def __call__(self, q_BNE: jax.Array, mask_NN: np.ndarray, kv_BNE: jax.Array) -> jax.Array:
        def norm(name, x):
            return LayerNorm(1e-6, self.dtype, name=name)(x)

        attn1 = Attention(self.heads, self.dtype, name="attn1")
        attn2 = CrossAttention(self.heads, self.dtype, name="attn2")
        mlp = Mlp(self.mlp_ratio, "gelu", self.dtype, name="mlp")
        q_BNE = q_BNE + save_for_backward(attn1(norm("norm1", q_BNE), mask_NN))
        q_BNE = q_BNE + save_for_backward(
            attn2(norm("norm2_1", q_BNE), norm("norm2_2", kv_BNE), mask_NN)
        )
        return q_BNE + mlp(norm("norm2", q_BNE))


# {name of a prediction head's parameters: its width}, as a hashable tuple of pairs.
Heads = tuple[tuple[str, int], ...]


class Decoder(nn.Module):
    """Predicts teachers' tokens at the positions of its queries from tapped features.

    out_widths: a linear head per teacher, on the same decoder.
    """

    width: int
    depth: int
    heads: int
    out_widths: Heads
    mlp_ratio: float
    remat: str
    dtype: Any

    @nn.compact
    def __call__(
        self, taps: Sequence[jax.Array], positions_BNE: jax.Array, mask_NN: np.ndarray
    ) -> dict[str, jax.Array]:
        """Returns {head: (B, N, C)} float32, CLS last, from taps, each (B, N, D), and query
        positions."""
        # One norm for all taps, as in the official code.
        norm = LayerNorm(1e-5, self.dtype, name="enc_norm")
        features = jnp.concatenate([norm(tap) for tap in taps], axis=-1)
        batch, tokens, _ = features.shape
        kv = nn.Dense(
            self.width * self.depth, kernel_init=xavier, dtype=self.dtype, name="enc2dec"
        )(features)
        # Interleaved: channel d of block i comes from output d·depth + i.
        kv_LBNE = jnp.moveaxis(kv.reshape(batch, tokens, self.width, self.depth), -1, 0)
        token = self.param("token", nn.initializers.normal(0.02), (1, 1, self.width))
        block = rematerialized(DecoderBlock, self.remat)(
            self.heads, self.mlp_ratio, self.dtype, name="blocks"
        )
        queries, _ = scan_blocks(block, self.depth, token + positions_BNE, mask_NN, kv_LBNE)
        queries = LayerNorm(1e-6, self.dtype, name="norm")(queries)
        return predict(self.out_widths, queries, self.dtype)


def predict(heads: Heads, x_BNE: jax.Array, dtype: Any) -> dict[str, jax.Array]:
    """Linear heads within a compact module: {head: (B, N, C)} float32."""
    return {
        name: nn.Dense(width, kernel_init=xavier, dtype=dtype, name=name)(x_BNE).astype(jnp.float32)
        for name, width in heads
    }


class DistillationHead(nn.Module):
    """Feature distillation without a decoder: predicts the tokens of the visible segments."""

    out_widths: Heads
    dtype: Any

    @nn.compact
    def __call__(self, last_BND: jax.Array) -> dict[str, jax.Array]:
        """Returns {head: (B, N, C)} float32 from the last block's residuals (B, N, D)."""
        normed = LayerNorm(1e-6, self.dtype, name="norm")(last_BND)
        return predict(self.out_widths, normed, self.dtype)
