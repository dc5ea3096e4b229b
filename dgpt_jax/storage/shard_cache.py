"""Shards of a store far away, whole on a local disk while they are read.

ArrayRecord asks for a far record by itself, one request each. So whole shards are fetched: ahead of
the reading where it is told what comes (`ShardCache.keep`), else when their first record is asked
for.
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
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource

from dgpt_jax import gcs, scratch, shards
from dgpt_jax.schema import UserError

FETCHERS = 8
CHUNK = 1 << 24
# gcsfs tries six times itself, where a server answers with an error that may pass.
TRIES = 4
FIRST_DELAY = 1.0  # seconds before the second try; then twice as long each time
STALLED = 120  # seconds after which a request for a chunk is given up
# Shards that stay, of those that nobody announced.
UNANNOUNCED = 4


@dataclass(frozen=True)
class Shard:
    """A far file, its bytes, and which of its records belong to the split: as TFDS's
    FileInstruction has it, so that array_record takes it for one."""

    filename: str
    bytes: int
    skip: int
    take: int
    examples_in_shard: int


class _Dropped(Exception):
    """What a fetch ends with when its shard is not wanted any more."""


@dataclass(eq=False)
class _Entry:
    """A shard that is here, or on its way; `task` gives its records."""

    shard: Shard
    path: Path
    task: Future | None = None
    dropped: bool = False


class ShardCache:
    """Fetched shards, in a directory of this process below `parent` (default: the system's for
    temporary files). It goes when the process ends; what a killed process left goes when another
    begins. Thread-safe."""

    def __init__(self, parent: str = ""):
        self.parent = parent or tempfile.gettempdir()
        self.fetched_bytes = 0
        self.waited_seconds = 0.0  # of all reading threads together
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._unannounced: list[str] = []
        self._stopped = False
        self._files = 0
        self._directory: Path | None = None
        self._pool: ThreadPoolExecutor | None = None

    def records(self, shard: Shard) -> Sequence[bytes]:
        """The records of a shard, as soon as it is here. Raises UserError where it cannot be had,
        and tries again when it is asked for again."""
        entry = self._entries.get(shard.filename)
        if entry is None or not entry.task.done():
            began = time.monotonic()
            entry = self._begun(shard)
            try:
                entry.task.exception()
            finally:
                with self._lock:
                    self.waited_seconds += time.monotonic() - began
        try:
            return entry.task.result()
        except (_Dropped, CancelledError):
            return self.records(shard)
        except BaseException:
            with self._lock:
                if self._entries.get(shard.filename) is entry:
                    del self._entries[shard.filename]
            raise

    def keep(self, wanted: Iterable[Shard]):
        """Fetches these in the background, in this order, and removes all that were kept before,
        but for a few that somebody reads without a word."""
        named = {shard.filename: shard for shard in wanted}
        with self._lock:
            self._stopped = False
            self._unannounced = [name for name in self._unannounced if name not in named]
            for name in self._entries.keys() - named.keys() - set(self._unannounced):
                self._drop(name)
            if named and self._pool is None:
                self._pool = ThreadPoolExecutor(FETCHERS, "fetch")
            for name, shard in named.items():
                if name not in self._entries:
                    entry = self._entry(shard)
                    entry.task = self._pool.submit(self._fetch, entry)
                    self._entries[name] = entry

    def stop(self):
        """Removes all shards, and fetches none until `keep` is called: threads that read ahead of
        what was wanted do not come to their end at once."""
        with self._lock:
            self._unannounced.clear()
            self.keep([])
            self._stopped = True

    def refuse_unless_it_fits(self, count: int, largest: int, why: str):
        """Raises UserError where the disk has no room for `count` shards that are kept."""
        needed = (count + UNANNOUNCED) * largest
        with self._lock:
            free = shutil.disk_usage(self._own_directory()).free
        if needed > free:
            raise UserError(
                f"{self.parent} has {free / 1e9:.1f} GB free, and shards that are fetched ahead "
                f"may need {needed / 1e9:.1f} GB there ({why}, up to {largest / 1e9:.2f} GB "
                f"each): choose a smaller config.data.window, fewer config.data.lanes or another "
                f"config.data.cache"
            )

    def files(self) -> list[Path]:
        """What lies in the directory now."""
        return (
            [p for p in self._directory.iterdir() if p.name != scratch.LOCK]
            if self._directory
            else []
        )

    def _begun(self, shard: Shard) -> _Entry:
        """The entry of a shard. If nobody has begun to fetch it, this thread does: it is not to
        wait behind shards that are needed later."""
        with self._lock:
            entry = self._entries.get(shard.filename)
            if entry is not None and not entry.task.cancel():
                return entry
            if self._stopped:
                raise InterruptedError(f"{shard.filename} is read after its batches were closed")
            if entry is None:
                self._unannounced.append(shard.filename)
                if len(self._unannounced) > UNANNOUNCED:
                    self._drop(self._unannounced.pop(0))
            entry = self._entry(shard)
            entry.task = Future()
            entry.task.set_running_or_notify_cancel()
            self._entries[shard.filename] = entry
        try:
            entry.task.set_result(self._fetch(entry))
        except BaseException as e:
            entry.task.set_exception(e)
        return entry

    def _entry(self, shard: Shard) -> _Entry:
        # The file's name is the entry's own: the same shard may be on its way out.
        self._files += 1
        name = f"{self._files:08d}.{os.path.basename(shard.filename)}"
        return _Entry(shard, self._own_directory() / name)

    def _drop(self, name: str):
        """Forgets a shard. Its file goes; who is reading from it reads on."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            entry.dropped = True
            entry.task.cancel()
            entry.path.unlink(missing_ok=True)

    def _fetch(self, entry: _Entry) -> Sequence[bytes]:
        partial = entry.path.with_name(f"{entry.path.name}.partial")
        try:
            with partial.open("wb") as file:
                for start in range(0, entry.shard.bytes, CHUNK):
                    file.write(self._chunk(entry, start, min(start + CHUNK, entry.shard.bytes)))
            with self._lock:
                if entry.dropped:
                    raise _Dropped
                partial.replace(entry.path)
            records = _open(entry)
        except BaseException:
            for path in (partial, entry.path):
                path.unlink(missing_ok=True)
            if entry.dropped:
                raise _Dropped from None
            raise
        return records

    def _chunk(self, entry: _Entry, start: int, stop: int) -> bytes:
        url = entry.shard.filename
        system, name = gcs.filesystem(url)
        options = {"timeout": STALLED} if system.async_impl else {}
        for attempt in range(TRIES):
            if entry.dropped:
                raise _Dropped
            if attempt:
                time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
            try:
                data = system.cat_file(name, start, stop, **options)
                if len(data) == stop - start:
                    with self._lock:
                        self.fetched_bytes += len(data)
                    return data
                error: Exception = OSError(f"{len(data)} bytes came instead of {stop - start}")
            except Exception as e:  # what a network may do comes in the words of many libraries
                error = e
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(f"{url} cannot be fetched (tried {TRIES} times): {reason}")

    def _own_directory(self) -> Path:
        if self._directory is None:
            try:
                self._directory = scratch.directory(Path(self.parent))
            except OSError as e:
                raise UserError(f"{self.parent} (config.data.cache) cannot be written: {e}") from e
            weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        return self._directory


def _open(entry: _Entry) -> Sequence[bytes]:
    """The records of a file that has been fetched. Raises UserError where it is not whole."""
    shard = entry.shard
    try:
        found = shards.count(entry.path)
    except UserError as e:
        raise UserError(f"{shard.filename}, fetched: {e}") from None
    if found != shard.examples_in_shard:
        raise UserError(
            f"{shard.filename} holds {found} records, the metadata say {shard.examples_in_shard}"
        )
    here = dataclasses.replace(shard, filename=os.fspath(entry.path))
    records = ArrayRecordDataSource([here])
    records[0]  # opens the file, so that it can be read when it has been dropped
    return records


class FarRecords:
    """Records of many shards by their index, through a cache."""

    def __init__(self, files: Sequence[Shard], cache: ShardCache):
        self._files, self._cache = files, cache
        self._ends = list(accumulate(shard.take for shard in files))

    def __getitem__(self, index: int) -> bytes:
        number = bisect_right(self._ends, index)
        shard = self._files[number]
        return self._cache.records(shard)[index - (self._ends[number] - shard.take)]
