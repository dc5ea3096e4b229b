"""Where the images of a collection lie: folders, lists and tars, seen as one tree of paths.

    SRC/*.jpg                      a folder: one split, no labels
    SRC/CLASS/*.jpg                one split, labels
    SRC/{train,val,test,…}/CLASS/… a split a folder, with or without class folders
    SRC.tar                        a tar of such a folder. A tar in a folder or in a tar counts as a
                                   folder of its name, so ImageNet's files are taken as they are:
                                   ILSVRC2012_img_{train,val,test…}.tar, alone or in one folder, and
                                   ImageNet-21K's class tars, in a tar or in a folder
    SRC.txt                        a list: a path a line, relative to the list's folder, and perhaps
                                   a TAB and the class

An image's id is its path below the split's folder, CLASS/file, in a tar as in the folder that it
unpacks to. A folder around all the others is left out. Labels come from --labels, else the list,
else class folders, else, for ILSVRC2012_val_*.JPEG, ImageNet's own list. Classes are sorted, by
value where all are integers; with ImageNet's validation images they are ImageNet's 1000.
"""

import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgpt_jax import class_labels, shards, tars
from dgpt_jax.image_walk import Passed, Walk, unpack_first
from dgpt_jax.members import Members, text
from dgpt_jax.schema import UserError
from dgpt_jax.user_images import EXTENSIONS

SPLITS = ("train", "val", "valid", "validation", "test")
IMAGENET = re.compile(rb"ILSVRC2012_img_(train|val|test)(_v\d+)?")
# Folders that hold a split, or an image's annotation, rather than a class.
NO_CLASS = re.compile(
    r"(train|training|trainval|val|valid|validation|eval|dev|test|testing|unlabell?ed)"
    r"([-_ ]?(set|data|images|split))?[-_ ]?\d*"
    r"|(jpeg|png)?images?|annotations?|imagesets|labels?|masks?|segmentations?|segmentation"
    r"(class|object)(aug|raw)?|(gt|ground[-_ ]?truth|instance|semantic|depth)s?|gtfine|leftimg8bit",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Found:
    """Splits by name, class names (none: no labels) and what was passed over."""

    splits: dict[str, Members]
    classes: list[str]
    passed: Passed

    @property
    def bytes(self) -> int:
        return sum(int(members.size.clip(0).sum()) for members in self.splits.values())

    def digest(self) -> str:
        """Of all that decides what is written, but for the files' contents.

        Paths are padded to one width, as they once were in memory: imports begun then resume.
        """
        state = hashlib.sha256("\n".join(self.classes).encode())
        for name, members in self.splits.items():
            width = members.paths.width
            state.update(f"{name} |S{width}".encode())
            for path in members.paths:
                state.update(path.ljust(width, b"\0"))
            for column in (members.offset, members.size, members.label):
                state.update(np.ascontiguousarray(column))
        return state.hexdigest()[:16]


def find(src, *, split: str | None = None, labels=None, say=lambda _: None) -> Found:
    """The images of a folder, tar or list `src`; `labels` is a file of "name<TAB or space>class".

    `split` names the one split of a source without split folders. `say` hears of every million
    images; for 14 million in a tar it takes minutes and 2 GB. Raises UserError.
    """
    if split and (split == "all" or not re.fullmatch(r"\w[\w-]*", split)):  # as TFDS reads them
        raise UserError(f"--split={split}: letters, digits, _ and - make a split's name, not 'all'")
    if shards.is_remote(src):
        raise UserError(f"{src} is not on this machine's disks: copy or mount it")
    src = Path(src)
    if not src.exists():
        raise UserError(f"no such file or directory: {src}")
    if not (src.is_dir() or src.is_file()):
        raise UserError(f"{src} is a pipe, socket or device: give a folder, tar or list")
    table = class_labels.table(labels) if labels else {}
    walk = Walk(say, _folder_of)
    try:
        default = _gather(walk, src)
    except OSError as e:  # permissions, or files that vanish
        raise UserError(f"{text(os.fsencode(e.filename or src))}: {e.strerror}") from e
    members = walk.columns.members()
    if not len(members):
        if walk.passed.compressed:
            raise UserError(unpack_first(walk.passed.compressed[0], "gunzip"))
        lines = "".join(f"; {line}" for line in walk.passed.lines())
        raise UserError(f"{src} holds no images ({', '.join(EXTENSIONS)}), at no depth{lines}")
    if walk.classes or walk.elsewhere:
        splits = {split or default: members}
    else:
        splits = _splits(members, src, split, default)
    splits = {name: _in_order(part) for name, part in splits.items()}
    splits, classes = class_labels.apply(splits, walk.classes, table, walk.passed.notes.append)
    if not (split or walk.classes or table):
        _refuse_no_classes(src, classes)
    return Found(splits, classes, walk.passed)


def _gather(walk: Walk, src: Path) -> str:
    """Lists the images of `src`; the name of their split where no folder tells it."""
    if src.is_dir():
        walk.folder(os.fsencode(src))
    elif tool := tars.compression(src):
        raise UserError(unpack_first(src, tool))
    elif tars.is_tar(src):
        walk.tar(os.fsencode(src))
        name = text(_folder_of(os.fsencode(src.stem)))
        return name if name in SPLITS else "train"
    else:
        walk.list(src)
    return "train"


def _folder_of(name: bytes) -> bytes:
    """The folder that a tar or folder stands for: its name, or TFDS's name of ImageNet's split."""
    known = IMAGENET.fullmatch(name)
    return {b"val": b"validation"}.get(known[1], known[1]) if known else name


def _splits(members: Members, src, split: str | None, default: str) -> dict[str, Members]:
    index, tops = members.tops()
    while len(tops) == 1 and tops[0] and text(tops[0]) not in SPLITS:
        inner = members.below(tops[0])
        inner_index, inner_tops = inner.tops()
        if b"" in inner_tops:
            break
        members, index, tops = inner, inner_index, inner_tops
    named = sorted(top for top in tops if text(top) in SPLITS)
    others = sorted(text(top) or "images of its own" for top in tops if top not in named)
    if named and others and not split:
        raise UserError(
            f"{src} holds {', '.join(map(text, named))} and beside that {', '.join(others[:3])}"
            f"{', …' * (len(others) > 3)}: if these are all classes, give --split=train; if the "
            f"first are splits, move the others away"
        )
    if named and not others:
        return {text(top): members.take(index == tops.index(top)).below(top) for top in named}
    return {split or default: members}


def _refuse_no_classes(src, classes: list[str]):
    """Raises UserError where folders that look like splits or annotations would be classes: images
    to be measured on would be trained on."""
    named = [name for name in classes if NO_CLASS.fullmatch(name)]
    if named and len(classes) > 1:  # one alone is just a folder around all
        raise UserError(
            f"{src}: the folder{'s' * (len(named) > 1)} {', '.join(named[:6])} would be among "
            f"{len(classes)} classes: rename splits to {'/'.join(SPLITS)} and move all else away; "
            f"if these are classes, give --split=train"
        )


def _in_order(members: Members) -> Members:
    """Sorted by first folder, then path. Raises UserError where a path is there twice."""
    members = members.sorted()
    twice = [i for i, (a, b) in enumerate(itertools.pairwise(members.paths)) if a == b]
    if twice:
        places = {text(members[twice[0] + i].file): None for i in range(2)}
        raise UserError(
            f"{len(twice)} images are there twice, the first is {members[twice[0]].id}, in "
            f"{' and '.join(places)}: remove one of each"
        )
    return members
