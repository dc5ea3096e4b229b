"""Layout of a tree of paths: split folders, class folders, ImageNet's own archives."""

import itertools
import re
from collections.abc import Callable

from dgpt_jax.data.ingest.image_index import ImageIndex, text
from dgpt_jax.data.ingest.shard_files import SPLITS
from dgpt_jax.errors import UserError, counted

IMAGENET = re.compile(rb"ILSVRC2012_img_(train|val|test)(_v\d+)?")
# Names of folders with a split or with annotations, rather than a class.
NO_CLASS = re.compile(
    r"(train|training|trainval|val|valid|validation|eval|dev|test|testing|unlabell?ed)"
    r"([-_ ]?(set|data|images|split))?[-_ ]?\d*"
    r"|(jpeg|png)?images?|annotations?|imagesets|labels?|masks?|segmentations?|segmentation"
    r"(class|object)(aug|raw)?|(gt|ground[-_ ]?truth|instance|semantic|depth)s?|gtfine|leftimg8bit",
    re.IGNORECASE,
)
NUMBERED = re.compile(rb"(.*?)(\d{3,})\.tar")


def folder_name(name: bytes) -> bytes:
    """Returns the folder name of a tar or folder: TFDS's split name if it is ImageNet's."""
    match = IMAGENET.fullmatch(name)
    return {b"val": b"validation"}.get(match[1], match[1]) if match else name


def divide(
    images: ImageIndex,
    src: str,
    split: str | None,
    default: str,
    note: Callable[[str], None] | None = None,
) -> dict[str, ImageIndex]:
    """Divides images by split folders, if there are any; drops folders around all others. The one
    that holds all images is dropped as well, and `note` logs a line; without `note` it is kept.
    Raises UserError.
    """
    index, tops = images.top_dirs()
    while len(tops) == 1 and tops[0] and text(tops[0]) not in SPLITS:
        inner = images.strip_prefix(tops[0])
        inner_index, inner_tops = inner.top_dirs()
        if inner_tops == [b""] and note:
            note(f"the folder {text(tops[0])} as a class, because it holds all images")
        elif b"" in inner_tops:
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


def check_class_names(src: str, classes: list[str]):
    """Raises UserError if classes are named like splits or annotations: test images would be
    trained on."""
    suspicious = [name for name in classes if NO_CLASS.fullmatch(name)]
    if suspicious and len(classes) > 1:  # a single one is a folder around all images
        raise UserError(
            f"{src}: {', '.join(suspicious[:6])} would be among its {len(classes)} classes: rename "
            f"splits to {'/'.join(SPLITS)} and move other folders; if these are classes, set "
            f"--split=train"
        )


def sorted_unique(images: ImageIndex) -> ImageIndex:
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


def check_numbered_tars(tars: list[bytes]):
    """Raises UserError if tars are numbered from 0 or 1 on, as the shards of a WebDataset are:
    each would be a class."""
    numbers: dict[bytes, list[int]] = {}
    for tar in tars:
        if match := NUMBERED.fullmatch(tar):
            numbers.setdefault(match[1], []).append(int(match[2]))
    for prefix, shards in numbers.items():
        first = min(shards)
        if (
            len(shards) > 1
            and first < 2
            and sorted(shards) == list(range(first, first + len(shards)))
        ):
            raise UserError(
                f"{text(prefix)}….tar is ambiguous: if the {len(shards)} tars are shards of a "
                f"WebDataset without labels, give a pattern, '{text(prefix)}{{000..999}}.tar'; if "
                f"each is a class, set --split=train"
            )
