"""Index of the samples of WebDataset shards, in the order of the shards."""

import posixpath
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dgpt_jax.data.ingest import image_index
from dgpt_jax.data.ingest.column_labels import ColumnLabels
from dgpt_jax.data.ingest.image_index import ImageEntry, ImageIndex, ImageIndexBuilder, text
from dgpt_jax.data.ingest.types import Columns, as_text
from dgpt_jax.data.ingest.webdataset_samples import Range, parse_json, scan
from dgpt_jax.data.prefetch import map_ahead
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import byte_ranges

THREADS = 8


@dataclass(frozen=True, slots=True)
class SampleEntry(ImageEntry):
    """An image with the byte ranges of its .txt and .json (size 0: there is none)."""

    keep: tuple[str, ...]
    txt: Range
    json: Range

    def texts(self) -> Mapping[str, str]:
        values = self.values() if self.keep else {}
        return {name: as_text(values.get(name)) for name in self.keep}

    def values(self) -> dict:
        """Reads all that can be kept, {name: value}. Raises UserError."""
        values = {}
        if self.json[1] and not set(self.keep) <= {"txt"}:
            values = parse_json(byte_ranges.read(self.file, *self.json), self.id, self.file)
        if self.txt[1] and {"txt", "caption"} & set(self.keep):
            value = byte_ranges.read(self.file, *self.txt).decode("utf-8", "replace")
            values |= {"txt": value, "caption": value}
        return values


@dataclass(frozen=True)
class SampleIndex(ImageIndex):
    """Samples in the order of their shards; offsets and sizes of .txt and .json are columns.

    keep: text columns: "txt" or "caption", the .txt; another name, or "caption" where there is no
    .txt, a key of the .json.
    """

    keep: tuple[str, ...]
    txt_offset: np.ndarray
    txt_size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray

    COLUMNS: ClassVar = (*ImageIndex.COLUMNS, "txt_offset", "txt_size", "json_offset", "json_size")

    def __getitem__(self, i: int) -> SampleEntry:
        entry = super().__getitem__(i)
        txt, json = (
            (int(offset[i]), int(size[i]))
            for offset, size in (
                (self.txt_offset, self.txt_size), (self.json_offset, self.json_size),
            )
        )  # fmt: skip
        return SampleEntry(
            entry.id, entry.file, entry.offset, entry.size, entry.label, self.keep, txt, json
        )


def class_names(root: bytes) -> list[str]:
    """Returns the lines of classnames.txt in a folder or the one above it; [] if there is none."""
    for folder in (root, posixpath.dirname(root)):
        path = posixpath.join(folder, b"classnames.txt")
        if byte_ranges.exists(path):
            return byte_ranges.read(path).decode("utf-8", "replace").splitlines()
    return []


def open_shards(
    splits: Mapping[str, Sequence[bytes]], columns: Columns, names: Sequence[str], notes: list[str]
) -> tuple[dict[str, SampleIndex], list[str]]:
    """Returns the samples of each split's shards, and the class names.

    names: of the classes of .cls, if known. Raises UserError if a shard is damaged, or a sample has
    no image, several images, or a label that is none.
    """
    labels = ColumnLabels(names)
    indices, numbers = {}, {}
    for split, files in splits.items():
        indices[split], numbers[split] = _index(files, columns, labels, notes)
        _check_keys(indices[split])
        _check_kept(indices[split])
    for split, index in indices.items():
        index.label[:] = labels.renumber(numbers[split])
    return indices, labels.classes()


def _index(
    files: Sequence[bytes], columns: Columns, labels: ColumnLabels, notes: list[str]
) -> tuple[SampleIndex, array]:
    """Returns the samples of some shards, without labels, and the labels' numbers."""
    builder, numbers = ImageIndexBuilder(lambda _: None), array("i")
    ranges = {extension: (array("q"), array("q")) for extension in ("txt", "json")}
    labelled: bytes | None = None
    with ThreadPoolExecutor(THREADS) as pool:
        shards = map_ahead(pool, lambda file: scan(file, columns), files, depth=2 * THREADS)
        for file, (samples, shard_notes) in shards:
            notes += shard_notes
            for key, image, value, others in samples:
                if len(numbers) and (labelled is None) != (value is None):
                    raise UserError(
                        f"{text(key)} in {text(file)} has {'a' if labelled is None else 'no'} label"
                        f", unlike the samples before it: --label_column= imports no labels"
                    )
                labelled = key if value is not None else None
                try:
                    numbers.append(labels.number(value))
                except ValueError as e:
                    raise UserError(f"{text(key)} in {text(file)}: {e}") from None
                builder.add(key, file, *image)
                for (offsets, sizes), (offset, size) in zip(ranges.values(), others, strict=True):
                    offsets.append(offset)
                    sizes.append(size)
    index = builder.build()
    arrays = [np.array(column) for pair in ranges.values() for column in pair]
    fields = {name: getattr(index, name) for name in ("containers", "paths", *index.COLUMNS)}
    return SampleIndex(**fields, keep=columns.keep, **dict(zip(_EXTRA, arrays))), numbers


_EXTRA = SampleIndex.COLUMNS[len(ImageIndex.COLUMNS) :]


def check_no_folders(splits: Mapping[str, SampleIndex]):
    """Raises UserError if keys of unlabelled samples have folders, which may be classes."""
    for index in splits.values():
        _, tops = index.top_dirs()
        if folders := [top for top in tops if top]:
            raise UserError(
                f"{text(index.containers[0])} is ambiguous: its samples have no .cls, but folders "
                f"({text(folders[0])}): if these are no classes, set --label_column=; if they are, "
                f"unpack it and import the folder"
            )


def _check_keys(index: SampleIndex):
    """Raises UserError if two samples have the same key."""
    hashes = np.fromiter(map(image_index.path_hash, index.paths), np.uint64, len(index))
    twice = image_index.duplicates(hashes)
    if len(twice):
        second = index[int(twice[0])]
        first = index[int(np.flatnonzero(hashes == hashes[twice[0]])[0])]
        files = dict.fromkeys(text(entry.file) for entry in (first, second))
        raise UserError(
            f"found {counted(len(twice), 'sample')} twice, the first is {second.id}, in "
            f"{' and '.join(files)}: remove one of each, or give them other keys"
        )


def _check_kept(index: SampleIndex):
    """Raises UserError if the first sample lacks a text column."""
    if index.keep and len(index):
        values = index[0].values()
        missing = [name for name in index.keep if name not in values]
        if missing:
            raise UserError(
                f"--keep: {index[0].id} in {text(index[0].file)} has no {missing[0]!r}; it has "
                f"{', '.join(values) or 'neither .txt nor .json'}"
            )
