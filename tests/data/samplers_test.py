"""Sampling of remote shards: every example once per epoch, shards announced ahead."""

import numpy as np
import pytest

from dgpt_jax.data import samplers
from dgpt_jax.errors import UserError

LENGTHS = ([5, 9, 1, 7, 3, 8, 2, 6, 4, 10], [11, 11, 11, 11, 11])  # of two views, 55 examples


def lane_sampler(lanes=4, window=2, batch_size=8, seed=3, lengths=LENGTHS):
    return samplers.ShardWindowSampler(lengths, batch_size, lanes, window, seed)


@pytest.mark.parametrize("count,window,batch_size", [(4, 2, 8), (1, 3, 6), (8, 1, 8), (2, 50, 2)])
def test_an_epoch_uses_every_example_once(count, window, batch_size):
    sampler = lane_sampler(count, window, batch_size)
    indices: dict[int, list[int]] = {}
    for position in range(3 * 55):
        epoch, index = sampler(position)
        indices.setdefault(epoch, []).append(index)
    for epoch in (0, 1):
        assert len(set(indices[epoch])) == len(indices[epoch]) == 55 // count * count
        assert min(indices[epoch]) >= 0 and max(indices[epoch]) < 55
    assert indices[0] != indices[1]


def test_shuffling_depends_on_the_seed():
    indices = [lane_sampler(1, 5)(p)[1] for p in range(55)]
    assert indices != [lane_sampler(1, 5, seed=4)(p)[1] for p in range(55)]
    steps = np.diff(indices)
    assert (steps == 1).mean() < 0.3  # within shards neighbours do not follow each other


EQUAL = [[8] * 14 + [3]]


@pytest.mark.parametrize(
    "count, window, batch_size, lengths",
    [(4, 2, 8, LENGTHS), (4, 2, 64, LENGTHS), (2, 3, 2, EQUAL), (1, 1, 4, EQUAL), (2, 2, 4, EQUAL)],
)
def test_shards_to_fetch_cover_prefetched_steps(count, window, batch_size, lengths):
    sampler = lane_sampler(count, window, batch_size, lengths=lengths)
    starts = [np.cumsum([0, *view[:-1]]) for view in lengths]
    assert sampler.prefetch_steps >= samplers.MIN_PREFETCH_STEPS
    for step in range(60):
        ahead = sampler.shards_to_fetch(sampler.current_windows(step, range(count)))
        assert len(ahead) <= count * sampler.max_shards_per_lane
        stop = (step + 1 + sampler.prefetch_steps) * batch_size
        for position in range(step * batch_size, stop):
            epoch, index = sampler(position)
            view = starts[epoch % len(starts)]
            assert (epoch, int(np.searchsorted(view, index, side="right")) - 1) in ahead


@pytest.mark.parametrize("last, max_shards", [(8192, 5), (64, 7)])
def test_shard_bound_of_a_real_store(last, max_shards):
    """A small last shard may be between the partial shards at the ends of two lanes."""
    sampler = lane_sampler(16, 2, 4096, lengths=[[8192] * 1708 + [last]])
    assert sampler.max_shards_per_lane == max_shards
    assert sampler.prefetch_steps * 4096 > 50_000


def test_lanes_of_rows():
    sampler = lane_sampler()
    assert sampler.lanes_of([0, 1, 5]) == [0, 2]
    assert sampler.lanes_of(range(8)) == [0, 1, 2, 3]


def test_random_access_is_fast():
    lengths = [[8192] * 1708 + [8064]]
    sampler = lane_sampler(16, 2, 4096, lengths=lengths)
    for row in range(0, 4096, 128):
        epoch, index = sampler(1_000_000 * 4096 + row)
        assert epoch == 292 and 0 <= index < 14_000_000


def test_more_lanes_than_examples():
    with pytest.raises(UserError, match="config.data.lanes=64"):
        lane_sampler(64, batch_size=64)
