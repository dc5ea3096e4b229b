"""Checks that results can be written, made before the work that produces them."""

import os
import secrets
import tempfile
from collections.abc import Collection
from pathlib import Path

from etils import epath

from dgpt_jax.errors import UserError
from dgpt_jax.storage import gcs
from dgpt_jax.storage.gcs import AnyPath


def file(path: AnyPath, suffixes: Collection[str] = ()) -> None:
    """Raises UserError unless a local or remote file can be written or replaced at `path`.

    Parent directories may be missing. suffixes: those allowed (".png"); none: any.
    """
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise UserError(f"{path}: the file's name must end in {' or '.join(sorted(suffixes))}")
    gcs.require(path)
    target = epath.Path(path)
    with gcs.failures(f"{path} cannot be written"):
        if target.is_dir():
            raise UserError(f"{path} is a directory: name a file in it")
        if not gcs.is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is not a regular file")
        _probe(target.parent, path)


def directory(path: AnyPath) -> None:
    """Raises UserError unless files can be written into a local or remote directory.

    It and its parents may be missing.
    """
    gcs.require(path)
    with gcs.failures(f"{path} cannot be written"):
        _probe(epath.Path(path), path)


def _probe(directory: epath.Path, path: AnyPath) -> None:
    """Creates and removes a file: permissions alone do not tell what a file system accepts."""
    if gcs.is_remote(directory):
        probe = directory / f".probe_{secrets.token_hex(8)}"
        probe.write_text("")
        probe.unlink()
        return
    absolute = Path(directory).absolute()
    existing = next(p for p in (absolute, *absolute.parents) if os.path.lexists(p))
    if not existing.is_dir():
        what = "a file" if existing.is_file() else "not a directory"
        raise UserError(f"{path} cannot be written: {existing} is {what}")
    tempfile.TemporaryFile(dir=existing).close()
