"""Where results are written: looked at before the work that they come from."""

import os
import secrets
import tempfile
from pathlib import Path

from etils import epath

from dgpt_jax import gcs, shards
from dgpt_jax.schema import UserError


def file(path, suffixes=()):
    """Sees to it that a file can be written at a path, near or far, a new one or in place of one
    that is there; directories that are missing above it are no fault.

    suffixes: ".png", …, one of which must end the name; none: any may. Raises UserError.
    """
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise UserError(f"{path}: the file's name must end in {' or '.join(sorted(suffixes))}")
    gcs.require(path)
    place = epath.Path(path)
    with gcs.failures(f"{path} cannot be written"):
        if place.is_dir():
            raise UserError(f"{path} is a directory: name a file in it")
        if not shards.is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is no regular file")
        _probe(place.parent, path)


def directory(path):
    """Sees to it that files can be written into a directory, near or far, which may be missing and
    others above it too. Raises UserError."""
    gcs.require(path)
    with gcs.failures(f"{path} cannot be written"):
        _probe(epath.Path(path), path)


def _probe(directory: epath.Path, path):
    """Makes a file and removes it: permissions do not tell what a file system takes."""
    if shards.is_remote(directory):
        probe = directory / f".probe_{secrets.token_hex(8)}"
        probe.write_text("")
        probe.unlink()
        return
    directory = Path(directory).absolute()
    near = next(p for p in (directory, *directory.parents) if os.path.lexists(p))
    if not near.is_dir():
        what = "a file" if near.is_file() else "no directory"
        raise UserError(f"{path} cannot be written: {near} is {what}")
    tempfile.TemporaryFile(dir=near).close()
