"""Weighted k-nearest-neighbour classification, by DINOv2's protocol (`dinov2/eval/knn.py`).

The training features stay split over all devices (features.Bank). A batch of queries goes to all of
them, each finds the nearest of its own rows, and of what all found the nearest are taken: exact.

What ImageNet-1K (1,281,167 rows) of ViT-H (D = 1280, float32) needs on a v5e-64, for each kind of
features: 103 MB of rows a chip and 4 MB of its part of the 50,000 queries; the search, compiled for
it, 73 MB more, which do not grow with the rows. On a host: 5 MB of labels.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import sharding
from dgpt_jax.evals import features


def correct(
    train: features.Bank,
    test: features.Bank,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    chosen: np.ndarray | None = None,
) -> dict[int, int]:
    """{k: how many of `test` are classified correctly}; rows (steps, B, D), labels (N,).

    Rows are L2-normalised; each of the k most similar training examples, of those `chosen` (int),
    votes for its class with exp(similarity / temperature). A k above their number uses all.
    """
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    labels = np.full(len(train), -1, np.int32)
    chosen = slice(None) if chosen is None else chosen
    labels[chosen] = train.labels[chosen]
    memory = train.rows, train.like(labels, -1)
    hits = dict.fromkeys(ks, 0)
    for queries, answers in test.batches():
        near, found = nearest(queries, memory, min(max(ks), len(train)), train.mesh)
        for k in ks:
            voted = np.asarray(_vote(near[:, :k], found[:, :k], temperature, classes))
            hits[k] += int((voted[: len(answers)] == answers).sum())
    return hits


def _unit(rows):
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnums=(2, 3))
def nearest(queries, memory, k: int, mesh):
    """Similarities and labels (Q, k) of the nearest rows, nearest first.

    memory: rows (steps, B, D) and labels (steps, B), -1 where a row does not count. Where fewer
    than k count, the rest have similarity -inf and label -1.
    """
    near, labels = sharding.each_part(
        partial(_nearest_on_device, k=k), mesh, _unit(queries), memory
    )
    near, labels = (jnp.moveaxis(x, 0, 1).reshape(len(queries), -1) for x in (near, labels))
    found = _top((near, labels), min(k, near.shape[1]))
    return jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))


def _nearest_on_device(queries, memory, k: int):
    """The same of the device's rows, with a leading axis of 1."""

    def merge(best, part):
        rows, labels = part
        similarity = jnp.matmul(queries, _unit(rows).T, precision="highest")
        similarity = jnp.where(labels >= 0, similarity, -jnp.inf)
        labels = jnp.broadcast_to(labels, similarity.shape)
        both = (jnp.concatenate(x, axis=1) for x in zip(best, (similarity, labels), strict=True))
        return _top(both, k), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32)
    near, labels = features.scan_chunks(merge, none, memory)[0]
    return near[None], labels[None]


def _top(candidates, k: int):
    near, labels = candidates
    near, index = jax.lax.top_k(near, k)
    return near, jnp.take_along_axis(labels, index, axis=1)


@partial(jax.jit, static_argnames="classes")
def _vote(near, labels, temperature, classes: int):
    # The largest similarity is taken out, which no argmax sees: exp cannot overflow. What does not
    # count has the weight 0.
    weights = jnp.exp((near - near[:, :1]) / temperature)
    queries = jnp.arange(len(near))[:, None]
    return jnp.zeros((len(near), classes)).at[queries, labels].add(weights).argmax(axis=1)
