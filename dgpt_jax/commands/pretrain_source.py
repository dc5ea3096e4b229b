"""The images that `pretrain` starts from, and their division into training and held-out images."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax.data import token_store
from dgpt_jax.data.ingest import discovery
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import gcs, tfds_dataset, tfds_metadata

MIN_IMAGES = 8
HELD_OUT_SPLITS = ("val", "valid", "validation", "test")  # the first that there is
HELD_OUT, MAX_HELD_OUT = 0.1, 5000  # share of the images, and images at most
BLOCKS = 10  # of consecutive images, each with held-out images at its end
MAX_CLASSES = 50  # with more, a list of slices for each class is no readable flag


@dataclass(frozen=True)
class Source:
    """Images of a source, by split.

    imported: it is a TFDS image dataset already. counts: images per split. labels: splits whose
    images have labels. starts: of a split that is sorted by class, the first image of each class.
    """

    path: str
    imported: bool
    num_bytes: int
    counts: dict[str, int]
    labels: tuple[str, ...]
    starts: dict[str, list[int]]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Source":
        fields: dict[str, Any] = {**values, "labels": tuple(values["labels"])}
        return cls(**fields)


@dataclass(frozen=True)
class Division:
    """Splits, or slices of one, of the training and the held-out images, and their numbers.

    labelled: both have labels, and held-out images of classes that the training images have.
    """

    train: str
    heldout: str
    train_images: int
    heldout_images: int
    labelled: bool
    line: str


def inspect(folder: str, say: Callable[[str], None]) -> Source:
    """Returns the images of a folder, archive or dataset. Raises UserError."""
    gcs.require(folder)
    if token_store.exists(folder):
        raise UserError(f"{folder} is a token store: give the images that it was built from")
    if (
        not gcs.is_remote(folder)
        and not any(c in folder for c in "*{")
        and not Path(folder).exists()
    ):
        raise UserError(f"no such file or directory: {folder}")
    if is_imported(folder):
        return _dataset(folder)
    images = discovery.discover(folder, say=say)
    counts = {name: len(split) for name, split in images.splits.items()}
    starts, labels = {}, []
    for name, split in images.splits.items():
        column = np.asarray(getattr(split, "label", ()))
        if not images.classes or not len(column) or column.min() < 0:
            continue
        labels.append(name)
        if (np.diff(column) >= 0).all():
            starts[name] = _class_starts(column)
    path = folder if gcs.is_remote(folder) else os.path.abspath(folder)
    return Source(path, False, images.num_bytes, counts, tuple(labels), starts)


def is_imported(folder: str) -> bool:
    """True for a TFDS dataset of ArrayRecord, which needs no import."""
    if not (epath.Path(folder) / "dataset_info.json").exists():
        return False
    builder = tfds_metadata.open_any_builder(folder)
    return getattr(builder.info.file_format, "value", None) == "array_record"


def _dataset(folder: str) -> Source:
    opened = tfds_dataset.Opened(folder)
    infos = opened.builder.info.splits
    splits = {name: tfds_dataset.Split(folder, name, opened) for name in infos}
    labels = [n for n, s in splits.items() if s.label is not None and int(s[0]["label"]) >= 0]
    counts = {name: len(split) for name, split in splits.items()}
    for split in splits.values():
        split.close()
    path = folder if gcs.is_remote(folder) else os.path.abspath(folder)
    return Source(path, True, 0, counts, tuple(labels), {})


def after_import(source: Source, images: str) -> Source:
    """Returns the source with the images that the import could read."""
    infos = tfds_dataset.open_builder(images).info.splits
    counts = {name: infos[name].num_examples for name in source.counts}
    starts = dict(source.starts)
    for name in starts:
        if counts[name] != source.counts[name]:
            column = [int(example["label"]) for example in tfds_dataset.Split(images, name)]
            starts[name] = _class_starts(np.asarray(column))
    return dataclasses.replace(source, counts=counts, starts=starts)


def _class_starts(labels: np.ndarray) -> list[int]:
    """Returns the first row of each class, of sorted labels (N,)."""
    return np.flatnonzero(np.diff(labels, prepend=-1)).tolist()


def divide(source: Source, heldout: str | None) -> Division:
    """Divides the images; heldout: a split, or a share of the images; default: a split of
    HELD_OUT_SPLITS, else a tenth. Raises UserError."""
    counts = source.counts
    name = heldout if heldout in counts else None
    if heldout is None and len(counts) > 1:
        name = next((split for split in HELD_OUT_SPLITS if split in counts), None)
    share = 0.0 if name else _share(heldout, counts)
    train = _train_split(counts, name)
    if counts[train] < MIN_IMAGES:
        raise UserError(
            f"{source.path} has {counted(counts[train], 'image')} to train on ({train}): at least "
            f"{MIN_IMAGES} are needed"
        )
    if name is not None:
        labelled = {train, name} <= set(source.labels)
        line = f"held out: split {name}, {counted(counts[name], 'image')}"
        return Division(train, name, counts[train], counts[name], labelled, line)
    return _slices(source, train, share)


def _train_split(counts: dict[str, int], heldout: str | None) -> str:
    """Returns "train", else the largest split that is not for tests."""
    others = [name for name in counts if name != heldout]
    if not others:
        raise UserError(f"--heldout={heldout} leaves no split to train on: give a share, as 0.1")
    candidates = [name for name in others if name not in HELD_OUT_SPLITS] or others
    return "train" if "train" in candidates else max(candidates, key=counts.__getitem__)


def _share(text: str | None, counts: dict[str, int]) -> float:
    try:
        share = HELD_OUT if text is None else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 0.5:
        raise UserError(
            f"--heldout={text} is neither a split ({', '.join(counts)}) nor a share of the images "
            f"from 0 to 0.5"
        )
    return share if text is not None else min(share, MAX_HELD_OUT / max(counts.values()))


def _slices(source: Source, split: str, share: float) -> Division:
    """Holds out the end of every class, or of blocks of consecutive images: near duplicates, as
    frames of a video, mostly stay on one side."""
    images = source.counts[split]
    starts = source.starts.get(split, [])
    largest = max((b - a for a, b in pairwise([*starts, images])), default=0)
    by_class = 1 < len(starts) <= MAX_CLASSES and largest > 1
    if not by_class:
        blocks = min(BLOCKS, max(round(share * images), 1))
        starts = [images * i // blocks for i in range(blocks)]
    train, held = [], []
    for start, end in pairwise([*starts, images]):
        size = end - start
        cut = end - min(max(round(share * size), 1), size // 2)
        train.append((start, cut))
        held.append((cut, end))
    held_images = sum(b - a for a, b in held)
    where = "of every class" if by_class else f"of {counted(len(starts), 'block')}"
    line = f"held out: {counted(held_images, 'image')}, the end {where} of {split}"
    if source.labels and not by_class:
        line += "; no kNN: no split of labelled images is for tests"
    return Division(
        _text(split, train), _text(split, held), images - held_images, held_images, by_class, line
    )


def _text(split: str, ranges: Sequence[tuple[int, int]]) -> str:
    """Returns "train[0:9]+train[10:19]"; empty ranges are left out, adjacent ones joined."""
    joined: list[list[int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        elif end > start:
            joined.append([start, end])
    return "+".join(f"{split}[{start}:{end}]" for start, end in joined)
