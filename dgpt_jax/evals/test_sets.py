"""ImageNet's test sets, where they lie and what their labels are.

Below one directory, each either as a TFDS dataset (array_record; NAME/[CONFIG/]VERSION as TFDS lays
it, or whatever tools/import_images.py made), or as it is distributed: a folder, or for those that
come as .tar the tar itself.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgpt_jax import records
from dgpt_jax.evals import imagenet
from dgpt_jax.evals.labelled import Images, Stored, folders, members_of, padded
from dgpt_jax.schema import UserError

VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG$")


@dataclass(frozen=True)
class KnownSet:
    """A test set: `places` below the directory, of which the first that is there is taken; how many
    examples count when it is whole, where that is known; how to get it; `classes` to which the
    answer is restricted."""

    name: str
    places: tuple[str, ...]
    examples: int | None
    how: str
    classes: tuple[int, ...] | None = None


_VAL = ("imagenet2012", "ILSVRC2012_img_val", "ILSVRC2012_img_val.tar", "val", "validation")
_TFDS = "`tfds build {} --file_format=array_record`"
SETS = (
    KnownSet(
        "imagenet", _VAL, 50_000,
        "ILSVRC2012_img_val.tar (sha256 c7e06a6c0baccf06…) from image-net.org, which asks to "
        "register, the tar or its folder, or TFDS imagenet2012",
    ),
    KnownSet(
        "imagenet_real", ("imagenet2012_real", *_VAL), 46_837,
        "real.json (sha256 d83e9bff374c631a…) of github.com/google-research/reassessed-imagenet "
        "beside the validation images, or TFDS imagenet2012_real",
    ),
    KnownSet(
        "imagenet_v2",
        ("imagenet_v2/matched-frequency", "imagenetv2-matched-frequency-format-val"), 10_000,
        "unpack imagenetv2-matched-frequency.tar.gz (sha256 f0c37fdf925916b1…) of "
        "huggingface.co/datasets/vaishaal/ImageNetV2, or " + _TFDS.format("imagenet_v2"),
    ),
    KnownSet(
        "imagenet_a", ("imagenet_a", "imagenet-a", "imagenet-a.tar"), 7_500,
        "imagenet-a.tar (sha256 3bb3632277e6ba63…) of github.com/hendrycks/natural-adv-examples, "
        "or " + _TFDS.format("imagenet_a"), imagenet.IMAGENET_A,
    ),
    KnownSet(
        "imagenet_r", ("imagenet_r", "imagenet-r", "imagenet-r.tar"), 30_000,
        "imagenet-r.tar (sha256 18c6bf493b39a0d9…) of github.com/hendrycks/imagenet-r, or "
        + _TFDS.format("imagenet_r"), imagenet.IMAGENET_R,
    ),
    KnownSet(
        "imagenet_sketch", ("imagenet_sketch", "sketch", "ImageNet-Sketch"), 50_889,
        "unpack ImageNet-Sketch.zip (sha256 4d3ce6b82a7c48aa…) of "
        "github.com/HaohanWang/ImageNet-Sketch, or " + _TFDS.format("imagenet_sketch"),
    ),
    KnownSet(
        "imagenet_hard", ("imagenet-hard",), 10_980,
        "huggingface.co/datasets/taesiri/imagenet-hard (checksum not known; later revisions hold "
        "fewer images): its images as files, and labels.json, {file name: [class numbers]}, beside",
    ),
    KnownSet(
        "objectnet", ("objectnet-1.0",), None,
        "unpack objectnet-1.0.zip of objectnet.dev (checksum not known): folders images and "
        "mappings",
    ),
)  # fmt: skip
IMAGENET_C = KnownSet(
    "imagenet_c", ("imagenet2012_corrupted", "imagenet-c", "ImageNet-C", "imagenet_c"), 50_000,
    "unpack blur, digital, noise and weather.tar of zenodo.org/record/2235448 (checksums not known "
    "here) into imagenet-c, or " + _TFDS.format("imagenet2012_corrupted"),
)  # fmt: skip


REAL_WIDTH = 16  # ReaL has at most 9 labels an image


def find(root: Path, known: KnownSet):
    """The test set below a directory, or None. Raises UserError on one that cannot be used."""
    path = next((p for place in known.places if (p := root / place).exists()), None)
    if path is None:
        return None
    stored = _tfds(path)
    if known.name == "imagenet_real":
        if path.name == known.places[0]:
            return _classes(stored, "real_label", REAL_WIDTH) if stored else None
        file = root / "real.json"
        return _real(file, path, stored) if file.is_file() else None
    if known.name == "imagenet_hard":
        return _listed(path)
    if known.name == "objectnet":
        return _objectnet(path)
    return _classes(stored, "label") if stored else folders(path)


def find_corrupted(root: Path, corruption: str, severity: int):
    """One of ImageNet-C's 75, or None. Folders may lie in those of the four tars."""
    for place in IMAGENET_C.places:
        if stored := _tfds(root / place / f"{corruption}_{severity}"):
            return _classes(stored, "label")
        for inner in ("", "noise", "blur", "weather", "digital"):
            path = root / place / inner / corruption / str(severity)
            if path.is_dir():
                return folders(path)
    return None


