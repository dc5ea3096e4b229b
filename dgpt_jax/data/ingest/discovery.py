"""Discovers images, splits and classes in folders, tars and lists, as one tree of paths.

    SRC/*.jpg                      a folder: one split, no labels
    SRC/CLASS/*.jpg                one split, labels
    SRC/{train,val,test,…}/CLASS/… one split per folder, with or without class folders
    SRC.tar                        a tar of such a folder. A tar in a folder or in a tar is treated
                                   as a folder of its name, so ImageNet needs no unpacking:
                                   ILSVRC2012_img_{train,val,test…}.tar, alone or in one folder, and
                                   ImageNet-21K's class tars, in a tar or in a folder
    SRC.txt                        a list: one path per line, relative to the list's folder,
                                   optionally followed by a TAB and the class

An image's id is its path below the split's folder, CLASS/file, in tars as in folders. A single
folder around all others is dropped. Labels come from --labels, else the list, else class folders,
else, for ILSVRC2012_val_*.JPEG, ImageNet's own list. Classes are sorted, numerically if all are
integers; with ImageNet's validation images they are ImageNet's 1000.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgpt_jax.data.ingest import labels as class_labels
from dgpt_jax.data.ingest import tar_index
from dgpt_jax.data.ingest.directory_walk import Skipped, Walk, unpack_first
from dgpt_jax.data.ingest.image_index import ImageIndex, text
from dgpt_jax.data.ingest.user_images import EXTENSIONS
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import gcs

SPLITS = ("train", "val", "valid", "validation", "test")
IMAGENET = re.compile(rb"ILSVRC2012_img_(train|val|test)(_v\d+)?")
# Names of folders with a split or with annotations, rather than a class.
NO_CLASS = re.compile(
    r"(train|training|trainval|val|valid|validation|eval|dev|test|testing|unlabell?ed)"
    r"([-_ ]?(set|data|images|split))?[-_ ]?\d*"
    r"|(jpeg|png)?images?|annotations?|imagesets|labels?|masks?|segmentations?|segmentation"
    r"(class|object)(aug|raw)?|(gt|ground[-_ ]?truth|instance|semantic|depth)s?|gtfine|leftimg8bit",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Discovered:
    """Splits by name, class names (empty: no labels) and skipped files."""

    splits: dict[str, ImageIndex]
    classes: list[str]
    skipped: Skipped

    @property
    def bytes(self) -> int:
        """Size of all images."""
        return sum(int(images.size.clip(0).sum()) for images in self.splits.values())

    def digest(self) -> str:
        """Returns a digest of everything that determines the dataset, except the files' contents.

        Paths are padded to one width, as earlier versions stored them: their imports can resume.
        """
        state = hashlib.sha256("\n".join(self.classes).encode())
        for name, images in self.splits.items():
            width = images.paths.width
            state.update(f"{name} |S{width}".encode())
            for path in images.paths:
                state.update(path.ljust(width, b"\0"))
            for column in (images.offset, images.size, images.label):
                state.update(np.ascontiguousarray(column).data)
        return state.hexdigest()[:16]


def discover(
    src: Path | str,
    *,
    split: str | None = None,
    labels: Path | str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Discovered:
    """Returns the images of a folder, tar or list; `labels`: a file of "name<TAB or space>class".

    `split` names the only split of a source without split folders. `say` logs every million images;
    14 million in a tar take minutes and 2 GB. Raises UserError.
    """
    if split and (split == "all" or not re.fullmatch(r"\w[\w-]*", split)):  # TFDS's syntax
        raise UserError(f"--split={split}: use letters, digits, _ and -, and not 'all'")
    if gcs.is_remote(src):
        raise UserError(f"{src} is not a local path: copy or mount it")
    src = Path(src)
    if not src.exists():
        raise UserError(f"no such file or directory: {src}")
    if not (src.is_dir() or src.is_file()):
        raise UserError(f"{src} is a pipe, socket or device: give a folder, tar or list")
    table = class_labels.read_table(labels) if labels else {}
    walk = Walk(say, _folder_name)
    try:
        default = _list_images(walk, src)
    except OSError as e:  # permissions, or files that vanish
        raise UserError(f"{text(os.fsencode(e.filename or src))}: {e.strerror}") from e
    index = walk.builder.build()
    if not len(index):
        if walk.skipped.compressed:
            raise UserError(unpack_first(walk.skipped.compressed[0], "gunzip"))
        lines = "".join(f"; {line}" for line in walk.skipped.lines())
        raise UserError(f"{src} contains no images ({', '.join(EXTENSIONS)}){lines}")
    if walk.classes or walk.elsewhere:
        splits = {split or default: index}
    else:
        splits = _divide(index, src, split, default)
    splits = {name: _sorted_unique(images) for name, images in splits.items()}
    splits, classes = class_labels.apply(splits, walk.classes, table, walk.skipped.notes.append)
    if not (split or walk.classes or table):
        _check_class_names(src, classes)
    return Discovered(splits, classes, walk.skipped)


def _list_images(walk: Walk, src: Path) -> str:
    """Adds the images of `src` to the walk; returns the default name of their split."""
    if src.is_dir():
        walk.add_folder(os.fsencode(src))
    elif tool := tar_index.compression(src):
        raise UserError(unpack_first(src, tool))
    elif tar_index.is_tar(src):
        walk.add_tar(os.fsencode(src))
        name = text(_folder_name(os.fsencode(src.stem)))
        return name if name in SPLITS else "train"
    else:
        walk.add_list(src)
    return "train"


def _folder_name(name: bytes) -> bytes:
    """Returns the folder name of a tar or folder: TFDS's split name if it is ImageNet's."""
    match = IMAGENET.fullmatch(name)
    return {b"val": b"validation"}.get(match[1], match[1]) if match else name


def _divide(
    images: ImageIndex, src: Path, split: str | None, default: str
) -> dict[str, ImageIndex]:
    """Divides images by split folders, if there are any. Raises UserError."""
    index, tops = images.top_dirs()
    while len(tops) == 1 and tops[0] and text(tops[0]) not in SPLITS:
        inner = images.strip_prefix(tops[0])
        inner_index, inner_tops = inner.top_dirs()
        if b"" in inner_tops:
            break
        images, index, tops = inner, inner_index, inner_tops
    names = sorted(top for top in tops if text(top) in SPLITS)
    others = sorted(text(top) or "images" for top in tops if top not in names)
    if names and others and not split:
        raise UserError(
            f"{src} contains {', '.join(map(text, names))} and also {', '.join(others[:3])}"
            f"{', …' * (len(others) > 3)}: if all are classes, set --split=train; if the first are "
            f"splits, move the others"
        )
    if names and not others:
        return {text(top): images.take(index == tops.index(top)).strip_prefix(top) for top in names}
    return {split or default: images}


def _check_class_names(src: Path, classes: list[str]):
    """Raises UserError if classes are named like splits or annotations: test images would be
    trained on."""
    suspicious = [name for name in classes if NO_CLASS.fullmatch(name)]
    if suspicious and len(classes) > 1:  # a single one is a folder around all images
        raise UserError(
            f"{src}: {', '.join(suspicious[:6])} would be among its {len(classes)} classes: rename "
            f"splits to {'/'.join(SPLITS)} and move other folders; if these are classes, set "
            f"--split=train"
        )


def _sorted_unique(images: ImageIndex) -> ImageIndex:
    """Returns the sorted images. Raises UserError if two have the same id."""
    images = images.sorted()
    twice = [i for i, (a, b) in enumerate(itertools.pairwise(images.paths)) if a == b]
    if twice:
        files = {text(images[twice[0] + i].file): None for i in range(2)}
        raise UserError(
            f"found {counted(len(twice), 'image')} twice, the first is {images[twice[0]].id}, in "
            f"{' and '.join(files)}: remove one of each"
        )
    return images
