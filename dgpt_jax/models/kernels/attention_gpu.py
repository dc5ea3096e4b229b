"""The attention kernels for NVIDIA GPUs, in Triton through Pallas.

A program takes one tile of rows of one head of one image and passes over all that they meet, piece
by piece, in straight lines: sequences are short, and loops that the compiler overlaps gave wrong
gradients (RESULTS.md). Forward, rows are queries; backward, keys and then queries, with the sums of
the forward's softmax at hand (FlashAttention-2, arXiv 2307.08691). Masks are bits, 32 rows a word;
cuDNN's attention, which takes a mask as a bias, is slower at these lengths.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dgpt_jax import sharding
from dgpt_jax.remat import kept

TILE = 64  # rows of a program
FORWARD_PIECE, BACKWARD_PIECE = 128, 32  # of what they meet; others are slower (RESULTS.md)
WORD = 32
MASKED = -1e30  # finite, so that a row of which all is masked gives no NaN
LOG2E = 1.4426950408889634  # GPUs compute powers of two


def fused(projections, mask_NM=None, *, head_width: int, interpret: bool = False):
    """attention.attend, on a mesh. `interpret` runs the kernels anywhere, slowly."""
    if mask_NM is None:
        mask_NM = jnp.ones((projections[0].shape[2], projections[-1].shape[2]), bool)
    options = {"head_width": head_width, "interpret": interpret}

    def on_shards(function, arrays, mask_NM, like):
        def call(arrays, mask_NM):
            return function(*arrays, mask_NM, **options)

        return sharding.per_shard(call, arrays, mask_NM, like)

    @jax.custom_vjp
    def attention(projections, mask_NM):
        return forward_on_shards(projections, mask_NM)[0]

    def forward_on_shards(projections, mask_NM):
        first = projections[0]
        sums = (*first.shape[1:3], first.shape[3] // head_width)
        like = (first[0], jax.ShapeDtypeStruct(sums, jnp.float32))
        return on_shards(forward, (projections,), mask_NM, like)

    def keep(projections, mask_NM):
        out, sums = map(kept, forward_on_shards(projections, mask_NM))
        return out, (projections, mask_NM, out, sums)

    def pull(residuals, gradient):
        projections, mask_NM, out, sums = residuals
        arrays = (projections, out, sums, gradient)
        return on_shards(backward, arrays, mask_NM, projections), None

    attention.defvjp(keep, pull)
    return attention(tuple(projections), jnp.asarray(mask_NM))


def forward(projections, mask_NM, *, head_width: int, interpret: bool):
    """`fused` of one device, and log2 of the softmax's sums, float32 (B, N, heads)."""
    arrays = [jnp.moveaxis(stacked, 0, 2) for stacked in projections]
    batch, queries, _, width = arrays[0].shape
    heads = width // head_width
    results = (
        jax.ShapeDtypeStruct((batch, queries, 1, width), arrays[0].dtype),
        jax.ShapeDtypeStruct((batch, queries, heads), jnp.float32),
    )
    tiles = pl.cdiv(queries, TILE)
    call = _call(_forward, head_width, (tiles, heads, batch), results, interpret)
    out, sums = call(words(mask_NM.T), *arrays)
    return out[:, :, 0], sums


def backward(projections, out, sums, gradient, mask_NM, *, head_width: int, interpret: bool):
    """The gradients of the projections, from what forward got and gave."""
    arrays = [jnp.moveaxis(stacked, 0, 2) for stacked in projections]
    batch, queries, _, width = arrays[0].shape
    heads = width // head_width
    inner = (out.astype(jnp.float32) * gradient).reshape(batch, queries, heads, -1).sum(axis=-1)
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    tiles = pl.cdiv(max(queries, arrays[-1].shape[1]), TILE)
    call = _call(_backward, head_width, (tiles, heads, batch), results, interpret)
    found = call(words(mask_NM), words(mask_NM.T), sums, inner, gradient[:, :, None], *arrays)
    return tuple(jnp.moveaxis(x, 2, 0) for x in found)


def words(mask) -> jax.Array:
    """A mask (M, N) as int32 (M, W): bit i of word w is column 32 w + i; whole tiles of columns."""
    rows, columns = mask.shape
    mask = jnp.pad(mask, ((0, 0), (0, -columns % TILE))).reshape(rows, -1, WORD)
    bits = mask.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(bits.sum(axis=-1, dtype=jnp.uint32), jnp.int32)


def pieces(length: int, largest: int) -> list[tuple[int, int]]:
    """(start, size) of powers of two, `largest` to 32, that cover a length."""
    found, start = [], 0
    while start < length:
        while largest > max(WORD, length - start):
            largest //= 2
        found.append((start, largest))
        start += largest
    return found


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
    """One head of one image in memory, (B, N, planes, heads · width): reads and writes its rows."""

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
        """(size, padded), zeros beyond the end."""
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
    """A slice that may reach beyond the end, which is refused where `start` is a plain number."""
    return pl.ds(jnp.asarray(start, jnp.int32), size)


