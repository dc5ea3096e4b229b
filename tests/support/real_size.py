"""Image datasets and token stores of real record size: 224² images, 257 × 1024 int8 tokens.

A one-layer teacher with random weights builds the first records; further shards and views are hard
links to them, so a store of 40,000 records needs the disk space of 1,024 (0.3 GB).
"""

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dgpt_jax.config import TokensConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import token_store
from dgpt_jax.data.ingest import importer
from dgpt_jax.models import teacher_vit
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.tokens import build
from tests.support import data

TOWER = teacher_vit.TeacherArchitecture(
    image_size=224, patch=14, width=64, depth=1, heads=1, mlp_width=64, out_width=1024,
    activation="gelu",
)  # fmt: skip
PHOTOS = 32  # distinct images; crops differ per file


def photo(rng: np.random.Generator, height: int = 300, width: int = 400) -> Image.Image:
    """A random image whose JPEG is as large as a photograph's."""
    noise = rng.normal(0, 8, (height, width, 3))
    image = data.smooth_image(rng, height, width) + noise
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, count: int, *, classes: int = 10) -> Path:
    """Writes `count` JPEG files in class folders, hard links to PHOTOS files beside the folder."""
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
    """Builds a labeled token store of `examples` records per view. Returns its path.

    directory: new or empty, for the store and its inputs. distinct: records computed by the
    teacher; the others are links to them and repeat ids. Both must be multiples of shard_size.
    """
    if examples % shard_size or distinct % shard_size:
        raise ValueError(f"{examples} and {distinct} examples are not multiples of {shard_size}")
    directory = Path(directory)
    dataset, teacher = directory / "images", directory / "teacher"
    photos = write_photos(directory / "photos", min(examples, distinct))
    importer.import_images(photos, dataset, say=lambda _: None)
    data.random_teacher(teacher, tower=TOWER)
    settings = dict(source=str(dataset), teacher={"weights": str(teacher)}, shard_size=shard_size)
    build.build(parse(TokensConfig, settings), directory / "built")
    return _repeat(directory / "built", directory / "tokens", examples, views)


def _repeat(src: Path, dst: Path, examples: int, views: int) -> Path:
    """Writes a store whose shards are links to those of `src`, repeated in turn."""
    info = token_store.StoreInfo.load(src)
    label = tfds_dataset.Split(src, token_store.view_split(0)).label
    sources = sorted(array_record_shards.manifest(src).items())
    count = examples // info.views["shard_size"]
    dst.mkdir()
    dataclasses.replace(info, source=info.source | {"examples": examples}).save(dst)
    manifest, splits = {}, {}
    for split in map(token_store.view_split, range(views)):
        splits[split] = []
        for shard, (original, shard_info) in zip(range(count), itertools.cycle(sources)):
            path = tfds_dataset.shard_path(dst, split, shard, count, info.name)
            os.link(src / original, path)
            manifest[path.name] = shard_info
            splits[split].append(shard_info)
    tfds_dataset.write_metadata(dst, token_store.features(info, label), splits, info.name)
    array_record_shards.write_manifest(dst, manifest)
    return dst


def bytes_read() -> int:
    """Bytes read by this process so far, from the page cache too."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
