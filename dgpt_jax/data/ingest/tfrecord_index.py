"""Records of a TFDS dataset that is stored as TFRecord, without TensorFlow.

TFDS's own converter to ArrayRecord needs Apache Beam, which cannot be installed beside this
package's protobuf and Pillow. The framing is small: a little-endian length (8 bytes), its masked
CRC32C (4), the data, their masked CRC32C (4). TFDS itself parses the data.
"""

import functools
import hashlib
import os
import posixpath
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dgpt_jax.data.image_ops import UnreadableImage
from dgpt_jax.data.ingest.image_index import text
from dgpt_jax.data.ingest.types import Columns, as_text
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import byte_ranges, tfds_metadata
from dgpt_jax.storage.byte_ranges import RangeReader

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
THREADS = 8


@dataclass(frozen=True)
class _Schema:
    """Features to parse, and which of them are the image, label and id; None if there is none."""

    features: Any
    image: str
    label: str | None
    id: str | None
    keep: tuple[str, ...]


@dataclass(frozen=True)
class RecordEntry:
    """One record: `size` bytes of data from `offset` on. The id is the feature `id` or `file_name`,
    else FILE:RECORD."""

    file: bytes
    number: int
    offset: int
    size: int
    schema: _Schema

    @functools.cached_property
    def _example(self) -> Mapping:
        data = byte_ranges.read(self.file, self.offset, self.size + FOOTER.size)
        where = f"{text(self.file)}, record {self.number}"
        if len(data) < self.size + FOOTER.size or _masked_crc32c(
            data[: self.size]
        ) != FOOTER.unpack_from(data, self.size):
            raise UserError(f"{where} is damaged: its CRC32C differs; copy or download it again")
        try:
            return self.schema.features.deserialize_example_np(
                data[: self.size], decoders={self.schema.image: tfds.decode.SkipDecoding()}
            )
        except Exception as e:  # from TFDS, protobuf or NumPy
            raise UserError(f"{where} does not match features.json: {one_line(e)}") from None

    @property
    def id(self) -> str:
        if self.schema.id is None:
            return f"{text(posixpath.basename(self.file))}:{self.number}"
        return _decoded(self._example[self.schema.id])

    @property
    def label(self) -> int:
        return int(self._example[self.schema.label]) if self.schema.label else -1

    def read(self) -> bytes:
        image = self._example[self.schema.image]
        if not image:
            raise UnreadableImage("the record has no bytes of an image")
        return image

    def texts(self) -> Mapping[str, str]:
        return {name: as_text(_decoded(self._example[name])) for name in self.schema.keep}


@dataclass(frozen=True)
class Records:
    """Records of one split. file: index into `files`, per record. number: of the record in it."""

    files: Sequence[bytes]
    schema: _Schema
    file: np.ndarray
    number: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    @property
    def num_bytes(self) -> int:
        return int(self.size.sum())

    def __len__(self) -> int:
        return len(self.file)

    def __iter__(self) -> Iterator[RecordEntry]:
        rows = zip(self.file, self.number, self.offset, self.size, strict=True)
        for file, number, offset, size in rows:
            yield RecordEntry(self.files[file], int(number), int(offset), int(size), self.schema)

    def take(self, rows: slice) -> "Records":
        names = ("file", "number", "offset", "size")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def update_digest(self, state: "hashlib._Hash") -> None:
        state.update(f"{[os.path.basename(file) for file in self.files]}".encode())
        state.update(f"{self.schema.image} {self.schema.label} {self.schema.id}".encode())
        for column in (self.file, self.offset, self.size):
            state.update(np.ascontiguousarray(column).data)


def open_records(files: Sequence[bytes], columns: Columns) -> tuple[dict[str, Records], list[str]]:
    """Returns the records of each split of the dataset that has `files`, and the class names.

    Raises UserError if the files have no metadata or are not all those that these name, if one is
    damaged or cut off, if a feature is missing, or if google-crc32c is not installed.
    """
    folders = list(dict.fromkeys(map(posixpath.dirname, files)))
    if len(folders) > 1:
        raise UserError(
            f"TFRecord files are in several folders, {', '.join(map(text, folders))}: import one"
        )
    _crc32c()
    builder = tfds_metadata.open_any_builder(text(folders[0]))
    schema = _choose(builder.info.features, text(folders[0]), columns)
    splits = {
        name: _index([os.fsencode(path) for path in info.filepaths], info.shard_lengths, schema)
        for name, info in builder.info.splits.items()
    }
    label = schema.features[schema.label] if schema.label else None
    return splits, list(label.names) if label is not None else []


