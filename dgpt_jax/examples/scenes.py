"""Colored digits on photographs: an image set with captions and masks.

A scene is one of scikit-learn's 1,797 digits, in one random color, over a random square of one of
scikit-learn's two photographs. The training split has four scenes of each of 1,437 digits, over
squares from the left three fifths of the photographs; the test split has two of each of the other
360, from the right two fifths. So neither digits nor backgrounds are shared. The color is brighter
than the background under the digit by CONTRAST of luma, everything else varies: comparing pixels
tells little about the digit.
"""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.examples import digits

COPIES = {"train": 4, "test": 2}  # scenes per digit
# Columns of the photographs, as shares of their width.
COLUMNS = {"train": (0.0, 0.6), "test": (0.6, 1.0)}
SQUARES = (40, 159)  # sides in pixels of the photograph
BRIGHTNESS = 0.5  # of the background
SIDES = (0.5, 0.75)  # of the digit, as shares of the scene's side
CONTRAST = 100  # luma, of 255
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
HUES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "red")
HUE_ENDS = (0.04, 0.11, 0.19, 0.45, 0.54, 0.70, 0.80, 0.95, 1.0)
MIN_SATURATION = 0.2  # below it the color is white


@dataclass(frozen=True)
class Scene:
    """image: uint8 (size, size, 3). mask: bool (size, size), pixels of the digit. background:
    uint8 (size, size, 3) without it. color: uint8 (3,). square: (photograph, top, left, side)."""

    name: str
    label: int
    caption: str
    image: np.ndarray
    mask: np.ndarray
    background: np.ndarray
    color: np.ndarray
    square: tuple[int, int, int, int]


def make_scenes(split: str, size: int = 32) -> Iterator[Scene]:
    """Yields the scenes of a split, "train" or "test", COPIES of each digit in turn."""
    for digit_split, i, label, alpha in digits.load_digits():
        if digit_split == split:
            for copy in range(COPIES[split]):
                yield make_scene(split, i, copy, label, alpha, size)


def make_scene(
    split: str, digit: int, copy: int, label: int, alpha: np.ndarray, size: int
) -> Scene:
    """The scene number `copy` of a digit with `alpha` (8, 8); a function of the arguments."""
    rng = np.random.default_rng((digit, copy))
    square, background = _background(rng, split, size)
    side = round(size * rng.uniform(*SIDES))
    top, left = rng.integers(0, size - side + 1, 2)
    resized = Image.fromarray(alpha.astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    alphas = np.zeros((size, size, 1), np.float32)
    alphas[top : top + side, left : left + side, 0] = np.clip(np.asarray(resized), 0, 1)
    mask = alphas[..., 0] > 0.5
    color = _color(rng, (background[mask] @ LUMA).mean() + CONTRAST)
    image = np.rint(alphas * color + (1 - alphas) * background).astype(np.uint8)
    words = color_name(color)
    caption = f"{'an' if words[0] == 'o' else 'a'} {words} {label} on a photograph"
    name = f"{digit:04d}_{copy}"
    return Scene(name, label, caption, image, mask, background, color, square)


def _background(
    rng: np.random.Generator, split: str, size: int
) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """A square of a photograph, and its pixels, uint8 (size, size, 3)."""
    photographs = _photographs()
    number = int(rng.integers(len(photographs)))
    height, width, _ = photographs[number].shape
    first, end = (round(share * width) for share in COLUMNS[split])
    side = int(rng.integers(SQUARES[0], SQUARES[1] + 1))
    top = int(rng.integers(0, height - side + 1))
    left = int(rng.integers(first, end - side + 1))
    pixels = Image.fromarray(photographs[number][top : top + side, left : left + side])
    background = np.asarray(pixels.resize((size, size), Image.Resampling.BOX))
    if rng.random() < 0.5:
        background = background[:, ::-1]
    return (number, top, left, side), np.rint(BRIGHTNESS * background).astype(np.uint8)


@cache
def _photographs() -> list[np.ndarray]:
    with cli.needs("quickstart"):
        from sklearn import datasets

    return datasets.load_sample_images()["images"]


def _color(rng: np.random.Generator, luma: float) -> np.ndarray:
    """A random color, uint8 (3,), of at least this luma and at most one more."""
    while True:
        color = rng.uniform(0, 255, 3)
        color = np.ceil(color + luma - color @ LUMA)
        if color.min() >= 0 and color.max() <= 255:
            return color.astype(np.uint8)


def color_name(color: np.ndarray) -> str:
    """English name of a bright color (3,)."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(color / 255))
    return "white" if saturation < MIN_SATURATION else HUES[int(np.searchsorted(HUE_ENDS, hue))]


def write_scenes(folder: Path, size: int = 32, show: digits.Show = digits.ignore):
    """Writes folder/{train,test}/CLASS/DIGIT_COPY.{png,jpg}."""
    sizes = {"train": digits.SIZE - digits.TEST_SIZE, "test": digits.TEST_SIZE}
    done, total = 0, sum(sizes[split] * copies for split, copies in COPIES.items())
    for split in COPIES:
        for rank, scene in enumerate(make_scenes(split, size)):
            path = folder / split / str(scene.label) / scene.name
            digits.save(Image.fromarray(scene.image), path, lossless=bool(rank % 2))
            show(done := done + 1, total)
