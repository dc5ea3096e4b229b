"""Rows of parquet files as images, read in order, a batch at a time.

A first pass reads labels and paths alone. An image's id is its path if all paths of the split are
distinct, else FILE:ROW.
"""

import hashlib
import posixpath
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dgpt_jax.data.image_ops import UnreadableImage
from dgpt_jax.data.ingest import image_index, parquet_file, parquet_schema
from dgpt_jax.data.ingest.column_labels import ColumnLabels
from dgpt_jax.data.ingest.image_index import text
from dgpt_jax.data.ingest.parquet_schema import ParquetColumns
from dgpt_jax.data.ingest.types import Columns, as_text
from dgpt_jax.errors import UserError

INDEX_BATCH = 1 << 16  # rows
IMAGE_BATCH = 8 << 20  # bytes, by the mean size of a file's images
MAX_BATCH = 256  # rows; equal images are stored once, so that the mean may be far too low


@dataclass(frozen=True, slots=True)
class RowEntry:
    """One row: its encoded image, None if it is null."""

    id: str
    label: int
    data: bytes | None
    values: Mapping[str, object]

    def read(self) -> bytes:
        if self.data is None:
            raise UnreadableImage("the row has no bytes of an image")
        return self.data

    def texts(self) -> Mapping[str, str]:
        return {name: as_text(value) for name, value in self.values.items()}


