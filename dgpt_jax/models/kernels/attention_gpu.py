"""Attention kernels for NVIDIA GPUs, in Triton through Pallas.

A program computes one tile of rows of one head of one image, over blocks of columns in an unrolled
loop: sequences are short, and loops that the compiler pipelines gave wrong gradients.
In the forward pass rows are queries; in the backward pass keys, then queries, and the logarithms of
the softmax's sums are reused (FlashAttention-2, arXiv 2307.08691). Masks are bits, 32 rows per
word; cuDNN's attention, which takes a mask as a bias, is slower at these lengths.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dgpt_jax.distributed import sharding
from dgpt_jax.models.remat import save_for_backward

TILE = 64  # rows of a program
FWD_BLOCK, BWD_BLOCK = 128, 32  # columns per iteration; other sizes are slower (docs/results)
WORD = 32
MASKED = -1e30  # finite, so that a fully masked row gives no NaN
LOG2E = 1.4426950408889634  # exp2 is the hardware's exponential


def fused(
    projections: Sequence[jax.Array],
    mask_NM: jax.typing.ArrayLike | None = None,
    *,
    head_width: int,
    interpret: bool = False,
) -> jax.Array:
    """attention.attend on a mesh. `interpret` runs the kernels on any platform, slowly."""
    if mask_NM is None:
        mask_NM = jnp.ones((projections[0].shape[2], projections[-1].shape[2]), bool)
    options = {"head_width": head_width, "interpret": interpret}

    def on_shards(function, arrays, mask_NM, out_like):
        def call(arrays, mask_NM):
            return function(*arrays, mask_NM, **options)

        return sharding.shard_map_heads(call, arrays, mask_NM, out_like)

    @jax.custom_vjp
    def attention(projections, mask_NM):
        return forward_on_shards(projections, mask_NM)[0]

    def forward_on_shards(projections, mask_NM):
        first = projections[0]
        sums = (*first.shape[1:3], first.shape[3] // head_width)
        out_like = (first[0], jax.ShapeDtypeStruct(sums, jnp.float32))
        return on_shards(forward, (projections,), mask_NM, out_like)

    def fwd(projections, mask_NM):
        out, log_sums = map(save_for_backward, forward_on_shards(projections, mask_NM))
        return out, (projections, mask_NM, out, log_sums)

    def bwd(residuals, d_out):
        projections, mask_NM, out, log_sums = residuals
        arrays = (projections, out, log_sums, d_out)
        return on_shards(backward, arrays, mask_NM, projections), None

    attention.defvjp(fwd, bwd)
    return attention(tuple(projections), jnp.asarray(mask_NM))


def forward(
    projections: Sequence[jax.Array], mask_NM: jax.Array, *, head_width: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns attention on one device, and log2 of the softmax's sums, float32 (B, N, heads)."""
    arrays = [jnp.moveaxis(stacked, 0, 2) for stacked in projections]
    batch, queries, _, width = arrays[0].shape
    heads = width // head_width
    results = (
        jax.ShapeDtypeStruct((batch, queries, 1, width), arrays[0].dtype),
        jax.ShapeDtypeStruct((batch, queries, heads), jnp.float32),
    )
    tiles = pl.cdiv(queries, TILE)
    call = _call(_forward, head_width, (tiles, heads, batch), results, interpret)
    out, log_sums = call(pack_mask(mask_NM.T), *arrays)
    return out[:, :, 0], log_sums


