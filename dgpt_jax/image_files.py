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
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgpt_jax import class_labels, shards, tars
from dgpt_jax.members import OWN_FILE, Columns, Members, text
from dgpt_jax.schema import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = ("train", "val", "valid", "validation", "test")
IMAGENET = re.compile(rb"ILSVRC2012_img_(train|val|test)(_v\d+)?")
PACKED = (b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz", b".tar.zst", b".zip")


@dataclass(frozen=True)
class Found:
    """Splits by name, class names (none: no labels) and compressed files that were passed over."""

    splits: dict[str, Members]
    classes: list[str]
    ignored: list[str]

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
    if shards.is_remote(src):
        raise UserError(f"{src} is not on this machine's disks: copy or mount it")
    src = Path(src)
    if not src.exists():
        raise UserError(f"no such file or directory: {src}")
    table = class_labels.table(labels) if labels else {}
    walk = _Walk(say)
    default = "train"
    if src.is_dir():
        walk.folder(os.fsencode(src))
    elif tool := tars.compression(src):
        raise UserError(_unpack_first(src, tool))
    elif tars.is_tar(src):
        walk.tar(os.fsencode(src))
        name = text(_folder_of(os.fsencode(src.stem)))
        default = name if name in SPLITS else default
    else:
        walk.list(src)
    members = walk.columns.members()
    if not len(members):
        if walk.ignored:
            raise UserError(_unpack_first(walk.ignored[0], "gunzip"))
        raise UserError(f"{src} holds no images ({', '.join(EXTENSIONS)}), at no depth")
    if walk.classes or walk.elsewhere:
        splits = {split or default: members}
    else:
        splits = _splits(members, src, split, default)
    splits = {name: _in_order(part) for name, part in splits.items()}
    splits, classes = class_labels.apply(splits, walk.classes, table)
    return Found(splits, classes, walk.ignored)


class _Walk:
    """Gathers the images of a source; class names and paths elsewhere are those of a list."""

    def __init__(self, say):
        self.columns, self.ignored = Columns(say), []
        self.classes: dict[str, int] = {}
        self.elsewhere = False

    def folder(self, folder: bytes, prefix: bytes = b"", above: tuple = ()):
        """Follows links to folders, but not round in circles."""
        real = os.path.realpath(folder)
        if real in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    inside = prefix + _folder_of(entry.name) + b"/"
                    self.folder(entry.path, inside, (*above, real))
                elif entry.name.endswith(b".tar"):
                    self.tar(entry.path, prefix + _folder_of(entry.name[:-4]) + b"/")
                elif _is_image(entry.name):
                    try:
                        size = entry.stat().st_size
                    except OSError:  # a link to nothing: among the unreadable files, later
                        size = -1
                    self.columns.add(prefix + entry.name, folder, OWN_FILE, size)
                elif entry.name.lower().endswith(PACKED):
                    self.ignored.append(text(entry.path))

    def tar(self, path: bytes, prefix: bytes = b""):
        if tool := tars.compression(path):
            raise UserError(_unpack_first(text(path), tool))
        with open(path, "rb") as file:
            self._members(file.fileno(), path, text(path), prefix, 0, None)

    def _members(self, file: int, path: bytes, called: str, prefix: bytes, start: int, end):
        for name, offset, size in tars.members(file, called, start, end):
            folder, base = posixpath.split(name)
            if name.endswith(b".tar"):
                inside = prefix + posixpath.join(folder, _folder_of(base[:-4])) + b"/"
                self._members(
                    file, path, f"{text(name)} in {called}", inside, offset, offset + size
                )
            elif _is_image(base):
                self.columns.add(prefix + name, path, offset, size)
            elif base.lower().endswith(PACKED):
                self.ignored.append(f"{text(name)} in {called}")

    def list(self, src: Path):
        """Every line counts, whatever the file's extension."""
        folder, with_class = os.fsencode(src.parent), None
        with src.open("rb") as lines:
            if b"\0" in lines.read(4096):
                raise UserError(f"{src} is neither a folder nor a tar nor a list of image files")
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                path, tab, name = line.strip(b"\r\n").partition(b"\t")
                if not path:
                    continue
                if with_class not in (None, bool(tab)):
                    raise UserError(f"{src}, line {number}: a TAB and a class in all lines or none")
                with_class = bool(tab)
                file = os.path.join(folder, path)
                try:
                    size = os.stat(file).st_size
                except OSError as e:
                    raise UserError(f"{src}, line {number}: {text(file)}: {e.strerror}") from None
                label = self.classes.setdefault(text(name), len(self.classes)) if tab else -1
                path = posixpath.normpath(path)
                self.elsewhere |= path.startswith((b"/", b"../"))
                self.columns.add(path, os.path.dirname(file), OWN_FILE, size, label)


def _is_image(name: bytes) -> bool:
    # "._x.jpg" is what macOS notes beside x.jpg.
    return not name.startswith(b"._") and text(name[-6:]).lower().endswith(EXTENSIONS)


def _folder_of(name: bytes) -> bytes:
    """The folder that a tar or folder stands for: its name, or TFDS's name of ImageNet's split."""
    known = IMAGENET.fullmatch(name)
    return {b"val": b"validation"}.get(known[1], known[1]) if known else name


def _unpack_first(path, tool: str) -> str:
    return (
        f"{path} is compressed, so that images in it cannot be read by themselves: {tool} it first"
    )


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
