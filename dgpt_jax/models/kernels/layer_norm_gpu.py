"""The backward pass of LayerNorm for NVIDIA GPUs, in Triton through Pallas.

One pass over memory gives all three gradients, for which XLA makes several (RESULTS.md).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

PROGRAMS = 264  # two for each multiprocessor of an H200
ROWS = 8  # that a program reads at a time


def backward(x, gradient, scale, eps: float, *, interpret: bool = False):
    """The gradient of x (…, D), and parts (PROGRAMS, D), to be added up, of those of scale and
    bias, float32; from the gradient of what came out, (…, D)."""
    width = x.shape[-1]
    rows = x.size // width
    part = jax.ShapeDtypeStruct((PROGRAMS, width), jnp.float32)
    d_x, d_scale, d_bias = pl.pallas_call(
        partial(_backward, eps),
        grid=(PROGRAMS,),
        out_shape=(jax.ShapeDtypeStruct((rows, width), x.dtype), part, part),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name="norm_backward",
    )(x.reshape(rows, width), gradient.reshape(rows, width), scale)
    return d_x.reshape(x.shape), d_scale, d_bias


def _backward(eps, x_ref, gradient_ref, scale_ref, d_x_ref, d_scale_ref, d_bias_ref):
    rows, width = x_ref.shape
    padded = pl.next_power_of_2(width)
    lanes = jnp.arange(padded) < width
    every = pl.ds(jnp.int32(0), padded)
    program = pl.program_id(0)
    scale = triton.load(scale_ref.at[every], mask=lanes, other=0.0)

    def mean(x):
        return x.sum(axis=1, keepdims=True) / width

    def some_rows(i, sums):
        start = (i * PROGRAMS + program) * ROWS
        inside = (start + jnp.arange(ROWS) < rows)[:, None] & lanes[None, :]
        at = (pl.ds(start, ROWS), every)
        x, gradient = (
            triton.load(ref.at[at], mask=inside, other=0.0).astype(jnp.float32)
            for ref in (x_ref, gradient_ref)
        )
        centred = jnp.where(inside, x - mean(x), 0.0)
        inverse = jax.lax.rsqrt(mean(centred * centred) + eps)
        normal, inner = centred * inverse, gradient * scale[None, :]
        d_x = (inner - mean(inner) - normal * mean(inner * normal)) * inverse
        triton.store(d_x_ref.at[at], d_x.astype(d_x_ref.dtype), mask=inside)
        return sums[0] + (gradient * normal).sum(axis=0), sums[1] + gradient.sum(axis=0)

    zero = jnp.zeros(padded, jnp.float32)
    steps = pl.cdiv(rows, PROGRAMS * ROWS)
    d_scale, d_bias = jax.lax.fori_loop(0, steps, some_rows, (zero, zero))
    triton.store(d_scale_ref.at[program, every], d_scale, mask=lanes)
    triton.store(d_bias_ref.at[program, every], d_bias, mask=lanes)
