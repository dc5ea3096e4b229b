"""ImageNet's test sets: their files below one directory, and their labels.

Each is either a TFDS dataset (array_record; TFDS's NAME/[CONFIG/]VERSION, or an import by
tools/import_images.py) or the distributed form: a directory, or the .tar itself if it comes as one.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.errors import UserError, counted
from dgpt_jax.evals import imagenet
from dgpt_jax.evals.labelled import FileImages, StoredImages, folders, list_files, padded
from dgpt_jax.storage import tfds_dataset

TestSource = FileImages | StoredImages
VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG$")


@dataclass(frozen=True)
class TestSet:
    """A test set. locations: paths below the directory, the first that exists is used. examples:
    number of examples that count in the complete set, None if unknown. source: how to obtain it.
    classes: the classes that a prediction may have, None for all 1000."""

    name: str
    locations: tuple[str, ...]
    examples: int | None
    source: str
    classes: tuple[int, ...] | None = None


_VAL = ("imagenet2012", "ILSVRC2012_img_val", "ILSVRC2012_img_val.tar", "val", "validation")
_TFDS = "`tfds build {} --file_format=array_record`"
SETS = (
    TestSet(
        "imagenet", _VAL, 50_000,
        "ILSVRC2012_img_val.tar (sha256 c7e06a6c0baccf06…) from image-net.org, which asks to "
        "register, the tar or its folder, or TFDS imagenet2012",
    ),
    TestSet(
        "imagenet_real", ("imagenet2012_real", *_VAL), 46_837,
        "real.json (sha256 d83e9bff374c631a…) of github.com/google-research/reassessed-imagenet "
        "beside the validation images, or TFDS imagenet2012_real",
    ),
    TestSet(
        "imagenet_v2",
        ("imagenet_v2/matched-frequency", "imagenetv2-matched-frequency-format-val"), 10_000,
        "unpack imagenetv2-matched-frequency.tar.gz (sha256 f0c37fdf925916b1…) of "
        "huggingface.co/datasets/vaishaal/ImageNetV2, or " + _TFDS.format("imagenet_v2"),
    ),
    TestSet(
        "imagenet_a", ("imagenet_a", "imagenet-a", "imagenet-a.tar"), 7_500,
        "imagenet-a.tar (sha256 3bb3632277e6ba63…) of github.com/hendrycks/natural-adv-examples, "
        "or " + _TFDS.format("imagenet_a"), imagenet.IMAGENET_A,
    ),
    TestSet(
        "imagenet_r", ("imagenet_r", "imagenet-r", "imagenet-r.tar"), 30_000,
        "imagenet-r.tar (sha256 18c6bf493b39a0d9…) of github.com/hendrycks/imagenet-r, or "
        + _TFDS.format("imagenet_r"), imagenet.IMAGENET_R,
    ),
    TestSet(
        "imagenet_sketch", ("imagenet_sketch", "sketch", "ImageNet-Sketch"), 50_889,
        "unpack ImageNet-Sketch.zip (sha256 4d3ce6b82a7c48aa…) of "
        "github.com/HaohanWang/ImageNet-Sketch, or " + _TFDS.format("imagenet_sketch"),
    ),
    TestSet(
        "imagenet_hard", ("imagenet-hard",), 10_980,
        "huggingface.co/datasets/taesiri/imagenet-hard (checksum not known; later revisions hold "
        "fewer images): its images as files, and labels.json, {file name: [class numbers]}, beside",
    ),
    TestSet(
        "objectnet", ("objectnet-1.0",), None,
        "unpack objectnet-1.0.zip of objectnet.dev (checksum not known): folders images and "
        "mappings",
    ),
)  # fmt: skip
IMAGENET_C = TestSet(
    "imagenet_c", ("imagenet2012_corrupted", "imagenet-c", "ImageNet-C", "imagenet_c"), 50_000,
    "unpack blur, digital, noise and weather.tar of zenodo.org/record/2235448 (checksums not known "
    "here) into imagenet-c, or " + _TFDS.format("imagenet2012_corrupted"),
)  # fmt: skip


REAL_WIDTH = 16  # ReaL has at most 9 labels per image


def find(root: Path, test_set: TestSet) -> TestSource | None:
    """The test set below a directory, or None. Raises UserError if its files are unusable."""
    path = next((p for name in test_set.locations if (p := root / name).exists()), None)
    if path is None:
        return None
    stored = _tfds(path)
    if test_set.name == "imagenet_real":
        if path.name == test_set.locations[0]:
            return _classes(stored, "real_label", REAL_WIDTH) if stored else None
        file = root / "real.json"
        return _real(file, path, stored) if file.is_file() else None
    if test_set.name == "imagenet_hard":
        return _with_labels_json(path)
    if test_set.name == "objectnet":
        return _objectnet(path)
    return _classes(stored, "label") if stored else folders(path)


def find_corrupted(root: Path, corruption: str, severity: int) -> TestSource | None:
    """One of ImageNet-C's 75 sets, or None. Directories may be those of the four tars."""
    for name in IMAGENET_C.locations:
        if stored := _tfds(root / name / f"{corruption}_{severity}"):
            return _classes(stored, "label")
        for inner in ("", "noise", "blur", "weather", "digital"):
            path = root / name / inner / corruption / str(severity)
            if path.is_dir():
                return folders(path)
    return None


