"""Class labels of images: from a label file, a list, class folders, or ImageNet's own list."""

import posixpath
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dgpt_jax.data.ingest.image_index import BOM, ImageIndex, text
from dgpt_jax.errors import UserError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
VALIDATION = re.compile(rb"ILSVRC2012_val_(\d{8})\.JPEG")


def apply(
    splits: dict[str, ImageIndex],
    listed: dict[str, int],
    table: dict[bytes, bytes],
    note: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, ImageIndex], list[str]]:
    """Returns the splits with labels, and the class names that these index.

    table: of a label file. listed: classes of a list, whose numbers are the present labels. note:
    logs a line if folders are not classes, because there are images next to them. Raises UserError.
    """
    splits = dict(splits)
    labelled, all_names = {}, set()
    for split, images in splits.items():
        index, tops = images.top_dirs()
        if table:
            index, names = _look_up(images, table)
        elif listed:
            index, names = images.label, list(listed)
        elif b"" not in tops:
            names = [text(top) for top in tops]
        elif all(VALIDATION.fullmatch(path) for path in images.paths):
            labels = imagenet("validation_labels.txt")
            names = imagenet("labels.txt")
            number = {name: i for i, name in enumerate(names)}
            ids = (int(path.removesuffix(b".JPEG")[-8:]) for path in images.paths)
            index = np.fromiter((number[labels[i - 1]] for i in ids), np.int32, len(images))
        else:
            if len(tops) > 1:
                loose = np.flatnonzero(index == tops.index(b""))
                note(
                    f"the folders in {split} as classes, because {len(loose)} of its {len(images)} "
                    f"images are in none, the first is {text(images.paths[int(loose[0])])}"
                )
            continue
        labelled[split] = index, names
        all_names |= set(names)
    for name in sorted(all_names):
        check_name(name)
    integers = all(re.fullmatch(r"\d+", name) for name in all_names)
    classes = sorted(all_names, key=(lambda name: (int(name), name)) if integers else None)
    number = {name: i for i, name in enumerate(classes)}
    for split, (index, names) in labelled.items():
        label = np.array([number[name] for name in names], np.int32)[index]
        splits[split] = replace(splits[split], label=label)
    return splits, classes


def check_name(name: str):
    """Raises UserError if TFDS could not read a class name back: it stores one per line, strips
    each and drops empty ones, which would shift the labels of all classes after it."""
    if not name.strip():
        raise UserError(f"a class has no name ({name!r}): name every class")
    if name != name.strip() or len(name.splitlines()) > 1 or CONTROL.search(name):
        raise UserError(
            f"class {name!r} begins or ends with a space, or contains a line break or a control "
            f"character: rename it"
        )


def imagenet(file: str) -> list[str]:
    """Returns a list of TFDS: the 1000 class names, or the classes of the validation images."""
    return tfds.core.tfds_path(f"datasets/imagenet2012/{file}").read_text().split()


def read_table(labels: Path | str) -> dict[bytes, bytes]:
    """Reads a label file as {file name or path: class}. Raises UserError."""
    table = {}
    try:
        with open(labels, "rb") as lines:
            for number, line in enumerate(lines, 1):
                line = (line.removeprefix(BOM) if number == 1 else line).strip()
                name, _, label = line.rpartition(b"\t" if b"\t" in line else b" ")
                if line and not (name and label):
                    raise UserError(
                        f"{labels}, line {number}: not a file name, TAB or space, class"
                    )
                if line and table.setdefault(name.strip(), label.strip()) != label.strip():
                    raise UserError(f"{labels}, line {number}: a second class for {text(name)}")
    except OSError as e:
        raise UserError(f"--labels={labels}: {e.strerror}") from None
    return table


def _look_up(images: ImageIndex, table: dict[bytes, bytes]) -> tuple[np.ndarray, list[str]]:
    names: dict[str, int] = {}
    index, missing = np.full(len(images), -1, np.int32), []
    for i, path in enumerate(images.paths):
        label = table.get(path, table.get(posixpath.basename(path)))
        if label is None:
            missing.append(path)
        else:
            index[i] = names.setdefault(text(label), len(names))
    if missing:
        raise UserError(
            f"--labels has no class for {len(missing)} of {len(images)} images, the first is "
            f"{text(missing[0])}"
        )
    return index, list(names)
