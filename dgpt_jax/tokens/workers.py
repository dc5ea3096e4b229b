"""Threads that stop soon after an error, Ctrl-C or SIGTERM."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dgpt_jax.data.prefetch import map_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A context manager of `threads` threads; when it is left by an exception, they stop at their
    next `until_stopped`."""

    def __init__(self, threads: int):
        self._threads = threads
        self.pool = ThreadPoolExecutor(threads)
        self._stop = threading.Event()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        self.pool.shutdown(cancel_futures=kind is not None)

    def each(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Yields (item, function(item)) in order; raises the first error."""
        results = map_ahead(self.pool, function, items, self._threads)
        with contextlib.closing(results):
            yield from results

    def until_stopped(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items. Raises InterruptedError once the threads are to stop."""
        for item in items:
            if self._stop.is_set():
                raise InterruptedError("another thread failed, or the command was stopped")
            yield item