def backward(
    projections: Sequence[jax.Array],
    out: jax.Array,
    log_sums: jax.Array,
    d_out: jax.Array,
    mask_NM: jax.Array,
    *,
    head_width: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of the projections, from the inputs and outputs of `forward`."""
    arrays = [jnp.moveaxis(stacked, 0, 2) for stacked in projections]
    batch, queries, _, width = arrays[0].shape
    heads = width // head_width
    deltas = (out.astype(jnp.float32) * d_out).reshape(batch, queries, heads, -1).sum(axis=-1)
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    tiles = pl.cdiv(max(queries, arrays[-1].shape[1]), TILE)
    call = _call(_backward, head_width, (tiles, heads, batch), results, interpret)
    grads = call(
        pack_mask(mask_NM), pack_mask(mask_NM.T), log_sums, deltas, d_out[:, :, None], *arrays
    )
    return tuple(jnp.moveaxis(x, 2, 0) for x in grads)


def pack_mask(mask: jax.Array) -> jax.Array:
    """Packs a mask (M, N) into int32 (M, W): bit i of word w is column 32 w + i, padded to TILE."""
    rows, columns = mask.shape
    mask = jnp.pad(mask, ((0, 0), (0, -columns % TILE))).reshape(rows, -1, WORD)
    bits = mask.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(bits.sum(axis=-1, dtype=jnp.uint32), jnp.int32)


def split_blocks(length: int, largest: int) -> list[tuple[int, int]]:
    """Blocks (start, size) that cover a length; sizes are powers of two, from 32 to largest."""
    blocks, start = [], 0
    while start < length:
        while largest > max(WORD, length - start):
            largest //= 2
        blocks.append((start, largest))
        start += largest
    return blocks


def _call(kernel, head_width, grid, results, interpret):
    return pl.pallas_call(
        partial(kernel, head_width, len(results)),
        grid=grid,
        out_shape=results,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name=kernel.__name__.strip("_"),
    )


class _Head:
    """Reads and writes rows of one head of one image in arrays (B, N, planes, heads · width)."""

    def __init__(self, width: int):
        self.width = width
        self.padded = pl.next_power_of_2(width)
        self.head, self.example = pl.program_id(1), pl.program_id(2)

    def _at(self, ref, plane, start, size):
        lanes = jnp.arange(self.padded)
        inside = (start + jnp.arange(size) < ref.shape[1])[:, None] & (lanes < self.width)[None, :]
        lanes = pl.ds(self.head * self.width, self.padded)
        return ref.at[self.example, _rows(start, size), jnp.int32(plane), lanes], inside

    def read(self, ref, plane, start, size):
        """Returns (size, padded), with zeros out of bounds."""
        at, inside = self._at(ref, plane, start, size)
        return triton.load(at, mask=inside, other=0.0)

    def write(self, ref, plane, start, x):
        at, inside = self._at(ref, plane, start, x.shape[0])
        triton.store(at, x.astype(ref.dtype), mask=inside)

    def read_sums(self, ref, start, size):
        at = ref.at[self.example, _rows(start, size), self.head]
        return triton.load(at, mask=start + jnp.arange(size) < ref.shape[1], other=0.0)

    def write_sums(self, ref, start, x):
        at = ref.at[self.example, _rows(start, x.shape[0]), self.head]
        triton.store(at, x, mask=start + jnp.arange(x.shape[0]) < ref.shape[1])


def _rows(start, size):
    """A slice that may exceed the array, which Pallas refuses for a `start` of type int."""
    return pl.ds(jnp.asarray(start, jnp.int32), size)


def _load_mask(packed, tile, start, size):
    """Mask of a tile of rows and a block of columns, bool (TILE, size); packed: (columns, W)."""
    inside = start + jnp.arange(size) < packed.shape[0]
    row = jnp.arange(TILE)[:, None]
    bits = jnp.zeros((TILE, size), jnp.int32)
    for i in range(TILE // WORD):
        at = packed.at[_rows(start, size), tile * (TILE // WORD) + i]
        word = triton.load(at, mask=inside, other=0)[None, :]
        bits = jnp.where(row // WORD == i, word, bits)
    return (bits >> row % WORD) & 1 == 1


def _forward(head_width, results, mask, *refs):
    (*projections, out, log_sums), head, tile = refs, _Head(head_width), pl.program_id(0)
    (q_ref, _), (k_ref, i_k), (v_ref, i_v) = _planes(projections)
    q = head.read(q_ref, 0, tile * TILE, TILE)
    highest = jnp.full(TILE, MASKED, jnp.float32)
    total, o = jnp.zeros(TILE, jnp.float32), jnp.zeros((TILE, head.padded), jnp.float32)
    for at in split_blocks(k_ref.shape[1], FWD_BLOCK):
        s = triton.dot(q, head.read(k_ref, i_k, *at), trans_b=True) * (head_width**-0.5 * LOG2E)
        s = jnp.where(_load_mask(mask, tile, *at), s, MASKED)
        new = jnp.maximum(highest, s.max(axis=1))
        p, scale, highest = jnp.exp2(s - new[:, None]), jnp.exp2(highest - new), new
        v = head.read(v_ref, i_v, *at)
        total = total * scale + p.sum(axis=1)
        o = o * scale[:, None] + triton.dot(p.astype(v.dtype), v)
    head.write(out, 0, tile * TILE, o / total[:, None])
    head.write_sums(log_sums, tile * TILE, highest + jnp.log2(total))


def _backward(head_width, results, key_mask, query_mask, log_sums, deltas, d_out, *refs):
    (q_ref, _), (k_ref, i_k), (v_ref, i_v) = _planes(refs[:-results])
    (d_q_ref, _), (d_k_ref, _), (d_v_ref, _) = _planes(refs[-results:])
    head, tile = _Head(head_width), pl.program_id(0)
    start = tile * TILE
    scale = head_width**-0.5

    def gradients(mask, s, d_p, log, delta):
        """Returns P and the gradient of the scores, from scores and the gradient of P."""
        p = jnp.where(mask, jnp.exp2(s * (scale * LOG2E) - log), 0.0)
        return p.astype(d_out.dtype), (p * (d_p - delta) * scale).astype(d_out.dtype)

    k, v = head.read(k_ref, i_k, start, TILE), head.read(v_ref, i_v, start, TILE)
    d_k = d_v = jnp.zeros((TILE, head.padded), jnp.float32)
    for at in split_blocks(q_ref.shape[1], BWD_BLOCK):  # keys are rows
        q, d_o = head.read(q_ref, 0, *at), head.read(d_out, 0, *at)
        log, delta = head.read_sums(log_sums, *at)[None, :], head.read_sums(deltas, *at)[None, :]
        mask = _load_mask(key_mask, tile, *at)
        s, d_p = triton.dot(k, q, trans_b=True), triton.dot(v, d_o, trans_b=True)
        p, d_s = gradients(mask, s, d_p, log, delta)
        d_k, d_v = d_k + triton.dot(d_s, q), d_v + triton.dot(p, d_o)
    head.write(d_k_ref, i_k, start, d_k)
    head.write(d_v_ref, i_v, start, d_v)

    q, d_o = head.read(q_ref, 0, start, TILE), head.read(d_out, 0, start, TILE)
    log, delta = head.read_sums(log_sums, start, TILE), head.read_sums(deltas, start, TILE)
    d_q = jnp.zeros((TILE, head.padded), jnp.float32)
    for at in split_blocks(k_ref.shape[1], BWD_BLOCK):  # queries are rows
        k, v = head.read(k_ref, i_k, *at), head.read(v_ref, i_v, *at)
        mask = _load_mask(query_mask, tile, *at)
        s, d_p = triton.dot(q, k, trans_b=True), triton.dot(d_o, v, trans_b=True)
        _, d_s = gradients(mask, s, d_p, log[:, None], delta[:, None])
        d_q = d_q + triton.dot(d_s, k)
    head.write(d_q_ref, 0, start, d_q)


def _planes(refs):
    """q, k and v as (reference, index on its third axis)."""
    return [(ref, i) for ref in refs for i in range(ref.shape[2])]
