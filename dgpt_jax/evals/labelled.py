"""Pictures with any number of right classes each: image files, and examples of a TFDS split."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgpt_jax import bad_records, image_files, image_walk, records, user_images, views
from dgpt_jax.evals import imagenet
from dgpt_jax.members import Members
from dgpt_jax.schema import UserError

# On a network file system a folder takes milliseconds, in which others can be asked for.
THREADS = 8
LISTED = (*user_images.EXTENSIONS, ".tar")


@dataclass(frozen=True)
class File:
    """An image file; its id is CLASS/name."""

    id: str
    path: str

    def read(self) -> bytes:
        try:
            with open(self.path, "rb", buffering=0) as file:
                return file.read()
        except OSError as e:
            raise UserError(f"{self.path}: {e.strerror}") from e


@dataclass(frozen=True)
class Files:
    """Image files below a folder, in order, as image_files.Members are; sizes are not asked for."""

    root: Path
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> File:
        return File(self.ids[index], os.path.join(self.root, self.ids[index]))

    def take(self, chosen: np.ndarray) -> "Files":
        return Files(self.root, [self.ids[i] for i in chosen])


class Images:
    """Image files with any number of right classes each: int32 labels (N, W), padded with -1.
    `crop` pixels are cut off all around. EXIF orientation and transparency are left alone, as the
    published numbers' loaders do; an import changes both."""

    classes = None

    def __init__(self, path: Path, members: Members | Files, labels: np.ndarray, crop: int = 0):
        self.path, self._members, self.labels, self._crop = path, members, labels, crop

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        member, cut = self._members[index], self._crop
        try:
            image = views.decode_picture(member.read())
        except ValueError as e:
            raise UserError(f"{self.path}: {member.id}: {e}") from None
        height, width = image.shape[:2]
        return image[cut : height - cut, cut : width - cut], self.labels[index]


class Stored:
    """Examples of a TFDS split; labels(record) gives the numbers of the right classes, at most
    `width`."""

    classes = None

    def __init__(self, split: records.Split, labels: Callable[[dict], Sequence[int]], width: int):
        self._split, self._labels, self._width = split, labels, width

    def __len__(self) -> int:
        return len(self._split)

    def __str__(self) -> str:
        return str(self._split)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = self._split[index]
        image = bad_records.picture(self._split, index, record)
        return image, padded([self._labels(record)], self._width)[0]


def folders(path: Path, classes=None, crop: int = 0) -> Images:
    """A folder or tar of class folders; `classes(names)` gives each class its numbers."""
    members, names, of = class_folders(path) or _searched(path)
    if not names:
        raise UserError(f"{path} must hold class folders, and no folders of splits")
    if classes is None:
        numbers = [[i] for i in imagenet.class_indices(names, path)]
    else:
        numbers = classes(names)
    counts = np.array([bool(x) for x in numbers])[of]
    labels = padded(numbers)[of[counts]]
    return Images(path, members.take(np.flatnonzero(counts)), labels, crop)


def members_of(path: Path) -> Members | Files:
    members, _, _ = class_folders(path) or _searched(path)
    return members


def class_folders(path: Path) -> tuple[Files, list[str], np.ndarray] | None:
    """(files, classes, class of each file), sorted by class and name, of a folder of class folders.

    ImageNet-C has 75 of them with 3.75 million files in all, and every process lists them: no file
    is looked at, but for its name. None where there is anything that image_files.find would look
    into: images beside the folders, folders in these, splits, tars.
    """
    if not path.is_dir():
        return None
    names, files = _entries(path)
    if files or any(map(_is_split, names)):
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        inside = list(pool.map(lambda name: _entries(path / name), names))
    filled = [(name, files) for name, (_, files) in zip(names, inside, strict=True) if files]
    deeper = any(folders for folders, _ in inside)
    # ImageNet-C's 75 sets have the same ids, and are held at the same time.
    ids = [sys.intern(f"{name}/{file}") for name, files in filled for file in files]
    if deeper or not ids or any(name.endswith(".tar") for name in ids):
        return None
    counts = [len(files) for _, files in filled]
    return Files(path, ids), [name for name, _ in filled], np.repeat(np.arange(len(counts)), counts)


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """(folders, images and tars), each sorted as bytes are."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = image_walk.kind_of(entry)
            if kind == "folder" and not image_walk.is_hidden(os.fsencode(entry.name)):
                folders.append(entry.name)
            elif kind in ("file", "lost") and _is_listed(entry.name):
                files.append(entry.name)
    return sorted(folders, key=os.fsencode), sorted(files, key=os.fsencode)


def _is_listed(file: str) -> bool:
    return file.lower().endswith(LISTED) and not file.startswith("._")


def _is_split(folder: str) -> bool:
    return folder in image_files.SPLITS or bool(image_files.IMAGENET.fullmatch(os.fsencode(folder)))


def _searched(path: Path) -> tuple[Members, list[str], np.ndarray]:
    """The same by image_files.find; no classes where there are none, or several splits."""
    found = image_files.find(path)
    members = next(iter(found.splits.values()))
    return members, found.classes if len(found.splits) == 1 else [], members.label


def padded(labels: Sequence[Sequence[int]], width: int = 0) -> np.ndarray:
    """int32 (N, W): lists of classes, padded with -1."""
    width = max(width, max(map(len, labels), default=1), 1)
    padded = np.full((len(labels), width), -1, np.int32)
    for row, classes in zip(padded, labels, strict=True):
        row[: len(classes)] = classes
    return padded
