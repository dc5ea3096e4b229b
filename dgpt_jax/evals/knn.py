"""Weighted k-nearest-neighbour classification, by DINOv2's protocol (`dinov2/eval/knn.py`)."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def knn_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, float]:
    """{k: accuracy in [0, 1]} of features (N, D) with labels (N,).

    Features are L2-normalised; each of the k most similar training examples votes for its class
    with exp(similarity / temperature). A k above N uses all N. Exact; holds chunk² similarities.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    train, train_y = _padded(_unit(train_features), train_labels, chunk)
    test, test_y = _padded(_unit(test_features), test_labels, chunk)
    k = min(max(ks), len(train_features))
    hits = dict.fromkeys(ks, 0)
    for queries, answers in zip(test, test_y, strict=True):
        near, labels = _nearest(queries, train, train_y, len(train_features), k)
        for wanted in ks:
            votes = _votes(near[:, :wanted], labels[:, :wanted], temperature, classes)
            hits[wanted] += int((np.asarray(votes.argmax(axis=1)) == answers).sum())
    return {k: hits[k] / len(test_labels) for k in ks}


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


def _padded(features: np.ndarray, labels: np.ndarray, chunk: int):
    """(chunks, chunk, D) and (chunks, chunk); what pads has label -1, which no class has."""
    missing = -len(features) % chunk
    features = np.pad(features, ((0, missing), (0, 0)))
    labels = np.pad(np.asarray(labels, np.int32), (0, missing), constant_values=-1)
    return features.reshape(-1, chunk, features.shape[1]), labels.reshape(-1, chunk)


@partial(jax.jit, static_argnames="k")
def _nearest(queries, train, train_labels, length, k: int):
    """Similarities and labels (Q, k) of the nearest of `length` examples, nearest first."""
    chunk = train.shape[1]

    def merge(best, part):
        start, features, labels = part
        similarity = jnp.matmul(queries, features.T, precision="highest")
        real = start + jnp.arange(chunk) < length
        similarity = jnp.where(real[None], similarity, -jnp.inf)
        labels = jnp.broadcast_to(labels, similarity.shape)
        near = jnp.concatenate([best[0], similarity], axis=1)
        near, index = jax.lax.top_k(near, k)
        labels = jnp.concatenate([best[1], labels], axis=1)
        return (near, jnp.take_along_axis(labels, index, axis=1)), None

    none = (jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32))
    starts = jnp.arange(len(train)) * chunk
    return jax.lax.scan(merge, none, (starts, train, train_labels))[0]


@partial(jax.jit, static_argnames="classes")
def _votes(near, labels, temperature, classes: int):
    # The largest similarity is taken out, which no argmax sees: exp cannot overflow.
    weights = jnp.exp((near - near[:, :1]) / temperature)
    return (jax.nn.one_hot(labels, classes) * weights[..., None]).sum(axis=1)
