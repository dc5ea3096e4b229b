"""Discovers images, splits and classes in folders, archives, lists, WebDataset and parquet.

    SRC/*.jpg                      a folder: one split, no labels
    SRC/CLASS/*.jpg                one split, labels
    SRC/{train,val,test,…}/CLASS/… one split per folder, with or without class folders
    SRC.tar, SRC.zip               an archive of such a folder. One in a folder, or a tar in a tar,
                                   is treated as a folder of its name, so ImageNet needs no
                                   unpacking: ILSVRC2012_img_{train,val,test…}.tar, alone or in one
                                   folder, and ImageNet-21K's class tars, in a tar or in a folder
    SRC.txt                        a list: one path per line, relative to the list's folder,
                                   optionally followed by a TAB and the class
    SRC/*.parquet                  parquet with a column of images, as on Hugging Face
    SRC/*.tar                      WebDataset shards: an annotation (.cls, .json, .txt) is next to
                                   the first image. Without annotations: as a pattern
    SRC/*.tfrecord*                a TFDS dataset (dataset_info.json) stored as TFRecord
    'SRC/{00000..01999}.tar'       WebDataset shards, or parquet, by a pattern as of bash

Of parquet and WebDataset, a word "train", "val", "valid", "validation" or "test" in the name of a
file or its folder is the split. SRC may be on gs:// or s3://, except a list.

An image's id is its path below the split's folder, CLASS/file, in archives as in folders; of
WebDataset the key; of parquet the image's path if all are distinct, else FILE:ROW. A single folder
around all others, or around all images, is dropped. Labels come from --labels, else the list, else
class folders, else, for ILSVRC2012_val_*.JPEG, ImageNet's own list; of WebDataset from .cls, of
parquet from a column. Classes are sorted, numerically if all are integers; with ImageNet's
validation images they are ImageNet's 1000.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dgpt_jax.data.ingest import labels as class_labels
from dgpt_jax.data.ingest import (
    layout,
    parquet_index,
    shard_files,
    tar_index,
    tfrecord_index,
    webdataset_index,
)
from dgpt_jax.data.ingest.directory_walk import Walk, unpack_first
from dgpt_jax.data.ingest.image_index import text
from dgpt_jax.data.ingest.shard_files import SPLITS
from dgpt_jax.data.ingest.skipped_files import Skipped
from dgpt_jax.data.ingest.types import Columns, Images
from dgpt_jax.data.ingest.user_images import EXTENSIONS
from dgpt_jax.errors import UserError
from dgpt_jax.storage import byte_ranges, gcs


@dataclass(frozen=True)
class Discovered:
    """Splits by name, class names (empty: no labels), skipped files and text columns."""

    splits: Mapping[str, Images]
    classes: list[str]
    skipped: Skipped
    keep: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all images."""
        return sum(images.num_bytes for images in self.splits.values())

    def digest(self) -> str:
        """Returns a digest of all that determines the dataset, except the images' contents."""
        state = hashlib.sha256("\n".join(self.classes).encode())
        for name, images in self.splits.items():
            state.update(f"{name} ".encode())
            images.update_digest(state)
        return state.hexdigest()[:16]


def discover(
    src: Path | str,
    *,
    split: str | None = None,
    labels: Path | str | None = None,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = lambda _: None,
) -> Discovered:
    """Returns the images of a source; `labels`: a file of "name<TAB or space>class".

    `split` names the only split of a source without split folders. `columns`: of WebDataset and
    parquet. `say` logs every million images; 14 million in a tar take minutes and 2 GB. Raises
    UserError.
    """
    if split and (split == "all" or not re.fullmatch(r"\w[\w-]*", split)):  # TFDS's syntax
        raise UserError(f"--split={split}: use letters, digits, _ and -, and not 'all'")
    src = os.fspath(src)
    walk = Walk(say, layout.folder_name)
    default = _list_images(walk, src)
    if walk.shards or walk.tables or walk.records:
        if labels:
            raise UserError(f"--labels is for files: {src} has its own labels, see --label_column")
        return _discover_shards(walk, src, split, columns)
    columns.require_none(src)
    return _discover_files(walk, src, split, default, labels)


