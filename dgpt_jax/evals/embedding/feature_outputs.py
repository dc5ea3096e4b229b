"""Interface of the outputs of an embedding, which are written a shard of the source at a time."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dgpt_jax.errors import UserError, one_line
from dgpt_jax.evals.embedding.feature_batches import Batch


@dataclass(frozen=True)
class Shard:
    """Shard `number` of the `count` of a split."""

    split: str
    number: int
    count: int


class Output(Protocol):
    """Files of one format in a directory."""

    def restore(self, sizes: Mapping[str, int]) -> set[str]:
        """Prepares a directory with files of interrupted commands. Returns the names of those to be
        written again.

        sizes: of each file after its last complete shard. Raises UserError if only all could be
        written again.
        """
        ...

    def write(self, shard: Shard, batches: Iterable[Batch]) -> dict[str, int]:
        """Writes a shard; returns the sizes of its files after it. Raises UserError."""
        ...

    def finish(self, rows: Mapping[str, int]) -> dict[str, int]:
        """Completes the files once all shards are written; returns their sizes. May be repeated.

        rows: number of rows of each split.
        """
        ...


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Context that turns errors of the disk into UserError."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or one_line(e)
        raise UserError(
            f"{path} cannot be written: {reason}; once that is fixed, the same command continues"
        ) from None


def damaged(directory: Path, sizes: Mapping[str, int]) -> set[str]:
    """Returns the names of files that are missing or have another size."""
    paths = {name: directory / name for name in sizes}
    return {n for n, p in paths.items() if not p.exists() or p.stat().st_size != sizes[n]}