def _tfds(path: Path) -> Path | None:
    """The TFDS directory at a path: itself, or its newest version."""
    if (path / "dataset_info.json").is_file():
        return path
    versions = [p.parent for p in path.glob("*/dataset_info.json") if p.parent.name[0].isdigit()]
    return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], default=None)


def _split(directory: Path) -> records.Split:
    """The test split of a TFDS directory, whatever it is called."""
    names = records.open_builder(directory).info.splits
    # TFDS's imagenet2012 has a `test`, too, without labels.
    name = next((n for n in ("validation", "val", "test", *names) if n in names), "test")
    return records.Split(directory, name)


def _classes(directory: Path, field: str, width: int = 1) -> Stored:
    """A TFDS dataset, `field` of which is a class or a list of them."""
    split = _split(directory)
    if field not in split.features:
        raise UserError(f"{split} has no {field}")
    feature = split.features[field]
    names = getattr(feature, "feature", feature).names
    numbers = np.array(imagenet.class_indices(names, split))
    return Stored(split, lambda record: numbers[np.atleast_1d(record[field]).astype(int)], width)


def _real(file: Path, path: Path, stored: Path | None):
    """The validation images with the labels of real.json, those without any among them."""
    real = _json(file)
    if len(real) != 50_000:
        raise UserError(f"{file} has labels of {len(real)} images, not of ImageNet's 50000")

    def labels(name: str) -> list[int]:
        number = VALIDATION.search(name)
        if not number:
            raise UserError(
                f"{path}: {name} is not called ILSVRC2012_val_NUMBER.JPEG, and {file} goes by "
                f"these numbers"
            )
        return real[int(number[1]) - 1]

    if stored:
        return Stored(_split(stored), lambda record: labels(record["id"]), REAL_WIDTH)
    members = members_of(path)
    names = (members[i].id for i in range(len(members)))
    return Images(path, members, padded([labels(name) for name in names]))


def _listed(path: Path) -> Images:
    """A folder of images, and labels.json in it."""
    labels, members = _json(path / "labels.json"), members_of(path)
    names = [members[i].id for i in range(len(members))]
    if missing := [name for name in names if name not in labels]:
        raise UserError(f"{path}/labels.json has no labels of {len(missing)} images: {missing[0]}")
    return Images(path, members, padded([labels[name] for name in names]))


def _objectnet(path: Path) -> Images:
    """The folders whose class ImageNet has too; a border of 2 pixels (red) is cut off."""
    mappings = path / "mappings"
    label_of = _json(mappings / "folder_to_objectnet_label.json")
    imagenet_of = _json(mappings / "objectnet_to_imagenet_1k.json")
    numbers = {
        int(v): int(k) for k, v in _json(mappings / "pytorch_to_imagenet_2012_id.json").items()
    }
    lines = _text(mappings / "imagenet_to_label_2012_v2").splitlines()
    number_of = {line.strip(): numbers[i] for i, line in enumerate(lines)}

    def classes(folders: Sequence[str]) -> list[list[int]]:
        named = [imagenet_of.get(label_of.get(folder, ""), "") for folder in folders]
        return [[number_of[name] for name in names.split("; ") if name] for names in named]

    return folders(path / "images", classes, crop=2)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def _json(path: Path):
    try:
        return json.loads(_text(path))
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
