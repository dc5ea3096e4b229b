"""Pictures with any number of right classes each: image files, and examples of a TFDS split."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dgpt_jax import bad_records, image_files, records, views
from dgpt_jax.evals import imagenet
from dgpt_jax.members import Members
from dgpt_jax.schema import UserError


class Images:
    """Image files with any number of right classes each: int32 labels (N, W), padded with -1.
    `crop` pixels are cut off all around."""

    def __init__(self, path: Path, members: Members, labels: np.ndarray, crop: int = 0):
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
    found = image_files.find(path)
    members = next(iter(found.splits.values()))
    if len(found.splits) > 1 or not found.classes:
        raise UserError(f"{path} must hold class folders, and no folders of splits")
    if classes is None:
        numbers = [[i] for i in imagenet.class_indices(found.classes, path)]
    else:
        numbers = classes(found.classes)
    kept = np.flatnonzero([bool(numbers[label]) for label in members.label])
    members = members.take(kept)
    labels = padded([numbers[label] for label in members.label])
    return Images(path, members, labels, crop)


def members_of(path: Path) -> Members:
    return next(iter(image_files.find(path).splits.values()))


def padded(labels: Sequence[Sequence[int]], width: int = 0) -> np.ndarray:
    """int32 (N, W): lists of classes, padded with -1."""
    width = max(width, max(map(len, labels), default=1), 1)
    padded = np.full((len(labels), width), -1, np.int32)
    for row, classes in zip(padded, labels, strict=True):
        row[: len(classes)] = classes
    return padded
