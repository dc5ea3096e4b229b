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

from dgpt_jax import gcs, shards

COPY_EVERY = 60  # seconds, at the least
# Bytes per second, on average: an object cannot grow, so a copy is of the whole file, and a million
# lines of metrics with their TensorBoard events are 1 GB.
COPY_RATE = 1e6


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
                filesystem, path = gcs.filesystem(self._far / name)
                filesystem.get_file(path, str(self.near / name))

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
                    self._upload(file)
                    self._copied[file] = state
                    copied += state[1]
        except Exception as e:  # gcsfs and what lies below it raise various
            if not self._said:
                print(f"{self._far}: not copied there, later again: {e}", file=sys.stderr)
            self._said = True
        self._due = time.monotonic() + max(COPY_EVERY, copied / COPY_RATE)

    def _upload(self, file: Path):
        """As it is now: a thread of TensorBoard's may be writing on."""
        with tempfile.TemporaryDirectory() as scratch:
            still = Path(shutil.copyfile(file, Path(scratch) / file.name))
            _put(still, self._far / file.relative_to(self.near))

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
            _put(file, far / file.relative_to(scratch))


def _put(file: Path, far: epath.Path):
    """Copies in blocks; the object is there when all of them are."""
    filesystem, path = gcs.filesystem(far)
    filesystem.put_file(str(file), path)


def _files(directory: Path) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(directory) for name in names]
