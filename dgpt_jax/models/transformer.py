"""Pre-LN transformer blocks, once: of the encoder, the decoders and the teachers.

Blocks are scanned: their parameters are stacked along a leading layer axis, and the scan returns
the residual stream before every block, from which callers take what they tap. Names of parameters
are those of timm, so that a conversion is a renaming. Matmuls run in `dtype`; parameters, LayerNorm
(two-pass variance), softmax, GELU's Φ and the residual stream are float32, as under the official
autocast.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgpt_jax import attention, norm_gpu, sharding
from dgpt_jax.remat import kept

xavier = nn.initializers.xavier_uniform()


def swiglu(x):
    """(…, 2H) to (…, H): the first half gates the second."""
    gate, value = jnp.split(x, 2, axis=-1)
    return nn.silu(gate) * value


def gelu(x):
    """x Φ(x), exact; Φ in float32, rounded before the product: in bfloat16 1 + erf would cancel. By
    erfc, which would not, a step moves more bytes on v5e and takes longer on a CPU (RESULTS.md)."""
    normal_cdf = 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * 0.5**0.5)
    return x * normal_cdf.astype(x.dtype)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "swiglu": swiglu,
}


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, in float32 inside."""

    eps: float
    dtype: Any = jnp.float32  # of the result

    @nn.compact
    def __call__(self, x):
        """(…, D) to the same."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalised(x.astype(jnp.float32), scale, bias, self.eps, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalised(x, scale, bias, eps: float, dtype):
    """LayerNorm of x, float32 (…, D), rounded to dtype."""
    return (_normal(x, eps)[0] * scale + bias).astype(dtype)


def _normal(x, eps):
    """x with mean 0 and deviation 1, and 1 over the deviation that it had; a two-pass variance."""
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    return centred * inverse, inverse


def _normalised_gradient(eps, dtype, residuals, gradient):
    x, scale = residuals
    if sharding.platform() == "gpu":
        like = (x, *[jax.ShapeDtypeStruct((1, 1), jnp.float32)] * 2)
        d_x, d_scale, d_bias = sharding.per_example(
            lambda arrays, scale: norm_gpu.backward(*arrays, scale, eps), (x, gradient), scale, like
        )
        return d_x, d_scale.sum(axis=0), d_bias.sum(axis=0)
    gradient = gradient.astype(jnp.float32)
    normal, inverse = _normal(x, eps)
    inner = gradient * scale
    along = inner.mean(axis=-1, keepdims=True)
    across = (inner * normal).mean(axis=-1, keepdims=True)
    axes = tuple(range(x.ndim - 1))
    d_x = (inner - along - normal * across) * inverse
    return d_x, (gradient * normal).sum(axis=axes), gradient.sum(axis=axes)


normalised.defvjp(
    lambda x, scale, bias, eps, dtype: (normalised(x, scale, bias, eps, dtype), (x, scale)),
    _normalised_gradient,
)


class Projections(nn.Module):
    """`parts` projections (B, N, D) → (parts, B, N, width), initialised like one fused matrix."""

    parts: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BND):
        shape = (self.parts, x_BND.shape[-1], self.width)

        def init(key, shape, dtype=jnp.float32):
            fused = xavier(key, (shape[1], shape[0] * shape[2]), dtype)
            return fused.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)

        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.parts, self.width))
        out = jnp.einsum("bnd,pde->bnpe", x_BND.astype(self.dtype), kernel.astype(self.dtype))
        return jnp.moveaxis(out + bias.astype(self.dtype), 2, 0)


class Attention(nn.Module):
    """Self-attention; `qkv` has a kernel (3, D, D)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BND, mask_NM=None):
        width = x_BND.shape[-1]
        qkv = kept(Projections(3, width, self.dtype, name="qkv")(x_BND))
        out = attention.attend((qkv,), width // self.heads, mask_NM)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="proj")(out)


class CrossAttention(nn.Module):
    """Attention from queries (B, N, E) to features (B, M, E): `q` (1, E, E), `kv` (2, E, E)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, q_BNE, kv_BME, mask_NM=None):
        width = q_BNE.shape[-1]
        q = kept(Projections(1, width, self.dtype, name="q")(q_BNE))
        kv = kept(Projections(2, width, self.dtype, name="kv")(kv_BME))
        out = attention.attend((q, kv), width // self.heads, mask_NM)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="proj")(out)


class Mlp(nn.Module):
    """`hidden` units, or width · ratio of them; before a gated activation twice as many."""

    ratio: float
    activation: str
    dtype: Any
    hidden: int | None = None

    @nn.compact
    def __call__(self, x_BND):
        width = x_BND.shape[-1]
        units = int(width * self.ratio) if self.hidden is None else self.hidden
        units *= 2 if self.activation == "swiglu" else 1
        dense = {"kernel_init": xavier, "dtype": self.dtype}
        hidden = kept(nn.Dense(units, name="fc1", **dense)(x_BND))
        return nn.Dense(width, name="fc2", **dense)(ACTIVATIONS[self.activation](hidden))


class Block(nn.Module):
    """Pre-LN transformer block: x += ls1 · attn(norm1 x); x += ls2 · mlp(norm2 x).

    paths_B2 weighs the two branches of each example (`drop_paths`). ls1 and ls2 (D,) exist where
    `layer_scale`. `mlp_width` is exact where a ratio cannot be:
    int(width * (mlp_width / width)) may be one less.
    """

    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    eps: float = 1e-6
    dtype: Any = jnp.float32
    mlp_width: int | None = None
    layer_scale: bool = False

    @nn.compact
    def __call__(self, x_BND, mask_NM=None, paths_B2=None):
        def scaled(branch, y_BND):
            if self.layer_scale:
                name = f"ls{branch + 1}"
                y_BND = y_BND * self.param(name, nn.initializers.ones, y_BND.shape[-1:])
            return y_BND if paths_B2 is None else y_BND * paths_B2[:, branch, None, None]

        attn = Attention(self.heads, self.dtype, name="attn")
        mlp = Mlp(self.mlp_ratio, self.activation, self.dtype, self.mlp_width, name="mlp")
        y = LayerNorm(self.eps, self.dtype, name="norm1")(x_BND)
        x_BND = x_BND + scaled(0, kept(attn(y, mask_NM)))
        y = LayerNorm(self.eps, self.dtype, name="norm2")(x_BND)
        return x_BND + scaled(1, mlp(y))


def scan_blocks(block: nn.Module, depth: int, x, mask_NM, layer_inputs=None, *, trained=True):
    """Runs `depth` stacked copies of `block` on x, called (x, mask, its slice of layer_inputs).

    Returns the last residual stream and those that the blocks got, stacked on axis 0. On GPUs a
    loop that is differentiated is unrolled: otherwise all that the backward pass reads is copied
    once more, into arrays that were filled with zeros before (RESULTS.md).
    """

    def body(block, x, layer_input):
        args = (mask_NM,) if layer_input is None else (mask_NM, layer_input)
        return block(x, *args), x

    unroll = depth if trained and sharding.platform() == "gpu" else 1
    scan = nn.scan(
        body, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth, unroll=unroll
    )
    return scan(block, x, layer_inputs)
