"""Lists of millions of images, in columns: what an import reads, and from where."""

import os
import posixpath
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dgpt_jax.schema import UserError

OWN_FILE = -1  # the offset of an image that is a file by itself
BOM = b"\xef\xbb\xbf"  # with which Windows begins UTF-8
PIECE = 1 << 16
SAY_EVERY = 1 << 20  # images


@dataclass(frozen=True, slots=True)
class Member:
    """One image: bytes `offset` to `offset + size` of a file; a whole file if that is OWN_FILE.

    The size is -1 where it could not be known, the label -1 where there is none.
    """

    id: str
    file: bytes
    offset: int
    size: int
    label: int

    def read(self) -> bytes:
        """Raises OSError where this one file is at fault, UserError where the disk fails or the
        file is not what was listed: going on would leave out all that follows."""
        try:
            with open(self.file, "rb", buffering=0) as file:
                if self.offset == OWN_FILE:
                    data = file.read()
                else:
                    file.seek(self.offset)
                    data = file.read(self.size)
        except OSError as e:
            if isinstance(e, PermissionError) or self.size < 0:
                raise
            raise UserError(f"{text(self.file)}: {e.strerror}") from e
        if len(data) != self.size:
            raise UserError(
                f"{self.id} in {text(self.file)} had {self.size} bytes when listed, now {len(data)}"
            )
        return data


@dataclass(frozen=True)
class Paths:
    """N byte strings in one block: path i is `block[start[i] : start[i] + length[i]]`.

    One long path costs its own bytes, where a column of fixed width would widen every row. Parts
    and rests of paths share the block. width: of the longest in the whole collection, that
    `image_files.Found.digest` pads to.
    """

    block: bytearray
    start: np.ndarray
    length: np.ndarray
    width: int

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i) -> bytes:
        return bytes(self.block[self.start[i] : self.start[i] + self.length[i]])

    def __iter__(self) -> Iterator[bytes]:
        view = memoryview(self.block)
        for piece in range(0, len(self), PIECE):
            rows = slice(piece, piece + PIECE)
            starts, lengths = self.start[rows].tolist(), self.length[rows].tolist()
            for start, length in zip(starts, lengths, strict=True):
                yield bytes(view[start : start + length])

    def take(self, rows) -> "Paths":
        return replace(self, start=self.start[rows], length=self.length[rows])

    def without_first(self, count: int) -> "Paths":
        """The paths without their first `count` bytes."""
        start, length = self.start + count, self.length - count
        return replace(self, start=start, length=length, width=self.width - count)


@dataclass(frozen=True)
class Members:
    """The images of one split, in order, as columns: ImageNet-21K has 14 million.

    paths; places: the tars and folders that they lie in, and place, an index into these; offset and
    size in bytes; label.
    """

    places: list[bytes]
    paths: Paths
    place: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i) -> Member:
        path, file, offset = self.paths[i], self.places[self.place[i]], int(self.offset[i])
        if offset == OWN_FILE:
            file = os.path.join(file, posixpath.basename(path))
        return Member(text(path), file, offset, int(self.size[i]), int(self.label[i]))

    def take(self, rows) -> "Members":
        columns = ("place", "offset", "size", "label")
        chosen = {name: getattr(self, name)[rows] for name in columns}
        return replace(self, paths=self.paths.take(rows), **chosen)

    def below(self, folder: bytes) -> "Members":
        """The same, with paths from inside a folder that all of them begin with."""
        return replace(self, paths=self.paths.without_first(len(folder) + 1))

    def tops(self) -> tuple[np.ndarray, list[bytes]]:
        """(index, N; names): the first folder of every path, b"" where it has none."""
        seen: dict[bytes, int] = {}
        tops = (path[: max(path.find(b"/"), 0)] for path in self.paths)
        index = np.fromiter((seen.setdefault(top, len(seen)) for top in tops), np.int32, len(self))
        return index, list(seen)

    def sorted(self) -> "Members":
        """By first folder, then path. Each folder by itself: only its paths are objects then."""
        index, tops = self.tops()
        rank = np.empty(len(tops), np.int32)
        rank[sorted(range(len(tops)), key=tops.__getitem__)] = np.arange(len(tops))
        order = np.argsort(rank[index], kind="stable")
        ends = np.cumsum(np.bincount(rank[index]))
        for rows in np.split(order, ends[:-1]):
            paths = list(self.paths.take(rows))
            rows[:] = rows[sorted(range(len(paths)), key=paths.__getitem__)]
        return self.take(order)


def text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


class Columns:
    """Gathers members, in 40 bytes for each and those of its path."""

    def __init__(self, say):
        self._say = say
        self._places: dict[bytes, int] = {}
        self._block = bytearray()
        self._start, self._length = array("q"), array("i")
        self._place, self._label = array("i"), array("i")
        self._offset, self._size = array("q"), array("q")

    def add(self, path: bytes, place: bytes, offset: int, size: int, label: int = -1):
        self._start.append(len(self._block))
        self._length.append(len(path))
        self._block += path
        self._place.append(self._places.setdefault(place, len(self._places)))
        self._offset.append(offset)
        self._size.append(size)
        self._label.append(label)
        if len(self._start) % SAY_EVERY == 0:
            self._say(f"listing: {len(self._start)} images so far")

    def members(self) -> Members:
        """The columns share the memory that they were gathered in."""
        columns = (self._start, self._length, self._place, self._offset, self._size, self._label)
        start, length, *others = (np.frombuffer(c, c.typecode) for c in columns)
        paths = Paths(self._block, start, length, width=max(self._length, default=0) or 1)
        return Members(list(self._places), paths, *others)
