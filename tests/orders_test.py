"""The order of far examples: every example once an epoch, and known ahead by whole shards."""

import time

import numpy as np
import pytest

from dgpt_jax import orders
from dgpt_jax.schema import UserError

LENGTHS = ([5, 9, 1, 7, 3, 8, 2, 6, 4, 10], [11, 11, 11, 11, 11])  # of two views, 55 examples


def lanes(lanes=4, window=2, batch_size=8, seed=3, lengths=LENGTHS):
    return orders.Lanes(lengths, batch_size, lanes, window, seed)


@pytest.mark.parametrize("count,window,batch_size", [(4, 2, 8), (1, 3, 6), (8, 1, 8), (2, 50, 2)])
def test_an_epoch_uses_every_example_once(count, window, batch_size):
    order = lanes(count, window, batch_size)
    seen: dict[int, list[int]] = {}
    for position in range(3 * 55):
        epoch, index = order(position)
        seen.setdefault(epoch, []).append(index)
    for epoch in (0, 1):
        assert len(set(seen[epoch])) == len(seen[epoch]) == 55 // count * count
        assert min(seen[epoch]) >= 0 and max(seen[epoch]) < 55
    assert seen[0] != seen[1]


def test_the_seed_and_the_windows_shuffle():
    order = [lanes(1, 5)(p)[1] for p in range(55)]
    assert order != [lanes(1, 5, seed=4)(p)[1] for p in range(55)]
    steps = np.diff(order)
    assert (steps == 1).mean() < 0.3  # within shards neighbours do not follow each other


def test_a_step_reads_only_what_is_ahead_of_it():
    order, starts = lanes(), [np.cumsum([0, *view[:-1]]) for view in LENGTHS]
    for step in range(30):
        current = order.current(step, range(4))
        ahead = order.ahead(current)
        assert len(ahead) <= 4 * order.most_shards
        for position in range(step * 8, step * 8 + 8):
            epoch, index = order(position)
            shard = int(np.searchsorted(starts[epoch % 2], index, side="right")) - 1
            assert (epoch, shard) in ahead


def test_lanes_belong_to_rows():
    order = lanes()
    assert order.lanes_of([0, 1, 5]) == [0, 2]
    assert order.lanes_of(range(8)) == [0, 1, 2, 3]


def test_a_seek_costs_a_window():
    lengths = [[8192] * 1708 + [8064]]
    order = lanes(16, 2, 4096, lengths=lengths)
    began = time.monotonic()
    for row in range(0, 4096, 128):
        epoch, index = order(1_000_000 * 4096 + row)
        assert epoch == 292 and 0 <= index < 14_000_000
    assert time.monotonic() - began < 0.5


def test_more_lanes_than_examples():
    with pytest.raises(UserError, match=r"lanes is 64.*fewer examples"):
        lanes(64, batch_size=64)