@dataclass(frozen=True)
class Table:
    """A file: its rows, those before it in the split, the bytes of its images (compressed), and a
    digest of its size and footer, which has statistics and positions of all columns."""

    path: bytes
    name: str
    rows: int
    first: int
    num_bytes: int
    digest: bytes


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a split's files. has_paths: ids are the paths.

    label: of all rows of the split, int32. cursor: one-element list, shared by all parts of a
    split, with the position after the last part that was read to its end, and the open iterator:
    the next part continues there, instead of decoding a row group from its start.
    """

    tables: Sequence[Table]
    columns: ParquetColumns
    has_paths: bool
    label: np.ndarray
    start: int
    stop: int
    cursor: list[tuple[int, Iterator[RowEntry]]]

    @property
    def num_bytes(self) -> int:
        return sum(table.num_bytes for table in self.tables)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[RowEntry]:
        position, entries = self.cursor.pop() if self.cursor else (-1, iter(()))
        if position != self.start:
            entries = self._entries(self.start)
        for _ in range(len(self)):
            yield next(entries)
        self.cursor[:] = [(self.stop, entries)]

    def take(self, rows: slice) -> "Rows":
        start, stop, _ = rows.indices(len(self))
        return replace(self, start=self.start + start, stop=self.start + stop)

    def update_digest(self, state: "hashlib._Hash") -> None:
        columns = [*self.columns.of_index, *self.columns.of_images]
        state.update(f"{columns} {self.has_paths}\n".encode())
        for table in self.tables:
            state.update(f"{table.name} {table.rows} ".encode() + table.digest)
        state.update(np.ascontiguousarray(self.label).data)

    def _entries(self, start: int) -> Iterator[RowEntry]:
        """Yields the rows from `start` to the end of the split."""
        for table in self.tables:
            if table.first + table.rows > start:
                yield from self._entries_of(table, max(start - table.first, 0))

    def _entries_of(self, table: Table, start: int) -> Iterator[RowEntry]:
        with parquet_file.open_file(table.path) as (file, digest):
            if digest != table.digest:
                raise UserError(f"{text(table.path)} has changed since it was listed")
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            group = int(np.searchsorted(ends, start, side="right"))
            row = int(ends[group] - sizes[group])
            batches = file.iter_batches(
                batch_size=int(np.clip(IMAGE_BATCH * table.rows // table.num_bytes, 1, MAX_BATCH)),
                row_groups=range(group, len(sizes)),
                columns=self.columns.of_images,
                use_threads=False,
            )
            for batch in batches:
                first, row = row, row + batch.num_rows
                if row > start:
                    yield from self._rows(table, batch, first, max(start - first, 0))

    def _rows(self, table: Table, batch: Any, first: int, skip: int) -> Iterator[RowEntry]:
        """Yields the rows of a batch, which begins at row `first` of the file."""
        image = batch.column(self.columns.image)
        valid = image.is_valid()
        data = image.field("bytes") if self.columns.has_path else image
        paths = image.field("path") if self.has_paths else None
        texts = {name: batch.column(name) for name in self.columns.keep}
        for i in range(skip, batch.num_rows):
            row = first + i
            yield RowEntry(
                paths[i].as_py() if paths is not None else f"{table.name}:{row}",
                int(self.label[table.first + row]),
                data[i].as_py() if valid[i].as_py() else None,
                {name: column[i].as_py() for name, column in texts.items()},
            )


def open_tables(
    splits: Mapping[str, Sequence[bytes]], root: bytes, columns: Columns
) -> tuple[dict[str, Rows], list[str]]:
    """Returns the rows of each split's files, and the class names; `root` is the folder that
    contains all. Raises UserError if a file is damaged or lacks a column, if files differ in their
    columns or class names, and if pyarrow is not installed."""
    chosen: tuple[bytes, ParquetColumns] | None = None
    indices = {}
    for split, files in splits.items():
        if len(folders := {posixpath.dirname(file): None for file in files}) > 1:
            raise UserError(
                f"split {split} has files in several folders, {', '.join(map(text, folders))}: if "
                f"these are several datasets, import one"
            )
        for file in files:
            with parquet_file.open_file(file) as (parquet, _):
                these = parquet_schema.choose(parquet.schema_arrow, file, root, columns)
            if chosen and chosen[1] != these:
                raise UserError(
                    f"{text(file)} and {text(chosen[0])} differ in their columns or class names: "
                    f"are they of one dataset?"
                )
            chosen = chosen or (file, these)
    assert chosen
    labels = ColumnLabels(chosen[1].names)
    for split, files in splits.items():
        indices[split] = _index(files, root, chosen[1], labels)
    return {
        split: replace(rows, label=labels.renumber(numbers))
        for split, (rows, numbers) in indices.items()
    }, labels.classes()


def _index(
    files: Sequence[bytes], root: bytes, columns: ParquetColumns, labels: ColumnLabels
) -> tuple[Rows, array]:
    """Returns the rows of a split, without labels, and the labels' numbers."""
    tables: list[Table] = []
    numbers, hashes = array("i"), array("Q")
    has_paths = columns.has_path
    count = 0
    for path in files:
        name = text(path).removeprefix(text(root) + "/")
        with parquet_file.open_file(path) as (file, digest):
            rows = file.metadata.num_rows
            num_bytes = parquet_file.compressed_bytes(file, columns.image_bytes)
            tables.append(Table(path, name, rows, count, num_bytes, digest))
            for batch in file.iter_batches(
                batch_size=INDEX_BATCH, columns=columns.of_index, use_threads=False
            ):
                if columns.label:
                    _add_labels(batch.column(columns.label).to_pylist(), path, labels, numbers)
                if has_paths:
                    paths = batch.column(columns.image).field("path").to_pylist()
                    has_paths = all(paths)
                    hashes.extend(image_index.path_hash(p.encode()) for p in paths if p)
        count += rows
    if not columns.label:
        numbers.frombytes(b"\xff" * 4 * count)
    if has_paths:
        has_paths = not len(image_index.duplicates(np.frombuffer(hashes, np.uint64)))
    return Rows(tables, columns, has_paths, np.empty(0, np.int32), 0, count, []), numbers


def _add_labels(values: list, path: bytes, labels: ColumnLabels, numbers: array):
    try:
        for value in values:
            numbers.append(labels.number(value))
    except ValueError as e:
        raise UserError(f"{text(path)}: {e}") from None
