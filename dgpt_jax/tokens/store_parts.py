"""Finished token stores as sources of others: their records by id, without decoding them."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from dgpt_jax import invocation
from dgpt_jax.data import further_teachers, token_store
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.errors import BadRecord, UserError, bad_record, counted
from dgpt_jax.storage import record_stream, tfds_dataset
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.tokens.workers import Workers

KEY_BYTES = 16  # of a hash of an id: two of 10^9 are equal with a probability of 10^-20
KEY = np.dtype(f"S{KEY_BYTES}")


@dataclass(frozen=True)
class SourceStore:
    """A finished token store: `splits` are its views, `features` a FeaturesDict."""

    path: str
    info: StoreInfo
    splits: tuple[tfds_dataset.Split, ...]
    features: Any

    def __len__(self) -> int:
        return len(self.splits[0])

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes; None without labels."""
        label = self.splits[0].label
        return None if label is None else list(label.names)

    @property
    def shard_size(self) -> int:
        """Examples per shard, of all but the last."""
        return max(shard.take for shard in self.splits[0].shards)

    def identity(self) -> dict:
        """Returns JSON that identifies the contents: a digest per view, and the store's source."""
        views = [split.digest for split in self.splits]
        return {"examples": len(self), "views": views, "source": self.info.source}


@dataclass(frozen=True)
class Index:
    """What is read of the examples of a store, 28 bytes each: `keys` (n,) of their ids, `sizes`
    (n,) int32 of their records in bytes, `labels` (n,) int64, zeros without labels."""

    keys: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Part:
    """Examples of one store, at ascending `rows` (n,) int64, that go into another."""

    store: SourceStore
    index: Index
    rows: np.ndarray


def open_store(path: AnyPath) -> SourceStore:
    """Opens a finished token store. Raises UserError if it is unfinished, incomplete or damaged."""
    info = StoreInfo.load(path)
    token_store.require_finished(path)
    opened = tfds_dataset.Opened(path)
    token_store.check_features(path, opened.builder.info.features)
    info.teacher.load_codec(path)
    if others := further_teachers.names(path):
        raise UserError(
            f"{path} has the tokens of further teachers ({', '.join(others)}), which would be "
            f"left out: add them to the new stores instead, by `{invocation.command('tokens')} "
            f"--only=NAME`, from a copy of {path} without {further_teachers.DIRECTORY}/"
        )
    names = list(opened.builder.info.splits)
    if names != [token_store.view_split(view) for view in range(len(names))]:
        raise UserError(f"{path} has splits {', '.join(names)}, not those of views")
    splits = tuple(tfds_dataset.Split(path, name, opened) for name in names)
    for split in splits:
        if len(split) != len(splits[0]):
            raise UserError(
                f"{path}: {split.split} has {counted(len(split), 'example')}, {splits[0].split} "
                f"{len(splits[0])}: build the store again"
            )
    return SourceStore(str(path), info, splits, splits[0].features)


def key_of(example_id: bytes) -> bytes:
    """Returns KEY_BYTES that stand for an id; the last is not zero, since NumPy drops those."""
    digest = hashlib.blake2b(example_id, digest_size=KEY_BYTES).digest()
    return digest[:-1] + bytes([digest[-1] | 1])


def id_and_label(record: bytes) -> tuple[bytes, int]:
    """Returns the id and the label (0 without one) of a serialized example. Raises various
    exceptions if it has no id."""
    fields = tf_example_pb2.Example.FromString(record).features.feature  # pyright: ignore[reportAttributeAccessIssue]
    label = fields["label"].int64_list.value[0] if "label" in fields else 0
    return fields["id"].bytes_list.value[0], label


def records(store: SourceStore, view: int, rows: np.ndarray) -> Iterator[tuple[bytes, bytes, int]]:
    """Yields (record, id, label) of the examples `rows` of a view. Raises UserError."""
    split = store.splits[view]
    with damage_remedy(store):
        for row, record in zip(rows, record_stream.read(split, rows), strict=True):
            try:
                yield (record, *id_and_label(record))
            except (IndexError, ValueError) as e:  # no id, or no Example
                raise bad_record(split, int(row), "", f"no id: {type(e).__name__}") from None
            except Exception as e:
                if type(e).__name__ != "DecodeError":  # protobuf's
                    raise
                raise bad_record(split, int(row), "", e) from None


@contextlib.contextmanager
def damage_remedy(store: SourceStore) -> Iterator[None]:
    """Context that adds the remedy to the error about a damaged record."""
    try:
        yield
    except BadRecord as e:
        remedy = f"to write damaged shards again: {store.info.command} --check"
        raise UserError(f"{e}; {remedy}") from None


def read_index(store: SourceStore, workers: Workers) -> Index:
    """Reads view 0 once for the ids, labels and sizes of all records. Raises UserError."""
    bounds = record_stream.starts(store.splits[0])
    keys = np.empty(len(store), KEY)
    sizes, labels = np.empty(len(store), np.int32), np.empty(len(store), np.int64)

    def read(shard: tuple[int, int]) -> None:
        rows = np.arange(*shard, dtype=np.int64)
        examples = workers.until_stopped(records(store, 0, rows))
        for row, (record, name, label) in zip(rows, examples, strict=True):
            keys[row], sizes[row], labels[row] = key_of(name), len(record), label

    for _ in workers.each(read, itertools.pairwise(bounds.tolist())):
        pass
    return Index(keys, sizes, labels)


def names_of(store: SourceStore, rows: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the ids of a few examples, in ascending order of `rows`."""
    ascending = np.sort(np.asarray(rows, np.int64))
    return [name.decode() for _, name, _ in records(store, 0, ascending)]
