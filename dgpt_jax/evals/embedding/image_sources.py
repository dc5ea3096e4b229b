"""Images to embed: user images as an import reads them, TFDS image datasets, and token stores.

All are `data.ingest.types.Images`: read in order, from any position on.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax.data import image_ops, token_store
from dgpt_jax.data.ingest import discovery, user_images
from dgpt_jax.data.ingest.types import Columns, Images
from dgpt_jax.errors import UserError
from dgpt_jax.storage import gcs, tfds_dataset, tfds_metadata

FILES, DATASET, TOKENS = "files", "dataset", "token store"


@dataclass(frozen=True)
class Source:
    """Splits of images, in order.

    kind: FILES, DATASET or TOKENS. classes: class names; empty without labels. texts: names of the
    text columns. digest: identifies the splits' contents, of FILES their names and sizes. decode:
    encoded bytes to RGB uint8 (height, width, 3). notes: lines to print.
    """

    path: str
    kind: str
    splits: Mapping[str, Images]
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    digest: str
    decode: Callable[[bytes], np.ndarray]
    notes: tuple[str, ...] = ()

    def describe(self) -> dict:
        """Identity of the source for metadata."""
        counts = {name: len(images) for name, images in self.splits.items()}
        return {"path": self.path, "kind": self.kind, "digest": self.digest, "images": counts}


@dataclass(frozen=True)
class SplitEntry:
    """One record of a TFDS split. Its properties raise BadRecord."""

    split: tfds_dataset.Split
    index: int
    keep: tuple[str, ...]
    has_label: bool

    @functools.cached_property
    def _record(self) -> Mapping:
        return self.split[self.index]

    @property
    def id(self) -> str:
        return self._record["id"]

    @property
    def label(self) -> int:
        return int(self._record["label"]) if self.has_label else -1

    def read(self) -> bytes:
        return self._record["image"]

    def texts(self) -> Mapping[str, str]:
        return {name: self._record[name].decode("utf-8", "replace") for name in self.keep}


@dataclass(frozen=True)
class SplitImages:
    """Consecutive records of a TFDS split."""

    split: tfds_dataset.Split
    keep: tuple[str, ...]
    has_label: bool
    rows: range

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.split.shards)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SplitEntry]:
        return (SplitEntry(self.split, i, self.keep, self.has_label) for i in self.rows)

    def take(self, rows: slice, /) -> "SplitImages":
        return replace(self, rows=self.rows[rows])

    def update_digest(self, state: "hashlib._Hash") -> None:
        state.update(f"{self.split.digest} {self.rows} {self.keep}\n".encode())


def open_source(
    src: Path | str,
    *,
    split: str | None = None,
    labels: Path | str | None = None,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = lambda _: None,
) -> Source:
    """Opens a source; `split`: one of its splits, of TFDS also a slice as train[:100]; None: all.

    labels, columns: those of discovery.discover, for user images. Raises UserError.
    """
    gcs.require(src)
    path = epath.Path(src)
    token_store.require_finished(path)
    if (path / "dataset_info.json").exists():
        builder = tfds_metadata.open_any_builder(src)
        if getattr(builder.info.file_format, "value", None) == "array_record":
            if labels:
                raise UserError(f"--labels is for files: {src} is a dataset with its own labels")
            columns.require_none(src)
            return _checked(_open_dataset(src, split))
    return _checked(_open_files(src, split, labels, columns, say))


def _checked(source: Source) -> Source:
    """Raises UserError if a text column has the name of another column of features."""
    if taken := {"id", "label", "features"} & {*source.texts}:
        raise UserError(f"{source.path}: a text column named {min(taken)} cannot be stored")
    return source


def _open_dataset(src: Path | str, split: str | None) -> Source:
    """Opens a TFDS dataset of ArrayRecord, with all its text features. Raises UserError."""
    opened = tfds_dataset.Opened(src)
    names = [split] if split else list(opened.builder.info.splits)
    splits = {name.partition("[")[0]: tfds_dataset.Split(src, name, opened) for name in names}
    features: Any = opened.builder.info.features
    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise UserError(f"{src} has no images: its features are {', '.join(features)}")
    label = features["label"] if "label" in features else None
    classes = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    own = "id" if "id" in features else "file_name"
    texts = tuple(
        name
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Text) and name != own
    )
    images = {
        name: SplitImages(part, texts, bool(classes), range(len(part)))
        for name, part in splits.items()
    }
    kind = TOKENS if token_store.exists(epath.Path(src)) else DATASET
    digest = _digest(images, classes)
    return Source(str(src), kind, images, classes, texts, digest, image_ops.decode_image)


def _open_files(src, split, labels, columns: Columns, say) -> Source:
    """Opens user images as an import does. Raises UserError."""
    discovered = discovery.discover(src, labels=labels, columns=columns, say=say)
    splits = dict(discovered.splits)
    if split:
        if split not in splits:
            raise UserError(f"{src} has no split {split!r}; it has {', '.join(splits)}")
        splits = {split: splits[split]}
    return Source(
        str(src),
        FILES,
        splits,
        tuple(discovered.classes),
        tuple(discovered.keep),
        _digest(splits, tuple(discovered.classes)),
        user_images.rgb,
        tuple(discovered.skipped.lines()),
    )


def _digest(splits: Mapping[str, Images], classes: tuple[str, ...]) -> str:
    """16 hexadecimal digits of the classes and of what each split contains."""
    state = hashlib.sha256("\n".join(classes).encode())
    for name, images in splits.items():
        state.update(f"{name} ".encode())
        images.update_digest(state)
    return state.hexdigest()[:16]
