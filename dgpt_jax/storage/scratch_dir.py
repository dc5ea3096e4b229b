"""Locked directories for the temporary files of a process."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX, LOCK = "dgpt_jax_shards_", "lock"


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
