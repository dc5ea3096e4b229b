"""Prefetching: items are started ahead of their consumer and arrive in order."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    items: Iterable[Item], depth: int, discard: Callable[[Item], object] = lambda _: None
) -> Generator[Item, None, None]:
    """Yields items in order, each after `depth` further ones have been drawn from the iterable.

    `discard` is called on drawn items that are never yielded, because the consumer stopped or the
    iterable raised.
    """
    queue: deque[Item] = deque()
    try:
        for item in items:
            queue.append(item)
            if len(queue) > depth:
                yield queue.popleft()
        while queue:
            yield queue.popleft()
    finally:
        for item in queue:
            discard(item)


def map_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Generator[tuple[Item, Result], None, None]:
    """Yields (item, function(item)) in order, computed by the pool `depth` items ahead.

    Calls that have not begun are cancelled when the iterator is closed or raises.
    """
    futures = ((item, pool.submit(function, item)) for item in items)
    ahead = prefetch(futures, depth, discard=lambda pair: pair[1].cancel())
    with contextlib.closing(ahead):
        for item, future in ahead:
            yield item, future.result()
