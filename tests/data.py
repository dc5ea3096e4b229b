"""Small datasets and models that several tests share."""

import numpy as np
from PIL import Image

from dgpt_jax import images
from dgpt_jax.config import Model
from dgpt_jax.schema import parse

# 16×16 pixels, 4×4 patches, 2×2 segments of 2×2 patches.
TINY = dict(
    width=24,
    depth=3,
    heads=2,
    patch=4,
    image_size=16,
    decoder_width=16,
    decoder_depth=2,
    decoder_heads=2,
)


def tiny_model(**changes) -> Model:
    return parse(Model, TINY | changes)


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random RGB picture with structure at several scales, like a photograph's."""
    picture = np.zeros((height, width, 3))
    for cells in (2, 4, 8):
        noise = (rng.random((cells, cells, 3)) * 255).astype(np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture += np.asarray(layer, float) / cells
    return (picture / picture.max() * 255).astype(np.uint8)


def write_folder(root, per_class: int, *, classes=("a", "b"), size=(24, 32), split="", seed=0):
    """PNG files `root/[split/]class/i.png`; the mean colour tells the class."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            picture = smooth_image(rng, *size) // 2
            picture[..., label % 3] += 100
            Image.fromarray(picture).save(folder / f"{i:03d}.png")


def image_dataset(root, per_class: int = 12, *, shard_size: int = 8, **kwargs):
    """A labelled image dataset with a train split in several shards; returns its directory."""
    write_folder(root / "folder", per_class, **kwargs)
    images.import_folder(root / "folder", root / "images", shard_size=shard_size, say=lambda _: 0)
    return root / "images"
