"""scikit-learn's 1,797 handwritten digits as image files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.data import image_ops
from dgpt_jax.storage import tfds_dataset

SIZE, TEST_SIZE = 1797, 360  # images in all and in the test split
Show = Callable[[int, int], None]  # is given the number of written files, and of all


def ignore(done: int, total: int):
    """Shows no progress."""


def load_digits() -> Iterator[tuple[str, int, int, np.ndarray]]:
    """Yields (split, index, label, alpha) of each digit; alpha is float (8, 8) from 0 to 1."""
    with cli.needs("quickstart"):
        from sklearn import datasets

    digits: Any = datasets.load_digits()
    images, labels = digits.images, digits.target
    order = np.random.default_rng(0).permutation(len(images))
    for rank, i in enumerate(order):
        yield "test" if rank < TEST_SIZE else "train", int(i), int(labels[i]), images[i] / 16


def write_digits(folder: Path, size: int = 32, show: Show = ignore):
    """Writes the digits, size×size pixels, to folder/{train,test}/CLASS/i.{png,jpg}."""
    for rank, (split, i, label, alpha) in enumerate(load_digits()):
        image = Image.fromarray((alpha * 255).astype(np.uint8))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        save(image, folder / split / str(label) / f"{i:04d}", lossless=bool(i % 2))
        show(rank + 1, SIZE)


def save(image: Image.Image, path: Path, *, lossless: bool):
    """Writes path.png or path.jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if lossless:
        image.save(f"{path}.png")
    else:
        image.save(f"{path}.jpg", quality=95)


def read_images(dataset: Path | str, split: str, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, size, size, 3), and labels (N,) of a split: those whose file name without
    its extension ends with `suffix`."""
    examples = [
        example
        for example in tfds_dataset.Split(dataset, split)
        if Path(example["id"]).stem.endswith(suffix)
    ]
    images = np.stack([image_ops.decode_image(e["image"]) for e in examples])
    return images, np.array([e["label"] for e in examples])
