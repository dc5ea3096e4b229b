"""Work directories on gs://, whose objects cannot grow: files are written on a local disk, and
copied there whole. Checkpoints take another way: Orbax writes them there itself."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dgpt_jax import shards

COPY_EVERY = 60  # seconds, at the least
# Bytes per second, on average: an object cannot grow, so a copy is of the whole file, and a million
# lines of metrics with their TensorBoard events are 1 GB.
COPY_RATE = 1e6
BLOCK = 16 << 20  # bytes of a file that are in memory while it is copied


class Mirror:
    """A work directory's files but for checkpoints: `near` is where this process writes them.

    Near and far are the same where the work directory is on a local disk.
    """

    def __init__(self, workdir, names: tuple[str, ...] = ()):
        """`names`: of files that are to go on, and not to begin anew."""
        self._far, self._scratch = epath.Path(workdir), None
        self._copied: dict[Path, tuple[int, int]] = {}
        self._due = time.monotonic() + COPY_EVERY
        self._said = False
        if not shards.is_remote(workdir):
            self.near = Path(workdir)
            self.near.mkdir(parents=True, exist_ok=True)
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="dgpt_jax_run_")
        self.near = Path(self._scratch.name)
        for name in names:
            if (self._far / name).exists():
                _copy(self._far / name, self.near / name)

    def copy_sometimes(self):
        """Copies, if that was not done for a minute, or longer where the files are large."""
        if self._scratch and time.monotonic() > self._due:
            self.copy()

    def copy(self):
        """Copies what has changed. What cannot be copied now is said, once, and is tried again."""
        if not self._scratch:
            return
        copied = 0
        try:
            for file in _files(self.near):
                state = (file.stat().st_mtime_ns, file.stat().st_size)
                if self._copied.get(file) != state:
                    _copy(file, self._far / file.relative_to(self.near))
                    self._copied[file] = state
                    copied += state[1]
        except Exception as e:  # gcsfs and what lies below it raise various
            if not self._said:
                print(f"{self._far}: not copied there, later again: {e}", file=sys.stderr)
            self._said = True
        self._due = time.monotonic() + max(COPY_EVERY, copied / COPY_RATE)

    def close(self):
        """Copies for the last time."""
        self.copy()
        if self._scratch:
            self._scratch.cleanup()


@contextlib.contextmanager
def written(directory) -> Iterator[Path]:
    """A context: a local directory to write into, whose files lie in `directory` afterwards."""
    far = epath.Path(directory)
    if not shards.is_remote(directory):
        far.mkdir(parents=True, exist_ok=True)
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for file in _files(Path(scratch)):
            _copy(file, far / file.relative_to(scratch))


def _copy(source, target):
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, BLOCK)


def _files(directory: Path) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(directory) for name in names]
