"""Free disk space, checked before the work that fills it."""

import shutil
from pathlib import Path

from dgpt_jax.errors import UserError
from dgpt_jax.storage import gcs
from dgpt_jax.storage.gcs import AnyPath


def free_bytes(path: AnyPath) -> int | None:
    """Returns the free bytes on the disk of a path that may not exist yet; None if remote."""
    if gcs.is_remote(path):
        return None
    path = Path(path).resolve()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def require(path: AnyPath, needed: int, remedy: str) -> None:
    """Raises UserError, which ends with `remedy`, if a local disk lacks `needed` bytes."""
    free = free_bytes(path)
    if free is not None and needed > free:
        raise UserError(f"{path} needs {size(needed)}, its disk has {size(free)} free: {remedy}")


def size(count: int) -> str:
    """Returns "1.23 GB" of a number of bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
