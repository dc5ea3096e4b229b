"""What it takes to read from thousands of shards at once: files, and memory."""

import ctypes
import functools
import os
import resource
import threading
from collections.abc import Iterable
from typing import Protocol

from dgpt_jax.schema import UserError

# For what else a process opens: checkpoints, libraries, sockets.
SPARE = 200
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def allow(count: int, what):
    """Raises the limit of open files, where it is too low, to `count` more than are open now.

    Raises UserError where the hard limit forbids it; `what` needs them.
    """
    needed = len(os.listdir("/dev/fd")) + count + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{what} needs {needed} open files, and a process may have {hard} here: raise that "
            f"limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@functools.cache
def keep_memory():
    """Tells glibc's malloc to keep what is freed, up to a GiB, instead of handing it back.

    Records of some 100 kB come and go by the thousand; getting their pages anew from the kernel
    each time is a third of what reading costs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


@functools.cache
def return_memory():
    """Tells glibc's malloc to hand back what is freed, from 1 MiB on, instead of keeping it.

    Conversions hold few arrays at a time, of any size: left to itself it keeps those of up to 32 MB
    and a checkpoint's average takes 1.5 times its bytes more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


class Closable(Protocol):
    def close(self): ...


class TwoOpen:
    """Splits, the views of a store, of which the two that were begun last have open files.

    Two, because threads that read ahead are in the next view while others are in this one.
    """

    def __init__(self, splits: Iterable[Closable]):
        self.splits = tuple(splits)
        self._begun: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def begin(self, view: int):
        """The split of a view, to read from now; closes what was begun before the last one."""
        if view not in self._begun:
            with self._lock:
                if view not in self._begun:
                    for passed in self._begun[:-1]:
                        self.splits[passed].close()
                    self._begun = (*self._begun[-1:], view)
        return self.splits[view]

    def __reduce__(self):
        return TwoOpen, (self.splits,)
