"""Process limits for reading from thousands of shards: open files and malloc."""

import ctypes
import functools
import os
import resource
import threading
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from dgpt_jax.errors import UserError

# File descriptors for everything else: checkpoints, libraries, sockets.
SPARE = 200
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def raise_fd_limit(count: int, what: object) -> None:
    """Raises the soft limit of open files, if necessary, to `count` more than are open now.

    what: the object that needs them, for the message. Raises UserError if the hard limit is lower.
    """
    needed = len(os.listdir("/dev/fd")) + count + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{what} needs {needed} open files, the hard limit is {hard}: raise it (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@functools.cache
def tune_malloc() -> None:
    """Makes glibc's malloc keep up to 1 GiB of freed memory instead of returning it.

    Thousands of records of some 100 kB are allocated and freed; fetching their pages from the
    kernel each time takes a third of the time of reading.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


@functools.cache
def trim_malloc() -> None:
    """Makes glibc's malloc return freed blocks of 1 MiB or more at once.

    Conversions hold few arrays at a time, of any size. By default malloc keeps freed blocks of up
    to 32 MB, and averaging checkpoints takes 1.5 times their bytes more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


class Closable(Protocol):
    def close(self) -> None: ...


S = TypeVar("S", bound=Closable)


class RecentSplits(Generic[S]):
    """Splits (views of a token store) of which only the last two activated have open files.

    Two, because prefetching threads may be in the next view while others are still in this one.
    """

    def __init__(self, splits: Iterable[S]):
        self.splits = tuple(splits)
        self._active: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def activate(self, view: int) -> S:
        """Returns the split of a view, after closing all but the previously activated one."""
        if view not in self._active:
            with self._lock:
                if view not in self._active:
                    for old in self._active[:-1]:
                        self.splits[old].close()
                    self._active = (*self._active[-1:], view)
        return self.splits[view]

    def __reduce__(self):
        return RecentSplits, (self.splits,)
