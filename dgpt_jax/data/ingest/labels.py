"""Which class an image is of: by a file of labels, a list, its folder, or ImageNet's own list."""

import posixpath
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import tensorflow_datasets as tfds

from dgpt_jax.members import BOM, Members, text
from dgpt_jax.schema import UserError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
VALIDATION = re.compile(rb"ILSVRC2012_val_(\d{8})\.JPEG")


def apply(
    splits: dict[str, Members],
    listed: dict[str, int],
    table: dict[bytes, bytes],
    note: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Members], list[str]]:
    """The splits with their labels, and the class names that the labels count.

    `table` is that of a file of labels, `listed` the classes of a list's lines, whose numbers are
    the labels so far. `note` is given a line where folders are no classes, because images lie
    beside them. Raises UserError.
    """
    splits = dict(splits)
    named, found = {}, set()
    for split, members in splits.items():
        index, tops = members.tops()
        if table:
            index, names = _looked_up(members, table)
        elif listed:
            index, names = members.label, list(listed)
        elif b"" not in tops:
            names = [text(top) for top in tops]
        elif all(VALIDATION.fullmatch(path) for path in members.paths):
            labels = imagenet("validation_labels.txt")
            names = imagenet("labels.txt")
            place = {name: i for i, name in enumerate(names)}
            numbers = (int(VALIDATION.fullmatch(path)[1]) for path in members.paths)
            index = np.fromiter((place[labels[n - 1]] for n in numbers), np.int32, len(members))
        else:
            if len(tops) > 1:
                beside = np.flatnonzero(index == tops.index(b""))
                note(
                    f"the folders in {split} as classes, because beside them are {len(beside)} of "
                    f"its {len(members)} images, the first is "
                    f"{text(members.paths[int(beside[0])])}"
                )
            continue
        named[split] = index, names
        found |= set(names)
    for name in sorted(found):
        _refuse_name(name)
    integers = all(re.fullmatch(r"\d+", name) for name in found)
    classes = sorted(found, key=(lambda name: (int(name), name)) if integers else None)
    place = {name: i for i, name in enumerate(classes)}
    for split, (index, names) in named.items():
        label = np.array([place[name] for name in names], np.int32)[index]
        splits[split] = replace(splits[split], label=label)
    return splits, classes


def _refuse_name(name: str):
    """Raises UserError where a class could not be read back: TFDS stores a name a line, strips each
    and drops empty ones, so that all labels behind it would name the class before theirs."""
    if not name.strip():
        raise UserError(f"a class without a name ({name!r}): give each class a name")
    if name != name.strip() or len(name.splitlines()) > 1 or CONTROL.search(name):
        raise UserError(
            f"class {name!r} begins or ends with a blank, or holds a line break or a control "
            f"character: rename it"
        )


def imagenet(file: str) -> list[str]:
    """Class names as TFDS has them: of the 1000 classes, of the 50,000 validation images."""
    return tfds.core.tfds_path(f"datasets/imagenet2012/{file}").read_text().split()


def table(labels) -> dict[bytes, bytes]:
    """{file name or path: class} of a file of labels. Raises UserError."""
    found = {}
    try:
        with open(labels, "rb") as lines:
            for number, line in enumerate(lines, 1):
                line = (line.removeprefix(BOM) if number == 1 else line).strip()
                name, _, label = line.rpartition(b"\t" if b"\t" in line else b" ")
                if line and not (name and label):
                    raise UserError(
                        f"{labels}, line {number}: not a file name, TAB or space, class"
                    )
                if line and found.setdefault(name.strip(), label.strip()) != label.strip():
                    raise UserError(f"{labels}, line {number}: another class for {text(name)}")
    except OSError as e:
        raise UserError(f"--labels={labels}: {e.strerror}") from None
    return found


def _looked_up(members: Members, table) -> tuple[np.ndarray, list[str]]:
    names: dict[str, int] = {}
    index, missing = np.full(len(members), -1, np.int32), []
    for i, path in enumerate(members.paths):
        label = table.get(path, table.get(posixpath.basename(path)))
        if label is None:
            missing.append(path)
        else:
            index[i] = names.setdefault(text(label), len(names))
    if missing:
        raise UserError(
            f"--labels names no class for {len(missing)} of {len(members)} images, the first is "
            f"{text(missing[0])}"
        )
    return index, list(names)
