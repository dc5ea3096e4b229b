"""Locked directories for the temporary files of a process."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX, LOCK = "dgpt_jax_shards_", "lock"
# After a failed write the other threads of TensorStore go on for a moment, and create the
# directories they write to again. Removed means: absent for so long; given up after so long.
QUIET_S, PATIENCE_S = 0.3, 10.0


def create(parent: Path) -> Path:
    """Creates a directory below `parent` that this process keeps locked.

    Removes the directories of killed processes, whose locks are free.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        try:
            with lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process is alive, or belongs to another user
        shutil.rmtree(lock.parent, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    # Renamed once it is locked: another process would remove a directory with a free lock.
    descriptor = os.open(directory / f"{LOCK}.new", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    (directory / f"{LOCK}.new").replace(directory / LOCK)
    return directory


@contextlib.contextmanager
def removed(directory: Path) -> Iterator[None]:
    """Context that removes `directory` at its end, also while native threads still write there
    after an error."""
    try:
        yield
    except BaseException:
        _remove_repeatedly(directory)
        raise
    shutil.rmtree(directory, ignore_errors=True)


def _remove_repeatedly(directory: Path) -> None:
    start = absent_since = time.monotonic()
    while (now := time.monotonic()) - absent_since < QUIET_S and now - start < PATIENCE_S:
        if directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
            absent_since = time.monotonic()
        time.sleep(0.02)