def _tfds(path: Path) -> Path | None:
    """The TFDS directory at a path: itself, or its newest version."""
    if (path / "dataset_info.json").is_file():
        return path
    versions = [p.parent for p in path.glob("*/dataset_info.json") if p.parent.name[0].isdigit()]
    return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], default=None)


def _split(directory: Path) -> tfds_dataset.Split:
    """The test split of a TFDS directory, under any of its names."""
    names = tfds_dataset.open_builder(directory).info.splits
    # TFDS's imagenet2012 also has a `test` split, without labels.
    name = next((n for n in ("validation", "val", "test", *names) if n in names), "test")
    return tfds_dataset.Split(directory, name)


def _classes(directory: Path, field: str, width: int = 1) -> StoredImages:
    """A TFDS dataset whose `field` is a class or a list of classes."""
    split = _split(directory)
    features: Any = split.features
    if field not in features:
        raise UserError(f"{split} has no field {field}")
    feature = features[field]
    names = getattr(feature, "feature", feature).names
    numbers = np.array(imagenet.class_indices(names, split))
    return StoredImages(
        split, lambda record: numbers[np.atleast_1d(record[field]).astype(int)], width
    )


def _real(file: Path, path: Path, stored: Path | None) -> TestSource:
    """The validation images with the labels of real.json, including images without any."""
    real = _json(file)
    if len(real) != 50_000:
        raise UserError(f"{file} has labels of {len(real)} images instead of 50000")

    def labels(name: str) -> list[int]:
        number = VALIDATION.search(name)
        if not number:
            raise UserError(
                f"{path}: {name} is not named ILSVRC2012_val_NUMBER.JPEG, which {file} needs"
            )
        return real[int(number[1]) - 1]

    if stored:
        return StoredImages(_split(stored), lambda record: labels(record["id"]), REAL_WIDTH)
    files = list_files(path)
    names = (files[i].id for i in range(len(files)))
    return FileImages(path, files, padded([labels(name) for name in names]))


def _with_labels_json(path: Path) -> FileImages:
    """A directory of images and labels.json."""
    labels, files = _json(path / "labels.json"), list_files(path)
    names = [files[i].id for i in range(len(files))]
    if missing := [name for name in names if name not in labels]:
        raise UserError(
            f"{path}/labels.json lacks labels of {counted(len(missing), 'image')}, first "
            f"{missing[0]}"
        )
    return FileImages(path, files, padded([labels[name] for name in names]))


def _objectnet(path: Path) -> FileImages:
    """Folders of classes that ImageNet has too; crops the red border of 2 pixels."""
    mappings = path / "mappings"
    label_of = _json(mappings / "folder_to_objectnet_label.json")
    imagenet_of = _json(mappings / "objectnet_to_imagenet_1k.json")
    numbers = {
        int(v): int(k) for k, v in _json(mappings / "pytorch_to_imagenet_2012_id.json").items()
    }
    lines = _text(mappings / "imagenet_to_label_2012_v2").splitlines()
    number_of = {line.strip(): numbers[i] for i, line in enumerate(lines)}

    def classes(folders: Sequence[str]) -> list[list[int]]:
        names = [imagenet_of.get(label_of.get(folder, ""), "") for folder in folders]
        return [[number_of[x] for x in joined.split("; ") if x] for joined in names]

    return folders(path / "images", classes, crop=2)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
