"""Serialized examples of a split in order, with one open shard at a time.

Random access, as in training, keeps every shard open; copying a store does not need that.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dgpt_jax.errors import bad_record
from dgpt_jax.storage import shard_cache, tfds_dataset

BLOCK_BYTES = 1 << 25  # read at once
MAX_BLOCK = 1024  # records


def starts(split: tfds_dataset.Split) -> np.ndarray:
    """Returns the index of the first example of each shard, and the number of examples: (n + 1,)
    int64."""
    return np.cumsum([0, *(shard.take for shard in split.shards)], dtype=np.int64)


def read(split: tfds_dataset.Split, indices: np.ndarray) -> Iterator[bytes]:
    """Yields the serialized examples at ascending `indices`, (n,) int64.

    Holds at most BLOCK_BYTES of them, or one. A remote shard is fetched as a whole. Thread-safe.
    Raises BadRecord.
    """
    bounds = starts(split)
    cuts = np.searchsorted(indices, bounds)
    for shard, start, first, stop in zip(split.shards, bounds, cuts, cuts[1:], strict=False):
        if first < stop:
            yield from _read_shard(split, shard, int(start), indices[first:stop] - start)


def _read_shard(
    split: tfds_dataset.Split, shard: shard_cache.Shard, start: int, offsets: np.ndarray
) -> Iterator[bytes]:
    """Yields the records at `offsets` of a shard, whose first example is number `start`."""
    mean = max(shard.bytes // max(shard.examples_in_shard, 1), 1)
    block = min(max(BLOCK_BYTES // mean, 1), MAX_BLOCK)
    with contextlib.ExitStack() as stack:
        records: Any  # array_record's data source, which is more than shard_cache.Records
        if split.cache is None:
            records = stack.enter_context(shard_cache.open_shards([shard]))  # pyright: ignore
        else:  # a cache of its own: threads do not drop each other's shards
            cache = shard_cache.ShardCache(split.cache.parent)
            stack.callback(cache.stop)
            records = cache.records(shard)
        for i in range(0, len(offsets), block):
            rows = offsets[i : i + block].tolist()
            try:
                values = records.__getitems__(rows)
            except RuntimeError:  # from ArrayRecord: wrong hash of a chunk
                values = [_read_one(split, records, start, row) for row in rows]
            yield from values


def _read_one(
    split: tfds_dataset.Split, records: shard_cache.Records, start: int, row: int
) -> bytes:
    try:
        return records[row]
    except RuntimeError as e:
        raise bad_record(split, start + row, "", e) from None