def _choose(features: Any, folder: str, columns: Columns) -> _Schema:
    """Returns the features that `columns` asks for. Raises UserError."""
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    chosen: dict[str, str | None] = {}
    for flag, kind in kinds.items():
        names = [name for name, feature in features.items() if isinstance(feature, kind)]
        name = getattr(columns, flag)
        if name is None and len(names) > 1:
            raise UserError(
                f"{folder} has several features for the {flag}, {', '.join(names)}: choose one "
                f"with --{flag}_column={names[0]}"
            )
        if (name and name not in names) or (flag == "image" and not names):
            raise UserError(
                f"{folder} has no {flag} {name or ''}: its features are {', '.join(features)}"
            )
        chosen[flag] = name if name is not None else next(iter(names), None)
    if missing := [name for name in columns.keep if name not in features]:
        raise UserError(f"--keep={missing[0]}: {folder} has only {', '.join(features)}")
    name = next((name for name in ("id", "file_name") if name in features), None)
    assert chosen["image"]
    used = (chosen["image"], chosen["label"], name, *columns.keep)
    subset = tfds.features.FeaturesDict({n: features[n] for n in used if n})
    return _Schema(subset, chosen["image"], chosen["label"] or None, name, columns.keep)


def _index(files: list[bytes], lengths: Sequence[int], schema: _Schema) -> Records:
    """Returns the records of a split. Raises UserError if a file has not as many as it should."""
    with ThreadPoolExecutor(THREADS) as pool:
        tables = list(pool.map(_ranges, files))
    for file, ranges, length in zip(files, tables, lengths, strict=True):
        if len(ranges) != length:
            raise UserError(f"{text(file)} has {len(ranges)} records, its metadata say {length}")
    counts = [len(ranges) for ranges in tables]
    offset, size = np.concatenate([np.empty((0, 2), np.int64), *tables]).T
    number = np.concatenate([np.arange(count, dtype=np.int32) for count in (0, *counts)])
    return Records(
        files, schema, np.repeat(np.arange(len(files), dtype=np.int32), counts), number, offset,
        size.astype(np.int32),
    )  # fmt: skip


def _ranges(path: bytes) -> np.ndarray:
    """Returns (offset, size) of the data of each record, int64 (N, 2). Raises UserError."""
    ranges: list[tuple[int, int]] = []
    try:
        with RangeReader(path) as file:
            position = 0
            while position < file.size:
                header = file.read_at(position, HEADER.size)
                if len(header) == HEADER.size:
                    size, crc32c = HEADER.unpack(header)
                    end = position + HEADER.size + size + FOOTER.size
                if len(header) < HEADER.size or _masked_crc32c(header[:8]) != (crc32c,):
                    raise UserError(
                        f"{text(path)} is no TFRecord, or is damaged at byte {position}: copy or "
                        f"download it again"
                    )
                if end > file.size:
                    raise UserError(
                        f"{text(path)} is cut off within record {len(ranges)}: copy or download "
                        f"it again"
                    )
                ranges.append((position + HEADER.size, size))
                position = end
    except OSError as e:
        raise UserError(f"{text(path)}: {e.strerror}") from e
    return np.array(ranges, np.int64).reshape(-1, 2)


def _decoded(value: Any) -> Any:
    """Returns a text feature as str, an array as numbers and lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _masked_crc32c(data: bytes) -> tuple[int]:
    """Returns the CRC32C as TFRecord stores it: rotated by 15 bits, plus a constant."""
    crc = _crc32c()(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF,)


@functools.cache
def _crc32c() -> Any:
    """Returns the function that computes a CRC32C. Raises UserError if it is not installed."""
    try:
        import google_crc32c
    except ImportError:
        raise UserError(
            "TFRecord is checked by google-crc32c: pip install 'dgpt_jax[tfrecord]'"
        ) from None
    return google_crc32c.value
