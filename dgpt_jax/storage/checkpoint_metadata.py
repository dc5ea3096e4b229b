"""Metadata of checkpoints: their format, and checksums of the arrays and of the metadata."""

import sys
from collections.abc import Callable
from typing import Any

from dgpt_jax.config import renamed_keys
from dgpt_jax.errors import UserError
from dgpt_jax.storage import checksums
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.storage.orbax_errors import REMEDY

# 1: before non-finite updates were skipped, with another optimizer state. 3: with a moving average
# of the parameters in the optimizer state, which is evaluated; without one 2 is written.
FORMAT, OLDEST = 3, 2


def with_checksums(metadata: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns metadata with the checksums of {"params": tree, "opt_state": tree} and its own."""
    content = metadata | {"checksums": checksums.of_tree(arrays)}
    return content | {"checksum": checksums.of_json(content)}


def check(metadata: dict[str, Any], path: AnyPath) -> dict[str, Any]:
    """Returns the metadata of the checkpoint `path`, with today's config keys.

    Raises UserError if they were saved by later code, or changed since they were saved.
    """
    if metadata["format"] > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {metadata['format']}, this code reads {FORMAT}"
        )
    content = {name: value for name, value in metadata.items() if name != "checksum"}
    if "checksum" in metadata and checksums.of_json(content) != metadata["checksum"]:
        raise UserError(f"{path} is damaged: its metadata differ from those saved. {REMEDY}")
    if "config" in metadata:
        metadata = metadata | {"config": renamed_keys.translate(metadata["config"])}
    return metadata


def verify_arrays(
    sums: dict[str, str],
    metadata: dict[str, Any],
    path: AnyPath,
    is_requested: Callable[[str], bool] = lambda name: True,
) -> None:
    """Compares checksums of arrays that were read with those in a checkpoint's metadata.

    is_requested: True for the names of arrays that were to be read. Raises UserError if an array is
    missing or differs. Prints a line if there are no checksums (older code wrote none).
    """
    if "checksums" not in metadata:
        print(f"{path} has no checksums: its arrays are not checked", file=sys.stderr)
        return
    saved = {name: value for name, value in metadata["checksums"].items() if is_requested(name)}
    if missing := sorted(saved.keys() - sums.keys()):
        raise UserError(f"{path} is damaged: {missing[0]} is missing. {REMEDY}")
    for name, value in sums.items():
        if saved.get(name) != value:
            raise UserError(f"{path} is damaged: {name} differs from the saved array. {REMEDY}")
