"""The backward pass of LayerNorm for NVIDIA GPUs, in Triton through Pallas.

It computes all three gradients in one pass over memory; XLA makes several (docs/results).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

PROGRAMS = 264  # two per multiprocessor of an H200
ROWS = 8  # per iteration of a program


def backward(
    x: jax.Array, dy: jax.Array, scale: jax.Array, eps: float, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradient of x (…, D), and partial sums (PROGRAMS, D), float32, of those of scale
    and bias, from the gradient dy (…, D) of the output."""
    width = x.shape[-1]
    rows = x.size // width
    partial_sums = jax.ShapeDtypeStruct((PROGRAMS, width), jnp.float32)
    d_x, d_scale, d_bias = pl.pallas_call(
        partial(_backward, eps),
        grid=(PROGRAMS,),
        out_shape=(jax.ShapeDtypeStruct((rows, width), x.dtype), partial_sums, partial_sums),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name="norm_backward",
    )(x.reshape(rows, width), dy.reshape(rows, width), scale)
    return d_x.reshape(x.shape), d_scale, d_bias


def _backward(eps, x_ref, dy_ref, scale_ref, d_x_ref, d_scale_ref, d_bias_ref):
    rows, width = x_ref.shape
    padded = pl.next_power_of_2(width)
    lanes = jnp.arange(padded) < width
    columns = pl.ds(jnp.int32(0), padded)
    program = pl.program_id(0)
    scale = triton.load(scale_ref.at[columns], mask=lanes, other=0.0)

    def mean(x):
        return x.sum(axis=1, keepdims=True) / width

    def add_rows(i, sums):
        start = (i * PROGRAMS + program) * ROWS
        inside = (start + jnp.arange(ROWS) < rows)[:, None] & lanes[None, :]
        at = (pl.ds(start, ROWS), columns)
        x, dy = (
            triton.load(ref.at[at], mask=inside, other=0.0).astype(jnp.float32)
            for ref in (x_ref, dy_ref)
        )
        centered = jnp.where(inside, x - mean(x), 0.0)
        inverse_std = jax.lax.rsqrt(mean(centered * centered) + eps)
        xhat, dy_scale = centered * inverse_std, dy * scale[None, :]
        d_x = (dy_scale - mean(dy_scale) - xhat * mean(dy_scale * xhat)) * inverse_std
        triton.store(d_x_ref.at[at], d_x.astype(d_x_ref.dtype), mask=inside)
        return sums[0] + (dy * xhat).sum(axis=0), sums[1] + dy.sum(axis=0)

    zero = jnp.zeros(padded, jnp.float32)
    steps = pl.cdiv(rows, PROGRAMS * ROWS)
    d_scale, d_bias = jax.lax.fori_loop(0, steps, add_rows, (zero, zero))
    triton.store(d_scale_ref.at[program, columns], d_scale, mask=lanes)
    triton.store(d_bias_ref.at[program, columns], d_bias, mask=lanes)
