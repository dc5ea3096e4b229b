"""Attention over short sequences, all heads side by side, whose scores never leave the chip.

An image has few tokens (148 in pretraining B/16), so its scores for one head fit in on-chip memory
whole: on TPU one program of a kernel does one image, forward or backward, and only the projections
are read and only their like is written. XLA would write the scores to HBM in float32, their last
axis padded to 256: they were most of what a step moved. Elsewhere than on TPU XLA does it.
Heads lie side by side along the last axis, because an axis of 32 or 64 is padded to 128 in memory.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dgpt_jax import sharding

# What a masked score is: far below any score, and finite, so that nothing becomes NaN.
MASKED = -1e30
# Tokens of which a head's scores, four times in float32, still fit beside the rest.
LONGEST = 640
LANES = 128  # the width of a TPU's vector registers


def attend(projections: Sequence[jax.Array], head_width: int, mask_NM=None) -> jax.Array:
    """softmax(q kᵀ / √K) v of every head, softmax in float32: (B, N, D).

    projections: q, k and v, stacked in one array (3, B, N, D) or in two, (1, B, N, D) and
    (2, B, M, D); a head is `head_width` neighbours of the last axis. mask: bool (N, M), who (row)
    may attend to whom (column).
    """
    projections = tuple(projections)
    longest = max(stacked.shape[2] for stacked in projections)
    if not sharding.on_tpu() or longest > LONGEST:
        return reference(projections, head_width, mask_NM)
    bias = () if mask_NM is None else (jnp.where(mask_NM, 0.0, MASKED),)
    return sharding.per_shard(partial(fused, head_width=head_width), projections, bias)


def reference(projections, head_width: int, mask_NM=None):
    """`attend` by XLA."""
    q, k, v = (x.reshape(*x.shape[:2], -1, head_width) for stacked in projections for x in stacked)
    mask = None if mask_NM is None else jnp.asarray(mask_NM)[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(*q.shape[:2], -1)


def fused(projections, bias=(), *, head_width: int, interpret: bool = False):
    """`attend` by the kernels, on one device. `bias`: float32 (N, M) to add to all scores, or none.
    `interpret` runs the kernels anywhere, slowly."""
    call = partial(_call, interpret=interpret)

    @jax.custom_vjp
    def attention(projections, bias):
        first = projections[0]
        result = jax.ShapeDtypeStruct(first.shape[1:], first.dtype)
        return call(partial(_forward, head_width), bias, projections, result)

    def forward(projections, bias):
        return attention(projections, bias), (projections, bias)

    def backward(residuals, gradient):
        projections, bias = residuals
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in projections]
        found = call(partial(_backward, head_width), bias, (*projections, gradient), like)
        return tuple(found), jax.tree.map(jnp.zeros_like, bias)  # the mask is not learned

    attention.defvjp(forward, backward)
    return attention(tuple(projections), tuple(bias))


def _call(kernel, bias, arrays, results, *, interpret):
    """A kernel over arrays (…, B, N, D), one example a program."""

    def one_example(x):
        lead = x.ndim - 3
        block = (*x.shape[:lead], 1, *x.shape[lead + 1 :])
        return pl.BlockSpec(block, lambda b: (0,) * lead + (b, 0, 0))

    return pl.pallas_call(
        partial(kernel, len(bias)),
        grid=(arrays[0].shape[-3],),
        in_specs=[
            *(pl.BlockSpec(x.shape, lambda b: (0, 0)) for x in bias),
            *(one_example(x) for x in arrays),
        ],
        out_specs=jax.tree.map(one_example, results),
        out_shape=results,
        interpret=interpret,
    )(*bias, *arrays)


def _forward(head_width, biases, *refs):
    *projections, out = refs[biases:]

    def heads(lanes, group):
        q, k, v = (ref[i, 0, :, lanes] for ref, i in _planes(projections))
        results = []
        for at in group:
            p = _probabilities(q[:, at], k[:, at], refs[:biases])
            results.append(_dot(p.astype(v.dtype), v[:, at], 1, 0).astype(out.dtype))
        out[0, :, lanes] = jnp.concatenate(results, axis=1)

    _for_groups_of_heads(heads, out.shape[-1], head_width)


def _backward(head_width, biases, *refs):
    arrays = (len(refs) - biases - 1) // 2
    projections, gradient, results = (
        refs[biases : biases + arrays], refs[biases + arrays], refs[biases + arrays + 1 :]
    )  # fmt: skip

    def heads(lanes, group):
        q, k, v = (ref[i, 0, :, lanes] for ref, i in _planes(projections))
        d_out = gradient[0, :, lanes]
        found = []
        for at in group:
            p = _probabilities(q[:, at], k[:, at], refs[:biases])
            d_v = _dot(p.astype(v.dtype), d_out[:, at], 0, 0)
            d_p = _dot(d_out[:, at], v[:, at], 1, 1)
            d_s = p * (d_p - (p * d_p).sum(axis=1, keepdims=True)) * head_width**-0.5
            d_s = d_s.astype(q.dtype)
            found.append((_dot(d_s, k[:, at], 1, 0), _dot(d_s, q[:, at], 0, 0), d_v))
        for (ref, i), parts in zip(_planes(results), zip(*found, strict=True), strict=True):
            ref[i, 0, :, lanes] = jnp.concatenate(parts, axis=1).astype(ref.dtype)

    _for_groups_of_heads(heads, gradient.shape[-1], head_width)


def _for_groups_of_heads(body, width: int, head_width: int):
    """body(lanes, heads within them) for as many heads at a time as fill whole vector registers, in
    a loop: unrolled over 32 heads, the kernels take minutes to compile."""
    group = math.lcm(head_width, LANES)
    group = width if width % group else group
    heads = [slice(i, i + head_width) for i in range(0, group, head_width)]

    @pl.loop(0, width // group)
    def _(i):
        body(pl.ds(pl.multiple_of(i * group, group), group), heads)


def _planes(refs):
    """q, k and v as (reference, index on its first axis)."""
    return [(ref, i) for ref in refs for i in range(ref.shape[0])]


def _probabilities(q, k, biases):
    """Softmax of the scores of one head, float32 (N, M)."""
    s = _dot(q, k, 1, 1) * q.shape[-1] ** -0.5
    for bias in biases:
        s = s + bias[...]
    p = jnp.exp(s - s.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def _dot(a, b, a_axis: int, b_axis: int):
    """The product that contracts one axis of each of two matrices, in float32."""
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
