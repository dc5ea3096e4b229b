"""Attention kernels for TPUs: one program per image, forward or backward.

The scores of one head of an image (148 tokens in pretraining B/16) fit in on-chip memory. XLA would
write them to HBM in float32, with the last axis padded to 256: they were most of a step's memory
traffic. Heads lie side by side along the last axis, because an axis of 32 or 64 is padded to 128.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128  # the width of a TPU's vector registers


def fused(
    projections: Sequence[jax.Array],
    bias: Sequence[jax.Array] = (),
    *,
    head_width: int,
    interpret: bool = False,
) -> jax.Array:
    """attention.attend on one device. `bias`: at most one array, float32 (N, M), added to all
    scores. `interpret` runs the kernels on any platform, slowly."""
    call = partial(_call, interpret=interpret)

    @jax.custom_vjp
    def attention(projections, bias):
        first = projections[0]
        result = jax.ShapeDtypeStruct(first.shape[1:], first.dtype)
        return call(partial(_forward, head_width), bias, projections, result)

    def forward(projections, bias):
        return attention(projections, bias), (projections, bias)

    def backward(residuals, d_out):
        projections, bias = residuals
        out_like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in projections]
        grads = call(partial(_backward, head_width), bias, (*projections, d_out), out_like)
        return tuple(grads), jax.tree.map(jnp.zeros_like, bias)  # the mask is not learned

    attention.defvjp(forward, backward)
    return attention(tuple(projections), tuple(bias))


def _call(kernel, bias, arrays, results, *, interpret):
    """Runs a kernel over arrays (…, B, N, D), one example per program."""

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
    projections, d_out, results = (
        refs[biases : biases + arrays], refs[biases + arrays], refs[biases + arrays + 1 :]
    )  # fmt: skip

    def heads(lanes, group):
        q, k, v = (ref[i, 0, :, lanes] for ref, i in _planes(projections))
        d_o = d_out[0, :, lanes]
        grads = []
        for at in group:
            p = _probabilities(q[:, at], k[:, at], refs[:biases])
            d_v = _dot(p.astype(v.dtype), d_o[:, at], 0, 0)
            d_p = _dot(d_o[:, at], v[:, at], 1, 1)
            d_s = p * (d_p - (p * d_p).sum(axis=1, keepdims=True)) * head_width**-0.5
            d_s = d_s.astype(q.dtype)
            grads.append((_dot(d_s, k[:, at], 1, 0), _dot(d_s, q[:, at], 0, 0), d_v))
        for (ref, i), by_head in zip(_planes(results), zip(*grads, strict=True), strict=True):
            ref[i, 0, :, lanes] = jnp.concatenate(by_head, axis=1).astype(ref.dtype)

    _for_groups_of_heads(heads, d_out.shape[-1], head_width)


def _for_groups_of_heads(body, width: int, head_width: int):
    """Calls body(lanes, their heads) in a loop over groups of heads that fill vector registers.

    Unrolled over 32 heads, the kernels take minutes to compile.
    """
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
    """Contracts one axis of each of two matrices, in float32."""
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
