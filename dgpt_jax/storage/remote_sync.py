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
from dgpt_jax.schema import UserError

COPY_EVERY = 60  # seconds, at the least
# Bytes per second, on average: an object cannot grow, so a copy is of the whole file, and a million
# lines of metrics with their TensorBoard events are 1 GB.
COPY_RATE = 1e6


class Mirror:
    """A work directory's files but for checkpoints: `near` is where this process writes them.

    Near and far are the same where the work directory is on a local disk.
    """

    def __init__(self, workdir, names: tuple[str, ...] = ()):
        """`names`: of files that are to go on, and not to begin anew. Raises UserError."""
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
            gcs.get(self._far / name, self.near / name)

    def copy_sometimes(self):
        """Copies, if that was not done for a minute, or longer where the files are large."""
        if self._scratch and time.monotonic() > self._due:
            self.copy()

    def copy(self):
        """Copies what has changed. What cannot be copied is said, once, and is tried again."""
        if not self._scratch:
            return
        try:
            self._copy()
        except (UserError, OSError) as e:
            if not self._said:
                print(f"not copied, later again: {e}", file=sys.stderr)
            self._said = True

    def _copy(self):
        """Copies what has changed; then raises what the first file failed with."""
        copied, failed = 0, []
        self._due = time.monotonic() + COPY_EVERY
        for file in _files(self.near):
            state = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._copied.get(file) != state:
                try:
                    self._upload(file)
                except (UserError, OSError) as e:
                    failed.append(e)
                    continue
                self._copied[file] = state
                copied += state[1]
        self._due = time.monotonic() + max(COPY_EVERY, copied / COPY_RATE)
        if failed:
            raise failed[0]

    def _upload(self, file: Path):
        """As it is now: a thread of TensorBoard's may be writing on."""
        with tempfile.TemporaryDirectory() as scratch:
            still = Path(shutil.copyfile(file, Path(scratch) / file.name))
            gcs.put(still, self._far / file.relative_to(self.near))

    def close(self):
        """Copies for the last time. Where that fails the local files are kept, and a UserError
        names them; on the way out of another error it is printed, and that error stays."""
        if not self._scratch:
            return
        on_the_way_out = sys.exception() is not None
        try:
            with _deleted_when_copied(self._scratch, self._far):
                self._copy()
        except UserError as e:
            if not on_the_way_out:
                raise
            print(f"error: {e}", file=sys.stderr)


@contextlib.contextmanager
def written(directory) -> Iterator[Path]:
    """A context: a local directory to write into, whose files lie in `directory` afterwards.

    Raises UserError, and keeps the local files, where they cannot be copied there.
    """
    far = epath.Path(directory)
    if not shards.is_remote(directory):
        far.mkdir(parents=True, exist_ok=True)
        yield Path(directory)
        return
    scratch = tempfile.TemporaryDirectory()
    near = Path(scratch.name)
    try:
        yield near
    except BaseException:
        scratch.cleanup()
        raise
    with _deleted_when_copied(scratch, far):
        for file in _files(near):
            gcs.put(file, far / file.relative_to(near))


@contextlib.contextmanager
def _deleted_when_copied(scratch: tempfile.TemporaryDirectory, far: epath.Path) -> Iterator[None]:
    """A context that copies the files of `scratch` to `far`, and removes them at its end. Where it
    fails they are moved to a directory that stays, and a UserError names it; an interruption stays
    one, after the same line."""
    try:
        yield
    except BaseException as e:
        kept = f"{scratch.name}_not_copied"
        os.replace(scratch.name, kept)
        line = (
            f"{far}: not all files were copied there; they are kept in {kept}: copy them with "
            f"`gcloud storage cp -r {kept}/* {far}/` ({e or type(e).__name__})"
        )
        if isinstance(e, Exception):
            raise UserError(line) from e
        print(f"error: {line}", file=sys.stderr)
        raise
    scratch.cleanup()


def _files(directory: Path) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(directory) for name in names]
