"""Transformer block of the teachers: the student's block, and what published towers add to it."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgpt_jax.models import attention, transformer
from dgpt_jax.models.rope import Rope, rotate


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""

    eps: float
    dtype: Any = jnp.float32  # of the result

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of the same shape (…, D)."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        return (x * inverse * scale).astype(self.dtype)


NORMS = {"layer": transformer.LayerNorm, "rms": RmsNorm}


class TeacherAttention(nn.Module):
    """Self-attention with rotary positions, and with a norm before the output projection."""

    heads: int
    dtype: Any
    rope: Rope | None
    grid: tuple[int, int]
    inner_norm: Any = None

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        width = x_BND.shape[-1]
        qkv = transformer.FusedProjection(3, width, self.dtype, name="qkv")(x_BND)
        if self.rope is not None:
            turned = rotate(qkv[:2], self.rope, self.grid, width // self.heads)
            qkv = jnp.concatenate([turned, qkv[2:]])
        out = attention.attend((qkv,), width // self.heads)
        if self.inner_norm is not None:
            out = self.inner_norm(name="norm")(out)
        return nn.Dense(width, kernel_init=transformer.xavier, dtype=self.dtype, name="proj")(out)


class TeacherMlp(nn.Module):
    """MLP of `hidden` units; twice as many before a gated activation; with a norm after it."""

    hidden: int
    activation: str
    dtype: Any
    inner_norm: Any = None

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        units = self.hidden * (2 if self.activation == "swiglu" else 1)
        dense = {"kernel_init": transformer.xavier, "dtype": self.dtype}
        x = nn.Dense(units, name="fc1", **dense)(x_BND)
        x = transformer.ACTIVATIONS[self.activation](x)
        if self.inner_norm is not None:
            x = self.inner_norm(name="norm")(x)
        return nn.Dense(x_BND.shape[-1], name="fc2", **dense)(x)


class TeacherBlock(nn.Module):
    """Pre-norm block: x += ls1 · attn(norm1 x); x += ls2 · mlp(norm2 x).

    ls1 and ls2 (D,) exist if `layer_scale`. norm: of NORMS.
    """

    heads: int
    mlp_width: int
    activation: str
    eps: float
    dtype: Any
    layer_scale: bool
    norm: str
    rope: Rope | None
    grid: tuple[int, int]
    attn_norm: bool
    mlp_norm: bool

    @nn.compact
    def __call__(self, x_BND: jax.Array, _mask=None) -> jax.Array:
        norm = partial(NORMS[self.norm], self.eps, self.dtype)

        def scaled(name, y_BND):
            if not self.layer_scale:
                return y_BND
            return y_BND * self.param(name, nn.initializers.ones, y_BND.shape[-1:])

        attn = TeacherAttention(
            self.heads, self.dtype, self.rope, self.grid, norm if self.attn_norm else None,
            name="attn",
        )  # fmt: skip
        mlp = TeacherMlp(
            self.mlp_width, self.activation, self.dtype, norm if self.mlp_norm else None, name="mlp"
        )
        x_BND = x_BND + scaled("ls1", attn(norm(name="norm1")(x_BND)))
        return x_BND + scaled("ls2", mlp(norm(name="norm2")(x_BND)))