def _allowed(words, tile, start, size):
    """Who of a tile (row) and a piece (column) meet: bool (TILE, size); words: (columns, W)."""
    inside = start + jnp.arange(size) < words.shape[0]
    row = jnp.arange(TILE)[:, None]
    bits = jnp.zeros((TILE, size), jnp.int32)
    for i in range(TILE // WORD):
        at = words.at[_rows(start, size), tile * (TILE // WORD) + i]
        word = triton.load(at, mask=inside, other=0)[None, :]
        bits = jnp.where(row // WORD == i, word, bits)
    return (bits >> row % WORD) & 1 == 1


def _forward(head_width, results, words, *refs):
    (*projections, out, sums), head, tile = refs, _Head(head_width), pl.program_id(0)
    (q_ref, _), (k_ref, i_k), (v_ref, i_v) = _planes(projections)
    q = head.read(q_ref, 0, tile * TILE, TILE)
    highest = jnp.full(TILE, MASKED, jnp.float32)
    total, o = jnp.zeros(TILE, jnp.float32), jnp.zeros((TILE, head.padded), jnp.float32)
    for at in pieces(k_ref.shape[1], FORWARD_PIECE):
        s = triton.dot(q, head.read(k_ref, i_k, *at), trans_b=True) * (head_width**-0.5 * LOG2E)
        s = jnp.where(_allowed(words, tile, *at), s, MASKED)
        new = jnp.maximum(highest, s.max(axis=1))
        p, scale, highest = jnp.exp2(s - new[:, None]), jnp.exp2(highest - new), new
        v = head.read(v_ref, i_v, *at)
        total = total * scale + p.sum(axis=1)
        o = o * scale[:, None] + triton.dot(p.astype(v.dtype), v)
    head.write(out, 0, tile * TILE, o / total[:, None])
    head.write_sums(sums, tile * TILE, highest + jnp.log2(total))


def _backward(head_width, results, of_keys, of_queries, sums, inner, gradient, *refs):
    (q_ref, _), (k_ref, i_k), (v_ref, i_v) = _planes(refs[:-results])
    (d_q_ref, _), (d_k_ref, _), (d_v_ref, _) = _planes(refs[-results:])
    head, tile = _Head(head_width), pl.program_id(0)
    start = tile * TILE
    scale = head_width**-0.5

    def gradients(allowed, s, d_p, log, delta):
        """P and the gradient of the scores, from scores and the gradient of P."""
        p = jnp.where(allowed, jnp.exp2(s * (scale * LOG2E) - log), 0.0)
        return p.astype(gradient.dtype), (p * (d_p - delta) * scale).astype(gradient.dtype)

    k, v = head.read(k_ref, i_k, start, TILE), head.read(v_ref, i_v, start, TILE)
    d_k = d_v = jnp.zeros((TILE, head.padded), jnp.float32)
    for at in pieces(q_ref.shape[1], BACKWARD_PIECE):  # keys are rows
        q, d_o = head.read(q_ref, 0, *at), head.read(gradient, 0, *at)
        log, delta = head.read_sums(sums, *at)[None, :], head.read_sums(inner, *at)[None, :]
        met = _allowed(of_keys, tile, *at)
        s, d_p = triton.dot(k, q, trans_b=True), triton.dot(v, d_o, trans_b=True)
        p, d_s = gradients(met, s, d_p, log, delta)
        d_k, d_v = d_k + triton.dot(d_s, q), d_v + triton.dot(p, d_o)
    head.write(d_k_ref, i_k, start, d_k)
    head.write(d_v_ref, i_v, start, d_v)

    q, d_o = head.read(q_ref, 0, start, TILE), head.read(gradient, 0, start, TILE)
    log, delta = head.read_sums(sums, start, TILE), head.read_sums(inner, start, TILE)
    d_q = jnp.zeros((TILE, head.padded), jnp.float32)
    for at in pieces(k_ref.shape[1], BACKWARD_PIECE):  # queries are rows
        k, v = head.read(k_ref, i_k, *at), head.read(v_ref, i_v, *at)
        met = _allowed(of_queries, tile, *at)
        s, d_p = triton.dot(q, k, trans_b=True), triton.dot(d_o, v, trans_b=True)
        _, d_s = gradients(met, s, d_p, log[:, None], delta[:, None])
        d_q = d_q + triton.dot(d_s, k)
    head.write(d_q_ref, 0, start, d_q)


def _planes(refs):
    """q, k and v as (reference, index on its third axis)."""
    return [(ref, i) for ref in refs for i in range(ref.shape[2])]
