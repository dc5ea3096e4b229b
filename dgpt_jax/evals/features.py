"""What a model makes of every picture of a dataset, kept split over all devices."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dgpt_jax import bad_records, batching, pipeline, records, sharding, views
from dgpt_jax.schema import UserError

# Rows that a device compares with at a time (see `groups`): 8 MB of similarities to 256 queries.
ROWS = 8192
# Logits that a device computes at a time: 33 MB in float32.
LOGITS = 2**23
# Numbers of 4 bytes that every process gives to a sum at a time, an even number.
GATHERED = 2**20


class Pictures(Protocol):
    """A dataset to evaluate on; its str() names it.

    classes: their number, where every example has one label; None where it has any number.
    """

    classes: int | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 (height, width, 3), and its int32 label or labels, equally many for all."""
        ...


class Records:
    """The labelled examples of a TFDS split. Raises UserError on a dataset without labels."""

    def __init__(self, split: records.Split):
        if split.label is None:
            raise UserError(f"{split} has no labels")
        pipeline.check_first_label(split)
        self._split, self.classes = split, split.label.num_classes

    def __len__(self) -> int:
        return len(self._split)

    def __str__(self) -> str:
        return str(self._split)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = self._split[index]
        return bad_records.picture(self._split, index, record), np.int32(record["label"])


