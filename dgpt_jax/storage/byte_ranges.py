"""Byte ranges of local files, and of remote ones through fsspec."""

import io
import os
from typing import Any

from dgpt_jax.storage import gcs

BLOCK = 4 << 20  # bytes of one request; headers of a tar are some 100 kB apart


class RangeReader:
    """A file for reads at any offset, as a context manager; for one thread.

    A remote file is read in blocks of BLOCK bytes, of which the last is kept. Raises OSError if a
    local file cannot be opened, UserError for a remote one.
    """

    def __init__(self, path: str | bytes):
        self.path = os.fsdecode(path)
        self._remote = gcs.is_remote(self.path)
        self._system: Any = None
        self._start, self._block = 0, b""
        if self._remote:
            gcs.require(self.path)
            with gcs.failures(self.path):
                self._system, self._name = gcs.filesystem(self.path)
                self.size = int(self._system.info(self._name)["size"])
        else:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
            self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *_):
        if not self._remote:
            self._file.close()

    def read_at(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` on, fewer at the end of the file."""
        if not self._remote:
            return os.pread(self._file.fileno(), size, offset)
        size = max(min(size, self.size - offset), 0)
        start = offset - self._start
        if not (start >= 0 and start + size <= len(self._block)):
            end = min(offset + max(size, BLOCK), self.size)
            with gcs.failures(self.path):
                self._block = self._system.cat_file(self._name, start=offset, end=end)
            self._start, start = offset, 0
        return self._block[start : start + size]


def read(path: str | bytes, offset: int = 0, size: int | None = None) -> bytes:
    """Returns `size` bytes of a file from `offset` on, or all after it. Raises OSError of a local
    file, UserError of a remote one."""
    name = os.fsdecode(path)
    if gcs.is_remote(name):
        gcs.require(name)
        with gcs.failures(name):
            system: Any
            system, key = gcs.filesystem(name)
            end = None if size is None else offset + size
            return system.cat_file(key, start=offset or None, end=end)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(-1 if size is None else size)


def exists(path: str | bytes) -> bool:
    """True if there is a local or remote file or directory. Raises UserError."""
    name = os.fsdecode(path)
    if not gcs.is_remote(name):
        return os.path.exists(path)
    gcs.require(name)
    with gcs.failures(name):
        system, key = gcs.filesystem(name)
        return system.exists(key)


def open_file(path: str | bytes) -> io.IOBase:
    """Opens a file for reading in any order; a remote one reads ahead, in blocks. Raises OSError,
    UserError."""
    name = os.fsdecode(path)
    if not gcs.is_remote(name):
        return open(path, "rb")
    gcs.require(name)
    with gcs.failures(name):
        system, key = gcs.filesystem(name)
        return system.open(key, "rb", block_size=BLOCK, cache_type="readahead")
