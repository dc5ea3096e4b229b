"""Images with any number of correct classes each: image files, and examples of a TFDS split."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgpt_jax.data import bad_records, image_ops
from dgpt_jax.data.ingest import directory_walk, discovery, layout, user_images
from dgpt_jax.data.ingest.image_index import ImageIndex
from dgpt_jax.data.ingest.names import is_hidden
from dgpt_jax.errors import UserError
from dgpt_jax.evals import imagenet
from dgpt_jax.storage import tfds_dataset

# Directories listed at a time: on a network file system each takes milliseconds.
THREADS = 8
EXTENSIONS = (*user_images.EXTENSIONS, ".tar")


@dataclass(frozen=True)
class File:
    """An image file; its id is CLASS/name."""

    id: str
    path: str

    def read(self) -> bytes:
        """The encoded image. Raises UserError."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                return file.read()
        except OSError as e:
            raise UserError(f"{self.path}: {e.strerror}") from e


@dataclass(frozen=True)
class Files:
    """Image files below a directory, in order; like image_index.ImageIndex, without file sizes."""

    root: Path
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> File:
        return File(self.ids[index], os.path.join(self.root, self.ids[index]))

    def take(self, chosen: np.ndarray) -> "Files":
        return Files(self.root, [self.ids[i] for i in chosen])


class FileImages:
    """Image files with int32 labels (N, W), any number of correct classes each, padded with -1.

    crop: pixels removed at every border. EXIF orientation and transparency are ignored, as by the
    loaders of the published numbers; an import applies both.
    """

    classes: int | None = None

    def __init__(self, path: Path, files: ImageIndex | Files, labels: np.ndarray, crop: int = 0):
        self.path, self._files, self.labels, self._crop = path, files, labels, crop

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (height, width, 3) and labels. Raises UserError."""
        file, cut = self._files[index], self._crop
        try:
            image = image_ops.decode_image(file.read())
        except ValueError as e:
            raise UserError(f"{self.path}: {file.id}: {e}") from None
        height, width = image.shape[:2]
        return image[cut : height - cut, cut : width - cut], self.labels[index]


class StoredImages:
    """Examples of a TFDS split; labels(record) returns the correct classes, at most `width`."""

    classes: int | None = None

    def __init__(
        self,
        split: tfds_dataset.Split,
        labels: Callable[[dict], Sequence[int] | np.ndarray],
        width: int,
    ):
        self._split, self._labels, self._width = split, labels, width

    def __len__(self) -> int:
        return len(self._split)

    def __str__(self) -> str:
        return str(self._split)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = self._split[index]
        image = bad_records.decode_image(self._split, index, record)
        return image, padded([self._labels(record)], self._width)[0]


def folders(
    path: Path,
    classes: Callable[[Sequence[str]], list[list[int]]] | None = None,
    crop: int = 0,
) -> FileImages:
    """Images of a directory or tar of class folders; classes(names) maps folders to class numbers.
    Raises UserError if there are none."""
    files, names, class_of = class_folders(path) or _discover(path)
    if not names:
        raise UserError(f"{path} must hold class folders and no split folders")
    if classes is None:
        numbers = [[i] for i in imagenet.class_indices(names, path)]
    else:
        numbers = classes(names)
    used = np.array([bool(x) for x in numbers])[class_of]
    labels = padded(numbers)[class_of[used]]
    return FileImages(path, files.take(np.flatnonzero(used)), labels, crop)


def list_files(path: Path) -> ImageIndex | Files:
    """All image files of a directory or tar."""
    files, _, _ = class_folders(path) or _discover(path)
    return files


def class_folders(path: Path) -> tuple[Files, list[str], np.ndarray] | None:
    """(files, classes, class index of each file), sorted by class and name, of class folders.

    Every process lists ImageNet-C's 75 sets, 3.75 million files, so files are not stat'ed. Returns
    None for anything that needs discovery.discover: images beside the folders, nested folders,
    splits, tars.
    """
    if not path.is_dir():
        return None
    names, files = _entries(path)
    if files or any(map(_is_split, names)):
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        entries = list(pool.map(lambda name: _entries(path / name), names))
    classes = [(name, files) for name, (_, files) in zip(names, entries, strict=True) if files]
    nested = any(folders for folders, _ in entries)
    # ImageNet-C's 75 sets are in memory together and share their ids.
    ids = [sys.intern(f"{name}/{file}") for name, files in classes for file in files]
    if nested or not ids or any(name.endswith(".tar") for name in ids):
        return None
    class_of = np.repeat(np.arange(len(classes)), [len(files) for _, files in classes])
    return Files(path, ids), [name for name, _ in classes], class_of


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """(folders, images and tars), each sorted by bytes."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = directory_walk.kind_of(entry)
            if kind == "folder" and not is_hidden(os.fsencode(entry.name)):
                folders.append(entry.name)
            elif kind in ("file", "broken") and _is_listed(entry.name):
                files.append(entry.name)
    return sorted(folders, key=os.fsencode), sorted(files, key=os.fsencode)


def _is_listed(file: str) -> bool:
    return file.lower().endswith(EXTENSIONS) and not file.startswith("._")


def _is_split(folder: str) -> bool:
    return folder in layout.SPLITS or bool(layout.IMAGENET.fullmatch(os.fsencode(folder)))


def _discover(path: Path) -> tuple[ImageIndex, list[str], np.ndarray]:
    """The same by discovery.discover; no classes for images without labels or several splits."""
    images = discovery.discover(path)
    index = next(iter(images.splits.values()))
    if not isinstance(index, ImageIndex):
        raise UserError(f"{path}: parquet and TFRecord are read in order: import it first")
    return index, images.classes if len(images.splits) == 1 else [], index.label


def padded(labels: Sequence[Sequence[int] | np.ndarray], width: int = 0) -> np.ndarray:
    """int32 (N, W): lists of classes, padded with -1."""
    width = max(width, max(map(len, labels), default=1), 1)
    padded = np.full((len(labels), width), -1, np.int32)
    for row, classes in zip(padded, labels, strict=True):
        row[: len(classes)] = classes
    return padded
