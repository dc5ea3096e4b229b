"""Prefetching: order, depth, and cancellation of calls that have not begun."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgpt_jax.data.prefetch import map_ahead, prefetch


def test_items_arrive_in_order_and_depth_items_ahead():
    drawn = []
    items = prefetch((drawn.append(i) or i for i in range(5)), depth=2)
    assert [(item, len(drawn)) for item in items] == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]


@pytest.mark.parametrize("first", [0, 1])
def test_calls_that_have_not_begun_are_cancelled(first):
    """After an error (1 // 0) and after closing; the second call is running."""
    release, calls = threading.Event(), []

    def work(item):
        calls.append(item)
        if item == first + 1:
            release.wait(60)
        return 1 // item

    with ThreadPoolExecutor(1) as pool:
        results = map_ahead(pool, work, range(first, 9), depth=4)
        if first == 0:
            with pytest.raises(ZeroDivisionError):
                next(results)
        else:
            assert next(results) == (1, 1)
            results.close()
        release.set()
    assert len(calls) <= 2
