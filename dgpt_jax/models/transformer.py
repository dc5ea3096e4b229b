"""Pre-LN transformer blocks of the encoder and the decoders, and what the teachers share with them.

Blocks are scanned: their parameters are stacked along a leading layer axis, and the scan returns
the residual stream before every block, for callers that tap it. Parameter names are timm's, so that
a conversion is a renaming. Matmuls run in `dtype`; parameters, LayerNorm (two-pass variance),
softmax, GELU's Φ and the residual stream are float32, as under the official autocast.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgpt_jax.distributed import sharding
from dgpt_jax.models import attention
from dgpt_jax.models.kernels import layer_norm_gpu, selection
from dgpt_jax.models.remat import save_for_backward

xavier = nn.initializers.xavier_uniform()


def swiglu(x: jax.Array) -> jax.Array:
    """SwiGLU, (…, 2H) to (…, H): the first half gates the second."""
    gate, value = jnp.split(x, 2, axis=-1)
    return nn.silu(gate) * value


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Φ(x). Φ is computed in float32 and rounded before the product, because 1 + erf
    cancels in bfloat16. erfc would not, but a step then moves more bytes on v5e and takes longer on
    a CPU (docs/results)."""
    normal_cdf = 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * 0.5**0.5)
    return x * normal_cdf.astype(x.dtype)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "swiglu": swiglu,
}


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, computed in float32."""

    eps: float
    dtype: Any = jnp.float32  # of the result

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of the same shape (…, D)."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x.astype(jnp.float32), scale, bias, self.eps, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, dtype: Any
) -> jax.Array:
    """LayerNorm of x, float32 (…, D), rounded to dtype."""
    return (_standardize(x, eps)[0] * scale + bias).astype(dtype)


def _standardize(x, eps):
    """Returns x with mean 0 and variance 1, and 1 / its standard deviation (two-pass)."""
    centered = x - x.mean(axis=-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.square(centered).mean(axis=-1, keepdims=True) + eps)
    return centered * inverse_std, inverse_std


def _layer_norm_bwd(eps, dtype, residuals, dy):
    x, scale = residuals
    if sharding.platform() == "gpu" and selection.implementation() == "ours":
        partial_sums = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        d_x, d_scale, d_bias = sharding.shard_map_batch(
            lambda arrays, scale: layer_norm_gpu.backward(arrays[0], arrays[1], scale, eps),
            (x, dy),
            scale,
            (x, partial_sums, partial_sums),
        )
        return d_x, d_scale.sum(axis=0), d_bias.sum(axis=0)
    dy = dy.astype(jnp.float32)
    xhat, inverse_std = _standardize(x, eps)
    dy_scale = dy * scale
    mean_dy = dy_scale.mean(axis=-1, keepdims=True)
    mean_dy_xhat = (dy_scale * xhat).mean(axis=-1, keepdims=True)
    axes = tuple(range(x.ndim - 1))
    d_x = (dy_scale - mean_dy - xhat * mean_dy_xhat) * inverse_std
    return d_x, (dy * xhat).sum(axis=axes), dy.sum(axis=axes)


layer_norm.defvjp(
    lambda x, scale, bias, eps, dtype: (layer_norm(x, scale, bias, eps, dtype), (x, scale)),
    _layer_norm_bwd,
)


class FusedProjection(nn.Module):
    """`count` projections (B, N, D) → (count, B, N, width), initialized like one fused matrix."""

    count: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        shape = (self.count, x_BND.shape[-1], self.width)

        def init(key, shape, dtype=jnp.float32):
            fused = xavier(key, (shape[1], shape[0] * shape[2]), dtype)
            return fused.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)

        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.count, self.width))
        out = jnp.einsum("bnd,pde->bnpe", x_BND.astype(self.dtype), kernel.astype(self.dtype))
        return jnp.moveaxis(out + bias.astype(self.dtype), 2, 0)


class Attention(nn.Module):
    """Self-attention; `qkv` has a kernel (3, D, D)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_NM=None) -> jax.Array:
        width = x_BND.shape[-1]
        qkv = save_for_backward(FusedProjection(3, width, self.dtype, name="qkv")(x_BND))
        out = attention.attend((qkv,), width // self.heads, mask_NM)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="proj")(out)


class CrossAttention(nn.Module):
    """Attention from queries (B, N, E) to features (B, M, E): `q` (1, E, E), `kv` (2, E, E)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, q_BNE: jax.Array, kv_BME: jax.Array, mask_NM=None) -> jax.Array:
        width = q_BNE.shape[-1]
        q = save_for_backward(FusedProjection(1, width, self.dtype, name="q")(q_BNE))
        kv = save_for_backward(FusedProjection(2, width, self.dtype, name="kv")(kv_BME))
        out = attention.attend((q, kv), width // self.heads, mask_NM)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="proj")(out)


class Mlp(nn.Module):
    """MLP of width · ratio units."""

    ratio: float
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        width = x_BND.shape[-1]
        units = int(width * self.ratio)
        dense = {"kernel_init": xavier, "dtype": self.dtype}
        hidden = save_for_backward(nn.Dense(units, name="fc1", **dense)(x_BND))
        return nn.Dense(width, name="fc2", **dense)(ACTIVATIONS[self.activation](hidden))


class Block(nn.Module):
    """Pre-LN transformer block: x += attn(norm1 x); x += mlp(norm2 x).

    drop_path_scale_B2 scales the two branches of each example (vit.sample_drop_path).
    """

    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_NM=None, drop_path_scale_B2=None) -> jax.Array:
        def scaled(branch, y_BND):
            if drop_path_scale_B2 is None:
                return y_BND
            return y_BND * drop_path_scale_B2[:, branch, None, None]

        attn = Attention(self.heads, self.dtype, name="attn")
        mlp = Mlp(self.mlp_ratio, self.activation, self.dtype, name="mlp")
        y = LayerNorm(self.eps, self.dtype, name="norm1")(x_BND)
        x_BND = x_BND + scaled(0, save_for_backward(attn(y, mask_NM)))
        y = LayerNorm(self.eps, self.dtype, name="norm2")(x_BND)
        return x_BND + scaled(1, mlp(y))


def scan_blocks(
    block: Callable,
    depth: int,
    x: jax.Array,
    mask_NM: Any,
    layer_inputs: Any = None,
    *,
    trained: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Runs `depth` stacked copies of `block` on x, called (x, mask, its slice of layer_inputs).

    Returns the last residual stream and the blocks' inputs, stacked on axis 0. On GPUs a loop that
    is differentiated is unrolled: otherwise everything that the backward pass reads is copied once
    more, into zero-filled arrays (docs/results).
    """

    def body(block, x, layer_input):
        args = (mask_NM,) if layer_input is None else (mask_NM, layer_input)
        return block(x, *args), x

    unroll = depth if trained and sharding.platform() == "gpu" else 1
    scan = nn.scan(
        body, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth, unroll=unroll
    )
    return scan(block, x, layer_inputs)
