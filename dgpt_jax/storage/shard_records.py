"""Random access to the records of local shards, and the types that the shard cache has in common.

A split is a sequence of `Shard`; `open_shards` reads local ones, `shard_cache.RemoteRecords` remote
ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from array_record.python.array_record_data_source import ArrayRecordDataSource


@dataclass(frozen=True)
class Shard:
    """A file, its size, and the range of its records that belongs to a split.

    Fields are named as in TFDS's FileInstruction, so that array_record accepts it as one.
    """

    filename: str
    bytes: int
    skip: int
    take: int
    examples_in_shard: int


class Records(Protocol):
    """Random access to serialized examples."""

    def __getitem__(self, index: int, /) -> bytes: ...


def open_shards(shards: Sequence[Shard]) -> Records:
    """Returns the records of local shards; opens each file when it is first read."""
    return ArrayRecordDataSource(shards)  # pyright: ignore[reportArgumentType, reportReturnType]
