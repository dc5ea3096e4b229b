"""The attention kernels for TPUs: one program does one image, forward or backward.

The scores of one head of an image (148 tokens in pretraining B/16) fit in on-chip memory whole. XLA
would write them to HBM in float32, their last axis padded to 256: they were most of what a step
moved. Heads lie side by side along the last axis, because an axis of 32 or 64 is padded to 128.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128  # the width of a TPU's vector registers


def fused(projections, bias=(), *, head_width: int, interpret: bool = False):
    """attention.attend of one device. `bias`: float32 (N, M) to add to all scores, or none.
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
