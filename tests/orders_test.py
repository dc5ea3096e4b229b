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


EQUAL = [[8] * 14 + [3]]


@pytest.mark.parametrize(
    "count, window, batch_size, lengths",
    [(4, 2, 8, LENGTHS), (4, 2, 64, LENGTHS), (2, 3, 2, EQUAL), (1, 1, 4, EQUAL), (2, 2, 4, EQUAL)],
)
def test_a_step_and_what_is_prefetched_read_only_what_is_ahead(count, window, batch_size, lengths):
    order = lanes(count, window, batch_size, lengths=lengths)
    starts = [np.cumsum([0, *view[:-1]]) for view in lengths]
    assert order.prefetch_steps >= orders.MIN_PREFETCH_STEPS
    for step in range(60):
        ahead = order.ahead(order.current(step, range(count)))
        assert len(ahead) <= count * order.most_shards
        stop = (step + 1 + order.prefetch_steps) * batch_size
        for position in range(step * batch_size, stop):
            epoch, index = order(position)
            view = starts[epoch % len(starts)]
            assert (epoch, int(np.searchsorted(view, index, side="right")) - 1) in ahead


@pytest.mark.parametrize("last, most", [(8192, 5), (64, 7)])
def test_shards_of_a_real_store(last, most):
    """A small last shard may stand between the parts of shards at the ends of two pieces."""
    order = lanes(16, 2, 4096, lengths=[[8192] * 1708 + [last]])
    assert order.most_shards == most
    assert order.prefetch_steps * 4096 > 50_000


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