def _discover_files(
    walk: Walk, src: str, split: str | None, default: str, labels: Path | str | None
) -> Discovered:
    """Returns the images of folders, archives and lists. Raises UserError."""
    table = class_labels.read_table(labels) if labels else {}
    index = walk.builder.build()
    if not len(index):
        _raise_no_images(walk, src)
    if walk.classes or walk.elsewhere:
        splits = {split or default: index}
    else:
        # A label file may name paths with the folder.
        note = None if table else walk.skipped.notes.append
        splits = layout.divide(index, src, split, default, note)
    splits = {name: layout.sorted_unique(images) for name, images in splits.items()}
    splits, classes = class_labels.apply(splits, walk.classes, table, walk.skipped.notes.append)
    if not (split or walk.classes or table):
        layout.check_numbered_tars(walk.tars)
        layout.check_class_names(src, classes)
    return Discovered(splits, classes, walk.skipped)


def _discover_shards(walk: Walk, src: str, split: str | None, columns: Columns) -> Discovered:
    """Returns the images of WebDataset shards, parquet files or TFRecord. Raises UserError."""
    index = walk.builder.build()
    kinds = {
        "WebDataset shards": walk.shards[:1],
        "parquet files": walk.tables[:1],
        "TFRecord files": walk.records[:1],
        "other images": [os.fsencode(entry.file) for entry in itertools.islice(index, 1)],
    }
    if len(mixed := {kind: files[0] for kind, files in kinds.items() if files}) > 1:
        raise UserError(
            f"{src} contains {' and '.join(f'{k} ({text(f)})' for k, f in mixed.items())}: give "
            f"the folder of one kind, or a pattern"
        )
    files = walk.shards or walk.tables or walk.records
    root = shard_files.root(src, files)
    splits = {} if walk.records else shard_files.divide(files, root, split)
    images: Mapping[str, Images]
    if walk.records:
        images, classes = tfrecord_index.open_records(files, columns)
    elif walk.tables:
        images, classes = parquet_index.open_tables(splits, root, columns)
    else:
        names = webdataset_index.class_names(root)
        images, classes = webdataset_index.open_shards(splits, columns, names, walk.skipped.notes)
        if not classes and columns.label is None and not shard_files.is_pattern(src):
            webdataset_index.check_no_folders(images)
    if empty := [name for name, rows in images.items() if not len(rows)]:
        raise UserError(f"{src}: split {empty[0]} contains no images")
    return Discovered(images, classes, walk.skipped, columns.keep)


def _list_images(walk: Walk, src: str) -> str:
    """Adds the images of `src` to the walk; returns the default name of their split."""
    try:
        if files := shard_files.expand(src):
            walk.add_shards(files)
            return "train"
        if not byte_ranges.exists(src):
            raise UserError(f"no such file or directory: {src}")
        if gcs.is_remote(src):
            return _list_remote(walk, src)
        return _list_local(walk, Path(src))
    except OSError as e:  # permissions, or files that vanish
        raise UserError(f"{text(os.fsencode(e.filename or src))}: {e.strerror}") from e


def _list_remote(walk: Walk, src: str) -> str:
    if not src.endswith((".tar", ".zip", ".parquet")):
        walk.add_remote_folder(src)
        return "train"
    walk.add_archive(os.fsencode(src))
    return _split_name(Path(src))


def _list_local(walk: Walk, src: Path) -> str:
    if not (src.is_dir() or src.is_file()):
        raise UserError(f"{src} is a pipe, socket or device: give a folder, archive or list")
    path = os.fsencode(src)
    if src.is_dir():
        walk.add_folder(path)
        return "train"
    if src.suffix.lower() in (".zip", ".parquet"):
        walk.add_archive(path)
    elif tool := tar_index.compression(path):
        raise UserError(unpack_first(src, tool))
    elif tar_index.is_tar(os.fspath(src)):
        walk.add_tar(path)
    else:
        walk.add_list(src)
        return "train"
    return _split_name(src)


def _split_name(archive: Path) -> str:
    """Returns the split of an archive: its name if that is a split's, else train."""
    name = text(layout.folder_name(os.fsencode(archive.stem)))
    return name if name in SPLITS else "train"


def _raise_no_images(walk: Walk, src: str):
    """Raises UserError for a source without images, with what it has instead."""
    if walk.skipped.compressed:
        raise UserError(unpack_first(walk.skipped.compressed[0], "gunzip"))
    lines = "".join(f"; {line}" for line in walk.skipped.lines())
    raise UserError(f"{src} contains no images ({', '.join(EXTENSIONS)}){lines}")
