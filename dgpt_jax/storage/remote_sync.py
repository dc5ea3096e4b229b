"""Work directories on gs://: files are written to a local disk and uploaded from time to time.

Objects cannot be appended to, so every upload is of a complete file. Checkpoints are not synced:
Orbax writes them to gs:// itself.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dgpt_jax.errors import UserError
from dgpt_jax.storage import gcs
from dgpt_jax.storage.gcs import AnyPath

MIN_INTERVAL = 60  # seconds between syncs
# Mean bytes per second at most: a million lines of metrics and their TensorBoard events are 1 GB,
# and all of it is uploaded each time.
MAX_RATE = 1e6


class RemoteSync:
    """Syncs a work directory's files, except checkpoints, from `local` to the work directory.

    For a work directory on a local disk `local` is that directory, and nothing is copied.
    """

    def __init__(self, workdir: AnyPath, names: tuple[str, ...] = ()):
        """Downloads the files `names`, which this process will append to. Raises UserError."""
        self._remote, self._scratch = epath.Path(workdir), None
        self._uploaded: dict[Path, tuple[int, int]] = {}  # (mtime, size) when last uploaded
        self._due = time.monotonic() + MIN_INTERVAL
        self._warned = False
        if not gcs.is_remote(workdir):
            self.local = Path(workdir)
            self.local.mkdir(parents=True, exist_ok=True)
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="dgpt_jax_run_")
        self.local = Path(self._scratch.name)
        for name in names:
            gcs.get(self._remote / name, self.local / name)

    def sync_if_due(self) -> None:
        """Syncs unless the last sync was less than a minute ago, or longer for large files."""
        if self._scratch and time.monotonic() > self._due:
            self.sync()

    def sync(self) -> None:
        """Uploads changed files. Warns at the first failure only; the next sync tries again."""
        if not self._scratch:
            return
        try:
            self._upload_changed()
        except (UserError, OSError) as e:
            if not self._warned:
                print(f"warning: not uploaded, will be tried again: {e}", file=sys.stderr)
            self._warned = True

    def _upload_changed(self) -> None:
        """Uploads all changed files, then raises the first error."""
        uploaded, errors = 0, []
        self._due = time.monotonic() + MIN_INTERVAL
        for file in _files(self.local):
            state = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._uploaded.get(file) != state:
                try:
                    self._upload(file)
                except (UserError, OSError) as e:
                    errors.append(e)
                    continue
                self._uploaded[file] = state
                uploaded += state[1]
        self._due = time.monotonic() + max(MIN_INTERVAL, uploaded / MAX_RATE)
        if errors:
            raise errors[0]

    def _upload(self, file: Path) -> None:
        """Uploads a snapshot of a file, since TensorBoard's thread may be writing to it."""
        with tempfile.TemporaryDirectory() as scratch:
            snapshot = Path(shutil.copyfile(file, Path(scratch) / file.name))
            gcs.put(snapshot, self._remote / file.relative_to(self.local))

    def close(self) -> None:
        """Syncs for the last time. If that fails, the local files are kept and a UserError names
        their directory; while another exception propagates, it is printed instead."""
        if not self._scratch:
            return
        propagating = sys.exception() is not None
        try:
            with _delete_if_uploaded(self._scratch, self._remote):
                self._upload_changed()
        except UserError as e:
            if not propagating:
                raise
            print(f"error: {e}", file=sys.stderr)


@contextlib.contextmanager
def output_directory(directory: AnyPath) -> Iterator[Path]:
    """Context that yields a local directory, whose files are in `directory` afterwards.

    Raises UserError, and keeps the local files, if they cannot be uploaded.
    """
    remote = epath.Path(directory)
    if not gcs.is_remote(directory):
        remote.mkdir(parents=True, exist_ok=True)
        yield Path(directory)
        return
    scratch = tempfile.TemporaryDirectory()
    local = Path(scratch.name)
    try:
        yield local
    except BaseException:
        scratch.cleanup()
        raise
    with _delete_if_uploaded(scratch, remote):
        for file in _files(local):
            gcs.put(file, remote / file.relative_to(local))


@contextlib.contextmanager
def _delete_if_uploaded(scratch: tempfile.TemporaryDirectory, remote: epath.Path) -> Iterator[None]:
    """Context for an upload of `scratch` to `remote`, after which `scratch` is deleted.

    If it fails, the files are moved to a permanent directory, which a UserError names; on
    KeyboardInterrupt the same line is printed.
    """
    try:
        yield
    except BaseException as e:
        saved = f"{scratch.name}_not_uploaded"
        os.replace(scratch.name, saved)
        line = (
            f"{remote}: not all files were uploaded; they are kept in {saved}: copy them with "
            f"`gcloud storage cp -r {saved}/* {remote}/` ({e or type(e).__name__})"
        )
        if isinstance(e, Exception):
            raise UserError(line) from e
        print(f"error: {line}", file=sys.stderr)
        raise
    scratch.cleanup()


def _files(directory: Path) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(directory) for name in names]
