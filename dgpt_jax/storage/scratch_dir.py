"""A directory for what a process keeps on disk while it lives."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX, LOCK = "dgpt_jax_shards_", "lock"


def directory(parent: Path) -> Path:
    """A new one below `parent`, that this process holds locked. Removes those of processes that
    are gone: a killed one cannot do it itself."""
    parent.mkdir(parents=True, exist_ok=True)
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        try:
            with lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process lives, or belongs to somebody else
        shutil.rmtree(lock.parent, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    # Locked under another name first, or it would be taken for one that was left.
    held = os.open(made / f"{LOCK}.new", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    (made / f"{LOCK}.new").replace(made / LOCK)
    return made
