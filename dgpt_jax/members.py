"""Lists of millions of images, in columns: what an import reads, and from where."""

import os
import posixpath
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dgpt_jax.schema import UserError

OWN_FILE = -1  # the offset of an image that is a file by itself
PIECE = 1 << 16
SAY_PIECES = 16


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
class Members:
    """The images of one split, in order, as columns: ImageNet-21K has 14 million.

    paths: bytes, N; places: the tars and folders that they lie in, and place, an index into these;
    offset and size in bytes; label.
    """

    places: list[bytes]
    paths: np.ndarray
    place: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i) -> Member:
        path, file, offset = bytes(self.paths[i]), self.places[self.place[i]], int(self.offset[i])
        if offset == OWN_FILE:
            file = os.path.join(file, posixpath.basename(path))
        return Member(text(path), file, offset, int(self.size[i]), int(self.label[i]))

    def take(self, chosen) -> "Members":
        columns = ("paths", "place", "offset", "size", "label")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def below(self, folder: bytes) -> "Members":
        """The same, with paths from inside a folder that all of them begin with."""
        width, cut = self.paths.dtype.itemsize, len(folder) + 1
        letters = np.ascontiguousarray(self.paths).view("S1").reshape(len(self), width)[:, cut:]
        return replace(self, paths=np.ascontiguousarray(letters).view(f"S{width - cut}")[:, 0])

    def tops(self) -> tuple[np.ndarray, list[bytes]]:
        """(index, N; names): the first folder of every path, b"" where it has none."""
        seen: dict[bytes, int] = {}
        tops = (path[: max(path.find(b"/"), 0)] for path in self.each_path())
        index = np.fromiter((seen.setdefault(top, len(seen)) for top in tops), np.int32, len(self))
        return index, list(seen)

    def each_path(self) -> Iterator[bytes]:
        for start in range(0, len(self), PIECE):
            yield from self.paths[start : start + PIECE].tolist()


def text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


class Columns:
    """Gathers members, in some 150 bytes for each at the most."""

    def __init__(self, say):
        self._say = say
        self._places: dict[bytes, int] = {}
        self._paths, self._pieces = [], []
        self._place, self._label = array("i"), array("i")
        self._offset, self._size = array("q"), array("q")

    def add(self, path: bytes, place: bytes, offset: int, size: int, label: int = -1):
        self._paths.append(path)
        self._place.append(self._places.setdefault(place, len(self._places)))
        self._offset.append(offset)
        self._size.append(size)
        self._label.append(label)
        if len(self._paths) == PIECE:
            self._pieces.append(np.array(self._paths, dtype=bytes))
            self._paths = []
            if len(self._pieces) % SAY_PIECES == 0:
                self._say(f"listing: {len(self._place)} images so far")

    def members(self) -> Members:
        paths = np.concatenate([*self._pieces, np.array(self._paths, dtype="S")])
        self._pieces = self._paths = None
        columns = (self._place, self._offset, self._size, self._label)
        return Members(list(self._places), paths, *map(np.array, columns))
