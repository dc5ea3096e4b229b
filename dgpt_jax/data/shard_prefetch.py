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
    files = [f for split in splits for i in range(len(split.shards)) for f in split.files_of(i)]
    per_shard = len(splits[0].files_of(0))
    most = min(len(lanes) * sampler.max_shards_per_lane * per_shard, len(files))
    largest = max(shard.bytes for shard in files)
    cache.refuse_unless_it_fits(most, largest, f"{most} shards of {len(lanes)} lanes")
    windows = None
    try:
        for step in itertools.count(start_step):
            if windows != (windows := sampler.current_windows(step, lanes)):
                cache.set_prefetch(
                    file
                    for epoch, shard in sampler.shards_to_fetch(windows)
                    for file in splits[epoch % len(splits)].files_of(shard)
                )
            yield next(batches)
    finally:
        batches.close()
        cache.stop()
