"""Features of a labeled dataset, sharded over all devices, and passes over them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError

# Rows that a device processes at a time (see `chunk_steps`): 8 MB of similarities to 256 queries.
ROWS = 8192
# Logits that a device computes at a time: 33 MB in float32.
LOGITS = 2**23
# 4-byte words that each process contributes to a sum at a time; even.
GATHERED = 2**20


@dataclass(frozen=True)
class FeatureBank:
    """Rows of N examples, left on the devices that computed them: no host or device has them all.

    rows: (steps, B, …), row i at [i // B, i % B], B split over devices
    (sharding.microbatch_sharding); entries beyond N are undefined. labels: int (N, …), on every
    host.
    """

    rows: jax.Array
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.rows.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue] # Named

    @staticmethod
    def from_arrays(
        rows: np.ndarray, labels: np.ndarray, mesh: jax.sharding.Mesh, batch_size: int = 256
    ) -> "FeatureBank":
        """A bank of arrays (N, …) that every host has. Raises UserError on non-finite rows."""
        bad = ~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
        refuse_not_finite(int(bad.sum()), len(rows), "features")
        shards = sharding.batch_shards(mesh)
        batch_size = -(-batch_size // shards) * shards
        steps = bank_steps(len(rows), batch_size, mesh)
        padding = [(0, steps * batch_size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        padded = np.pad(rows, padding).reshape(steps, batch_size, *rows.shape[1:])
        return FeatureBank(_shard(padded, mesh), np.asarray(labels))

    def align(self, values: np.ndarray, fill: float) -> jax.Array:
        """Values (N,) in the layout of the rows, (steps, B), with `fill` beyond N."""
        shape = self.rows.shape[:2]
        padded = np.full(shape[0] * shape[1], fill, values.dtype)
        padded[: len(values)] = values
        return _shard(padded.reshape(shape), self.mesh)

    def batches(self) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """(rows (B, …) on every device, labels of the valid ones), in order."""
        size = self.rows.shape[1]
        for step in range(-(-len(self) // size)):
            labels = self.labels[step * size : (step + 1) * size]
            yield _take(self.rows, step, sharding.replicated(self.mesh)), labels

    def gathered(self) -> np.ndarray:
        """All rows (N, …), on every host."""
        return np.concatenate([np.asarray(x)[: len(y)] for x, y in self.batches()])

    def select(self, indices: np.ndarray) -> "FeatureBank":
        """A bank of the rows at `indices` (int, ascending), copied through every host; this bank if
        they are all of its rows."""
        if len(indices) == len(self):
            return self
        size = self.rows.shape[1]
        steps, starts = np.unique(indices // size, return_index=True)
        rows = [
            np.asarray(_take(self.rows, step, sharding.replicated(self.mesh)))[chosen % size]
            for step, chosen in zip(steps, np.split(indices, starts[1:]), strict=True)
        ]
        return FeatureBank.from_arrays(np.concatenate(rows), self.labels[indices], self.mesh)

    def local(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows (n, …), their indices (n,)) of this process, about ROWS at a time. Every row of the
        bank belongs to exactly one process."""
        steps, batch_size = self.rows.shape[:2]
        for shard in self.rows.addressable_shards:
            if shard.replica_id:
                continue
            columns = np.arange(batch_size)[shard.index[1]]
            _, size = chunk_steps(steps, len(columns))
            for start in range(0, steps, size):
                indices = np.arange(start, start + size)[:, None] * batch_size + columns
                valid = indices < len(self)
                yield np.asarray(shard.data[start : start + size])[valid], indices[valid]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the rows, float64 (…)."""
        count = len(self)
        sums = sum(x.sum(axis=0, dtype=np.float64) for x, _ in self.local())
        mean = sum_over_processes(sums) / count
        squares = sum(np.square(x - mean).sum(axis=0) for x, _ in self.local())
        return mean, np.sqrt(sum_over_processes(squares) / count)


def refuse_not_finite(count: int, total: int, what: str):
    """Raises UserError if `count` of `total` examples are not finite: argmax would count NaN as an
    answer."""
    if count:
        raise UserError(
            f"{what} of {count} of {total} examples are not finite (NaN or Inf): the weights are "
            f"broken or overflow in their dtype; nothing was measured"
        )


def chunk_steps(steps: int, rows: int) -> tuple[int, int]:
    """(padded steps, steps per chunk) of a device with `rows` rows per step.

    Steps are padded to a multiple of the chunk, which has at most about ROWS rows. Idempotent in
    `steps`.
    """
    largest = max(1, ROWS // rows)
    chunks = -(-steps // largest)
    size = -(-steps // chunks)
    return chunks * size, size


def bank_steps(length: int, batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """Steps of a bank of `length` rows."""
    return chunk_steps(-(-length // batch_size), batch_size // sharding.batch_shards(mesh))[0]


def scan_chunks(add: Callable, init: Any, shard: Any, classes: int = 0) -> Any:
    """jax.lax.scan of add(carry, chunk) over a device's shard (steps, B, …) of arrays in a bank's
    layout.

    A chunk (n, …) has about ROWS rows, or few enough to keep the logits of `classes` below LOGITS.
    Steps are joined into a chunk inside the scan: joining them outside would copy a bank whose B is
    not a multiple of the device's tile.
    """
    steps, batch_size = jax.tree.leaves(shard)[0].shape[:2]
    _, size = chunk_steps(steps, batch_size)
    limit = LOGITS // (classes * batch_size) if classes else size
    size = max(n for n in range(1, size + 1) if size % n == 0 and n <= max(1, limit))
    chunks = jax.tree.map(lambda x: x.reshape(steps // size, size, *x.shape[1:]), shard)

    def add_chunk(carry, chunk):
        return add(carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chunk))

    return jax.lax.scan(add_chunk, init, chunks)


def sum_over_processes(value: np.ndarray | float) -> np.ndarray:
    """Sum of a float64 array over all processes, the same on each."""
    if jax.process_count() == 1:
        return np.asarray(value)
    # As pairs of uint32, because JAX would round float64; in blocks, because all are gathered.
    bits = np.ascontiguousarray(value, np.float64).reshape(-1).view(np.uint32)
    blocks = np.split(bits, range(GATHERED, len(bits), GATHERED))
    sums = [multihost_utils.process_allgather(x).view(np.float64).sum(axis=0) for x in blocks]
    return np.concatenate(sums).reshape(np.shape(value))


def _shard(array: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    return sharding.make_global_array(array, sharding.microbatch_sharding(mesh))


@partial(jax.jit, static_argnums=2)
def _take(rows, step, out_sharding):
    return jax.lax.with_sharding_constraint(rows[step], out_sharding)
