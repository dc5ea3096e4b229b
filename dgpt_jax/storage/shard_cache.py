"""Local cache of remote shards while they are read.

ArrayRecord sends one request per remote record. This cache downloads complete shards instead: in
advance those of `ShardCache.set_prefetch`, any other when its first record is read.
"""

import dataclasses
import os
import shutil
import tempfile
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, chunk_download, disk_space, scratch_dir
from dgpt_jax.storage.shard_records import Records, Shard, open_shards

DOWNLOADS = 8  # threads
CHUNK = 1 << 24
# Shards kept of those that are read without being in the prefetch list.
MAX_UNPLANNED = 4


class _Dropped(Exception):
    """Result of a download whose shard is no longer needed."""


@dataclass(eq=False)
class _Entry:
    """A shard that is cached or in flight; `task` returns its records."""

    shard: Shard
    path: Path
    task: Future = field(default_factory=Future)
    dropped: bool = False

    def raise_if_dropped(self) -> None:
        """Raises _Dropped if the shard is no longer needed."""
        if self.dropped:
            raise _Dropped


class ShardCache:
    """Cached shards, in a directory of this process below `parent` (default: the system's temporary
    directory). Thread-safe.

    The directory is removed when the process exits; that of a killed process, when the next cache
    is opened.
    """

    def __init__(self, parent: str = ""):
        self.parent = parent or tempfile.gettempdir()
        self.fetched_bytes = 0
        self.waited_seconds = 0.0  # sum over all reading threads
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._unplanned: list[str] = []
        self._stopped = False
        self._files = 0
        self._directory: Path | None = None
        self._pool = ThreadPoolExecutor(DOWNLOADS, "fetch")  # starts threads when needed

    def records(self, shard: Shard) -> Records:
        """Returns the records of a shard, after downloading it if necessary.

        Raises UserError if the download fails; the next call tries again.
        """
        entry = self._entries.get(shard.filename)
        if entry is None or not entry.task.done():
            start = time.monotonic()
            entry = self._fetch_now(shard)
            try:
                entry.task.exception()
            finally:
                with self._lock:
                    self.waited_seconds += time.monotonic() - start
        try:
            return entry.task.result()
        except (_Dropped, CancelledError):
            return self.records(shard)
        except BaseException:
            with self._lock:
                if self._entries.get(shard.filename) is entry:
                    del self._entries[shard.filename]
            raise

    def set_prefetch(self, shards: Iterable[Shard]) -> None:
        """Downloads these shards in the background, in this order, and removes all others but the
        most recent unplanned ones."""
        planned = {shard.filename: shard for shard in shards}
        with self._lock:
            self._stopped = False
            self._unplanned = [name for name in self._unplanned if name not in planned]
            for name in self._entries.keys() - planned.keys() - set(self._unplanned):
                self._drop(name)
            for name, shard in planned.items():
                if name not in self._entries:
                    self._entries[name] = entry = self._new_entry(shard)
                    entry.task = self._pool.submit(self._fetch, entry)

    def stop(self) -> None:
        """Removes all shards, and refuses downloads until the next `set_prefetch`: prefetching
        threads do not end at once."""
        with self._lock:
            self._unplanned.clear()
            self.set_prefetch([])
            self._stopped = True

    def refuse_unless_it_fits(self, count: int, largest: int, why: str) -> None:
        """Raises UserError if the disk lacks space for `count` shards of up to `largest` bytes."""
        with self._lock:
            directory = self._own_directory()
        remedy = (
            f"shards are prefetched to it ({why}, up to {disk_space.size(largest)} each): choose a "
            f"smaller config.data.window, fewer config.data.lanes or another config.data.cache"
        )
        disk_space.require(directory, (count + MAX_UNPLANNED) * largest, remedy)

    def files(self) -> list[Path]:
        """Returns the paths of cached and partial shards."""
        directory = self._directory
        return [p for p in directory.iterdir() if p.name != scratch_dir.LOCK] if directory else []

    def _fetch_now(self, shard: Shard) -> _Entry:
        """The entry of a shard. If its download has not started, this thread does it, rather than
        wait for shards that are needed later."""
        with self._lock:
            entry = self._entries.get(shard.filename)
            if entry is not None and not entry.task.cancel():
                return entry
            if self._stopped:
                raise InterruptedError(f"{shard.filename} is read after its batches were closed")
            if entry is None:
                self._unplanned.append(shard.filename)
                if len(self._unplanned) > MAX_UNPLANNED:
                    self._drop(self._unplanned.pop(0))
            self._entries[shard.filename] = entry = self._new_entry(shard)
            entry.task.set_running_or_notify_cancel()
        try:
            entry.task.set_result(self._fetch(entry))
        except BaseException as e:
            entry.task.set_exception(e)
        return entry

    def _new_entry(self, shard: Shard) -> _Entry:
        # A number makes the file name unique: an older download of the shard may still be running.
        self._files += 1
        name = f"{self._files:08d}.{os.path.basename(shard.filename)}"
        return _Entry(shard, self._own_directory() / name)

    def _drop(self, name: str) -> None:
        """Removes a shard and its file. Readers that have it open can continue."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            entry.dropped = True
            entry.task.cancel()
            entry.path.unlink(missing_ok=True)

    def _fetch(self, entry: _Entry) -> Records:
        partial = entry.path.with_name(f"{entry.path.name}.partial")
        try:
            with partial.open("wb") as file:
                for start in range(0, entry.shard.bytes, CHUNK):
                    file.write(self._chunk(entry, start, min(start + CHUNK, entry.shard.bytes)))
            with self._lock:
                entry.raise_if_dropped()
                partial.replace(entry.path)
            return _open(entry)
        except BaseException:
            for path in (partial, entry.path):
                path.unlink(missing_ok=True)
            if entry.dropped:
                raise _Dropped from None
            raise

    def _chunk(self, entry: _Entry, start: int, stop: int) -> bytes:
        data = chunk_download.read(entry.shard.filename, start, stop, entry.raise_if_dropped)
        with self._lock:
            self.fetched_bytes += len(data)
        return data

    def _own_directory(self) -> Path:
        if self._directory is None:
            try:
                self._directory = scratch_dir.create(Path(self.parent))
            except OSError as e:
                raise UserError(f"{self.parent} (config.data.cache) cannot be written: {e}") from e
            weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        return self._directory


def _open(entry: _Entry) -> Records:
    """Records of a downloaded file. Raises UserError if it is incomplete."""
    shard = entry.shard
    try:
        records = array_record_shards.count(entry.path)
    except UserError as e:
        raise UserError(f"{shard.filename}, fetched: {e}") from None
    if records != shard.examples_in_shard:
        raise UserError(
            f"{shard.filename} has {records} records, the metadata say {shard.examples_in_shard}"
        )
    local = dataclasses.replace(shard, filename=os.fspath(entry.path))
    source = open_shards([local])
    source[0]  # opens the file, so that it can be read after it is removed
    return source


class RemoteRecords:
    """Records of consecutive remote shards by index, read through a cache."""

    def __init__(self, shards: Sequence[Shard], cache: ShardCache):
        self._shards, self._cache = shards, cache
        self._ends = list(accumulate(shard.take for shard in shards))

    def __getitem__(self, index: int) -> bytes:
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        return self._cache.records(shard)[index - (self._ends[number] - shard.take)]
