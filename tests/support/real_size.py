"""Image datasets and token stores of real record size: 224² pictures, 257 × 1024 int8 tokens.

A one-layer teacher of random weights builds the first records; further shards and views are hard
links to theirs, so that a store of 40,000 records takes the disk of 1,024 (0.3 GB).
"""

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dgpt_jax import build, images, records, shards, token_store, towers
from dgpt_jax.config import Tokens
from dgpt_jax.schema import parse
from tests import data

TOWER = towers.Tower(
    image_size=224, patch=14, width=64, depth=1, heads=1, mlp_width=64, out_width=1024,
    activation="gelu",
)  # fmt: skip
PHOTOS = 32  # different ones; crops differ from file to file


def photo(rng: np.random.Generator, height: int = 300, width: int = 400) -> Image.Image:
    """A random picture whose JPEG has the size of a photograph's."""
    noise = rng.normal(0, 8, (height, width, 3))
    picture = data.smooth_image(rng, height, width) + noise
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, count: int, *, classes: int = 10) -> Path:
    """`count` JPEG files in class folders, hard links to PHOTOS files beside the folder."""
    originals = folder.parent / f"{folder.name}-originals"
    originals.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(min(PHOTOS, count)):
        photo(rng).save(originals / f"{i}.jpg", quality=90)
    for label in range(classes):
        (folder / f"class{label:04d}").mkdir(parents=True)
    for i in range(count):
        file = folder / f"class{i % classes:04d}" / f"{i:08d}.jpg"
        os.link(originals / f"{i % PHOTOS}.jpg", file)
    return folder


def real_store(
    directory, examples: int, *, views: int = 1, distinct: int = 1024, shard_size: int = 256
) -> Path:
    """The directory of a labelled token store of `examples` records a view.

    directory: new or empty, for the store and what it is made of. distinct: records that the
    teacher computes; others are links to them, so that ids repeat. Both are whole shards.
    """
    if examples % shard_size or distinct % shard_size:
        raise ValueError(f"{examples} and {distinct} examples are not whole shards of {shard_size}")
    directory = Path(directory)
    dataset, teacher = directory / "images", directory / "teacher"
    photos = write_photos(directory / "photos", min(examples, distinct))
    images.import_images(photos, dataset, say=lambda _: None)
    data.random_teacher(teacher, tower=TOWER)
    settings = dict(source=str(dataset), teacher={"weights": str(teacher)}, shard_size=shard_size)
    build.build(parse(Tokens, settings), directory / "built")
    return _repeat(directory / "built", directory / "tokens", examples, views)


def _repeat(src: Path, dst: Path, examples: int, views: int) -> Path:
    """Writes a store whose shards are those of `src`, in turn, under further names."""
    info = token_store.StoreInfo.load(src)
    label = records.Split(src, token_store.view_split(0)).label
    receipts = sorted(shards.manifest(src).items())
    count = examples // info.views["shard_size"]
    dst.mkdir()
    dataclasses.replace(info, source=info.source | {"examples": examples}).save(dst)
    known, written = {}, {}
    for split in map(token_store.view_split, range(views)):
        written[split] = []
        for shard, (original, receipt) in zip(range(count), itertools.cycle(receipts)):
            path = records.shard_path(dst, split, shard, count, info.name)
            os.link(src / original, path)
            known[path.name] = receipt
            written[split].append(receipt)
    records.write_metadata(dst, token_store.features(info, label), written, info.name)
    shards.seal(dst, known)
    return dst


def bytes_read() -> int:
    """Bytes that this process has read from files so far, those in the page cache as well."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
