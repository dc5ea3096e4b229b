"""Batches of a remote store, whose shards are fetched before they are read."""

import itertools
from collections.abc import Generator, Sequence

import numpy as np

from dgpt_jax.data.samplers import ShardWindowSampler
from dgpt_jax.storage.tfds_dataset import Split


def fetch_shards_ahead(
    batches: Generator,
    splits: Sequence[Split],
    sampler: ShardWindowSampler,
    *,
    rows: np.ndarray,
    start_step: int,
) -> Generator:
    """Yields the batches; fetches the shards of the lanes' current and next windows ahead.

    rows: this process's rows (int) of a global batch. Raises UserError if the shards do not fit the
    cache.
    """
    lanes = sampler.lanes_of(rows)
    cache = splits[0].cache
    assert cache is not None
    files = [shard for split in splits for shard in split.shards]
    most = min(len(lanes) * sampler.max_shards_per_lane, len(files))
    largest = max(shard.bytes for shard in files)
    cache.refuse_unless_it_fits(most, largest, f"{most} shards of {len(lanes)} lanes")
    windows = None
    try:
        for step in itertools.count(start_step):
            if windows != (windows := sampler.current_windows(step, lanes)):
                cache.set_prefetch(
                    splits[e % len(splits)].shards[s] for e, s in sampler.shards_to_fetch(windows)
                )
            yield next(batches)
    finally:
        batches.close()
        cache.stop()
