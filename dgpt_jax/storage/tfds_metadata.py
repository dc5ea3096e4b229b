"""Metadata of TFDS directories in any file format: reading, and errors in them."""

import contextlib
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage.gcs import AnyPath


@contextlib.contextmanager
def errors(directory: AnyPath, split: str = "") -> Iterator[None]:
    """Context that turns TFDS's errors about its metadata into UserError."""
    try:
        yield
    except Exception as e:
        if "Requested slice" in str(e):  # TFDS's words
            raise UserError(
                f"{directory}{split}: {one_line(e)} Choose a slice that it has"
            ) from None
        raise UserError(
            f"{directory}{split}: dataset_info.json or features.json cannot be read: {one_line(e)}"
        ) from None


def open_any_builder(directory: AnyPath) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a directory in any file format. Raises UserError if it is no
    readable dataset."""
    path = epath.Path(directory)
    if not path.exists():
        raise UserError(f"no such directory: {directory}")
    if not (path / "dataset_info.json").exists():
        raise UserError(f"{directory} is not a TFDS dataset: it has no dataset_info.json")
    with errors(directory):
        return tfds.builder_from_directory(directory)
