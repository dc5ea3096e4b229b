"""Index of millions of images in columns: ids, containers, byte ranges and labels."""

import hashlib
import os
import posixpath
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from dgpt_jax.data.ingest import zip_index
from dgpt_jax.errors import UserError
from dgpt_jax.storage import byte_ranges

OWN_FILE = -1  # offset of an image that is a file of its own
BOM = b"\xef\xbb\xbf"  # UTF-8 byte order mark, written by Windows
BLOCK = 1 << 16  # paths
SAY_EVERY = 1 << 20  # images


Rows = slice | np.ndarray


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image: bytes `offset` to `offset + size` of a file; the full file if offset is OWN_FILE.
    In a zip, the offset is that of the member's header in the central directory.

    size: -1 if unknown. label: -1 if there is none.
    """

    id: str
    file: bytes
    offset: int
    size: int
    label: int

    def read(self) -> bytes:
        """Reads the bytes. Raises OSError or UnreadableImage if only this file is at fault;
        UserError if the disk fails or the file has changed since it was listed: skipping would then
        drop all later files."""
        try:
            if self.offset == OWN_FILE:
                data = byte_ranges.read(self.file)
            elif zip_index.is_zip(self.file):
                data = zip_index.read(self.file, self.offset)
            else:
                data = byte_ranges.read(self.file, self.offset, self.size)
        except OSError as e:
            if isinstance(e, PermissionError) or self.size < 0:
                raise
            raise UserError(f"{text(self.file)}: {e.strerror}") from e
        if len(data) != self.size:
            raise UserError(
                f"{self.id} in {text(self.file)} had {self.size} bytes when listed, now {len(data)}"
            )
        return data

    def texts(self) -> Mapping[str, str]:
        """Returns no text columns: files have none."""
        return {}


@dataclass(frozen=True)
class Paths:
    """N byte strings in one buffer: path i is `buffer[start[i] : start[i] + length[i]]`.

    A long path costs only its own bytes, where a fixed-width column would widen every row. Subsets
    and suffixes of paths share the buffer. width: length of the longest path in the collection, to
    which `discovery.Discovered.digest` pads.
    """

    buffer: bytearray
    start: np.ndarray
    length: np.ndarray
    width: int

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i: int) -> bytes:
        return bytes(self.buffer[self.start[i] : self.start[i] + self.length[i]])

    def __iter__(self) -> Iterator[bytes]:
        view = memoryview(self.buffer)
        for first in range(0, len(self), BLOCK):
            rows = slice(first, first + BLOCK)
            starts, lengths = self.start[rows].tolist(), self.length[rows].tolist()
            for start, length in zip(starts, lengths, strict=True):
                yield bytes(view[start : start + length])

    def take(self, rows: Rows) -> "Paths":
        """Returns the paths of some rows."""
        return replace(self, start=self.start[rows], length=self.length[rows])

    def drop_prefix(self, count: int) -> "Paths":
        """Returns the paths without their first `count` bytes."""
        start, length = self.start + count, self.length - count
        return replace(self, start=start, length=length, width=self.width - count)


@dataclass(frozen=True)
class ImageIndex:
    """Images of one split, in order, as columns: ImageNet-21K has 14 million.

    containers: paths of the archives and folders that hold the images. container: index into them,
    per image. offset, size: in bytes. label: -1 if there is none.
    """

    COLUMNS: ClassVar = ("container", "offset", "size", "label")

    containers: list[bytes]
    paths: Paths
    container: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[ImageEntry]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> ImageEntry:
        path, file, offset = self.paths[i], self.containers[self.container[i]], int(self.offset[i])
        if offset == OWN_FILE:
            file = os.path.join(file, posixpath.basename(path))
        return ImageEntry(text(path), file, offset, int(self.size[i]), int(self.label[i]))

    def take(self, rows: Rows) -> "ImageIndex":
        """Returns the images of some rows."""
        columns = {name: getattr(self, name)[rows] for name in self.COLUMNS}
        return replace(self, paths=self.paths.take(rows), **columns)

    @property
    def num_bytes(self) -> int:
        """Size of all images."""
        return int(self.size.clip(0).sum())

    def update_digest(self, state: "hashlib._Hash") -> None:
        """Hashes paths and columns. Paths are padded to one width, as earlier versions stored them:
        their imports can resume."""
        width = self.paths.width
        state.update(f"|S{width}".encode())
        for path in self.paths:
            state.update(path.ljust(width, b"\0"))
        for name in self.COLUMNS[1:]:
            state.update(np.ascontiguousarray(getattr(self, name)).data)

    def strip_prefix(self, folder: bytes) -> "ImageIndex":
        """Returns the index with paths relative to a folder that contains all images."""
        return replace(self, paths=self.paths.drop_prefix(len(folder) + 1))

    def top_dirs(self) -> tuple[np.ndarray, list[bytes]]:
        """Returns (index, names) of the first folder of every path: index int32 (N,) into names;
        b"" is the name for paths without a folder."""
        numbers: dict[bytes, int] = {}
        tops = (path[: max(path.find(b"/"), 0)] for path in self.paths)
        index = (numbers.setdefault(top, len(numbers)) for top in tops)
        return np.fromiter(index, np.int32, len(self)), list(numbers)

    def sorted(self) -> "ImageIndex":
        """Returns the index sorted by first folder, then path. Sorts folder by folder, so that only
        the paths of one are Python objects at a time."""
        index, tops = self.top_dirs()
        rank = np.empty(len(tops), np.int32)
        rank[sorted(range(len(tops)), key=tops.__getitem__)] = np.arange(len(tops))
        order = np.argsort(rank[index], kind="stable")
        ends = np.cumsum(np.bincount(rank[index]))
        for rows in np.split(order, ends[:-1]):
            paths = list(self.paths.take(rows))
            rows[:] = rows[sorted(range(len(paths)), key=paths.__getitem__)]
        return self.take(order)


def duplicates(hashes: np.ndarray) -> np.ndarray:
    """Returns the rows, in order, whose 64-bit hash a row before them has as well, int64 (N,)."""
    order = np.argsort(hashes, kind="stable")
    equal = hashes[order][1:] == hashes[order][:-1]
    return np.sort(order[1:][equal])


def path_hash(path: bytes) -> int:
    """Returns 64 bits of a path's digest: among 14 million paths two are equal with a probability
    of 5e-6."""
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "little")


def text(path: bytes) -> str:
    """Decodes a path for messages and ids; escapes bytes that are not UTF-8."""
    return path.decode("utf-8", "backslashreplace")


class ImageIndexBuilder:
    """Collects images, in 40 bytes each plus those of its path."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._containers: dict[bytes, int] = {}
        self._buffer = bytearray()
        self._start, self._length = array("q"), array("i")
        self._container, self._label = array("i"), array("i")
        self._offset, self._size = array("q"), array("q")

    def add(self, path: bytes, container: bytes, offset: int, size: int, label: int = -1):
        """Adds an image; `container` is the tar or folder that holds it."""
        self._start.append(len(self._buffer))
        self._length.append(len(path))
        self._buffer += path
        self._container.append(self._containers.setdefault(container, len(self._containers)))
        self._offset.append(offset)
        self._size.append(size)
        self._label.append(label)
        if len(self._start) % SAY_EVERY == 0:
            self._say(f"listing: {len(self._start)} images so far")

    def build(self) -> ImageIndex:
        """Returns the index; its columns share the memory of the builder."""
        columns = (
            self._start,
            self._length,
            self._container,
            self._offset,
            self._size,
            self._label,
        )
        start, length, *others = (np.frombuffer(c, c.typecode) for c in columns)
        paths = Paths(self._buffer, start, length, width=max(self._length, default=0) or 1)
        return ImageIndex(list(self._containers), paths, *others)