@dataclass(frozen=True)
class Bank:
    """Rows of N examples that stay where they were computed: no host and no device has them all.

    rows: (steps, B, …), the i-th at [i // B, i % B], each device with its own part of every B
    (sharding.microbatch_sharding); what is beyond N means nothing. labels: int (N, …), on every
    host.
    """

    rows: jax.Array
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.rows.sharding.mesh

    @staticmethod
    def of(rows: np.ndarray, labels: np.ndarray, mesh, batch_size: int = 256) -> "Bank":
        """From arrays (N, …) that every host has. Raises UserError on rows that are not finite."""
        bad = ~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
        refuse_not_finite(int(bad.sum()), len(rows), "features")
        shards = sharding.batch_shards(mesh)
        batch_size = -(-batch_size // shards) * shards
        steps = bank_steps(len(rows), batch_size, mesh)
        padding = [(0, steps * batch_size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        padded = np.pad(rows, padding).reshape(steps, batch_size, *rows.shape[1:])
        return Bank(_split(padded, mesh), np.asarray(labels))

    def like(self, values: np.ndarray, fill) -> jax.Array:
        """Values (N,) laid as the rows are, (steps, B); `fill` stands beyond N."""
        shape = self.rows.shape[:2]
        padded = np.full(shape[0] * shape[1], fill, values.dtype)
        padded[: len(values)] = values
        return _split(padded.reshape(shape), self.mesh)

    def batches(self) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """(rows (B, …) on every device, labels of those of them that count), in order."""
        size = self.rows.shape[1]
        for step in range(-(-len(self) // size)):
            labels = self.labels[step * size : (step + 1) * size]
            yield _take(self.rows, step, sharding.replicated(self.mesh)), labels

    def gathered(self) -> np.ndarray:
        """All rows (N, …), on every host."""
        return np.concatenate([np.asarray(x)[: len(y)] for x, y in self.batches()])

    def select(self, indices: np.ndarray) -> "Bank":
        """The bank of the rows at `indices` (int, ascending), which go through every host; this one
        where they are all."""
        if len(indices) == len(self):
            return self
        size = self.rows.shape[1]
        steps, starts = np.unique(indices // size, return_index=True)
        rows = [
            np.asarray(_take(self.rows, step, sharding.replicated(self.mesh)))[chosen % size]
            for step, chosen in zip(steps, np.split(indices, starts[1:]), strict=True)
        ]
        return Bank.of(np.concatenate(rows), self.labels[indices], self.mesh)

    def local(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows (n, …), their indices (n,)) of what this process holds, about ROWS at a time. Every
        row of the bank is on one process."""
        steps, batch_size = self.rows.shape[:2]
        for shard in self.rows.addressable_shards:
            if shard.replica_id:
                continue
            columns = np.arange(batch_size)[shard.index[1]]
            _, size = groups(steps, len(columns))
            for start in range(0, steps, size):
                indices = np.arange(start, start + size)[:, None] * batch_size + columns
                counts = indices < len(self)
                yield np.asarray(shard.data[start : start + size])[counts], indices[counts]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the rows, float64 (…)."""
        count = len(self)
        sums = sum(x.sum(axis=0, dtype=np.float64) for x, _ in self.local())
        mean = sum_over_processes(sums) / count
        squares = sum(np.square(x - mean).sum(axis=0) for x, _ in self.local())
        return mean, np.sqrt(sum_over_processes(squares) / count)


def refuse_not_finite(count: int, of: int, what: str):
    """Raises UserError where `count` of so many examples are not finite: NaN would be an answer to
    argmax."""
    if count:
        raise UserError(
            f"{what} of {count} of {of} examples are not finite (NaN or Inf), and nothing is "
            f"measured: the weights are broken, or overflow in their dtype"
        )


def groups(steps: int, rows: int) -> tuple[int, int]:
    """(steps, steps a group): `steps` of `rows` rows on a device, made a multiple of the group, of
    about ROWS rows, by which the rows are gone through. Of the result it gives the same again."""
    largest = max(1, ROWS // rows)
    number = -(-steps // largest)
    size = -(-steps // number)
    return number * size, size


def bank_steps(length: int, batch_size: int, mesh) -> int:
    """Steps of a bank of so many rows."""
    return groups(-(-length // batch_size), batch_size // sharding.batch_shards(mesh))[0]


def scan_chunks(add: Callable, start, part, classes: int = 0):
    """jax.lax.scan of add(carry, chunk) over a device's part (steps, B, …) of arrays laid as a
    bank.

    A chunk (n, …) has about ROWS rows, or as few as keep the logits of `classes` below LOGITS.
    Steps are joined into a chunk inside the scan: joined outside, a bank whose B is no whole tile
    of the device's memory would be copied.
    """
    steps, batch_size = jax.tree.leaves(part)[0].shape[:2]
    _, size = groups(steps, batch_size)
    most = LOGITS // (classes * batch_size) if classes else size
    size = max(n for n in range(1, size + 1) if size % n == 0 and n <= max(1, most))
    grouped = jax.tree.map(lambda x: x.reshape(steps // size, size, *x.shape[1:]), part)

    def joined(carry, group):
        return add(carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), group))

    return jax.lax.scan(joined, start, grouped)


def sum_over_processes(value: np.ndarray) -> np.ndarray:
    """The sum of a float64 array of every process, the same on all."""
    if jax.process_count() == 1:
        return value
    # As pairs of uint32, because JAX would round float64; by blocks, because all are gathered.
    bits = np.ascontiguousarray(value, np.float64).reshape(-1).view(np.uint32)
    blocks = np.split(bits, range(GATHERED, len(bits), GATHERED))
    sums = [multihost_utils.process_allgather(x).view(np.float64).sum(axis=0) for x in blocks]
    return np.concatenate(sums).reshape(np.shape(value))


def _split(array: np.ndarray, mesh) -> jax.Array:
    return sharding.placed(array, sharding.microbatch_sharding(mesh))


@partial(jax.jit, static_argnums=2)
def _take(rows, step, where):
    return jax.lax.with_sharding_constraint(rows[step], where)


@partial(jax.jit, static_argnums=(1, 2))
def _zeros(found, steps, where):
    """What holds `steps` times what was found."""
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(jnp.zeros((steps, *x.shape), x.dtype), where),
        found,
    )


@partial(jax.jit, donate_argnums=0)
def _put(memory, found, step):
    return jax.tree.map(
        lambda m, x: jax.lax.dynamic_update_index_in_dim(m, x, step, 0), memory, found
    )


class Extractor:
    """(params, pictures, view) → {name: Bank}.

    `encode(params, pictures)` is jittable: uint8 (B, size, size, 3) to {name: (B, …)}; it is
    compiled once. `view` makes the picture of an image. `most`: only the first so many. Each
    process reads its own part of every batch. On a host are the labels and the batches on their
    way, on a device its part of the rows. Raises UserError on rows that are not finite, and on
    labels that are none.
    """

    def __init__(
        self,
        encode: Callable,
        mesh,
        *,
        batch_size: int,
        most: int | None = None,
        threads: int | None = None,
    ):
        self._mesh, self._batch_size, self._most = mesh, batch_size, most
        self._threads = threads
        self._rows = sharding.process_rows(mesh, batch_size)
        whole = sharding.replicated(mesh)

        def run(params, batch):
            found = encode(params, batch["image"])
            bad = jax.tree.map(lambda x: (~_finite(x) & batch["valid"]).sum(), found)
            return found, batch["label"], bad

        self._encode = jax.jit(run, out_shardings=(sharding.batch_sharding(mesh), whole, whole))

    def __call__(self, params, source: Pictures, view: Callable) -> dict[str, Bank]:
        def load(index):
            image, label = source.read(index)
            return {"image": view(image), "label": label}

        memory, labels, waiting = None, [], deque()
        length = min(len(source), self._most or len(source))
        batches = batching.eval_batches(
            load, length, self._batch_size, rows=self._rows, threads=self._threads
        )
        counts = None
        for step, local in enumerate(batches):
            if source.classes is not None:
                pipeline.check_labels(local["label"][local["valid"]], source, source.classes)
            batch = sharding.global_batch(self._mesh, self._batch_size, local)
            found, label, bad = self._encode(params, batch)
            if memory is None:
                memory = self._empty(found, length)
            memory = _put(memory, found, step)
            counts = bad if counts is None else jax.tree.map(jnp.add, counts, bad)
            waiting.append(label)
            if len(waiting) > 1:  # one step late, so that host and devices work side by side
                labels.append(np.asarray(waiting.popleft()))
        labels = np.concatenate([*labels, *map(np.asarray, waiting)])[:length]
        for name, count in counts.items():
            refuse_not_finite(int(count), length, f"{source}: {name} features")
        return {name: Bank(rows, labels) for name, rows in memory.items()}

    def _empty(self, found, length: int):
        steps = bank_steps(length, self._batch_size, self._mesh)
        return _zeros(found, steps, sharding.microbatch_sharding(self._mesh))


def _finite(rows):
    """bool (B,): whether all numbers of each row (B, …) are finite."""
    return jnp.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))


def centre_view(size: int, resize: int, squash: bool) -> Callable:
    """views.centre_crop for a model of `size` pixels. Raises UserError on a smaller `resize`."""
    if resize < size:
        raise UserError(
            f"pictures are resized to {resize} pixels, fewer than the {size} of the model: set "
            f"config.resize (config.evals.knn_resize in training) to {size} or more"
        )
    return partial(views.centre_crop, resize_to=resize, size=size, squash=squash)
