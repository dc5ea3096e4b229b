"""Supervised augmentation on the host: RandAugment, color jitter and random erasing.

Random choices are data, like views: a list of operations, a box. Sources: timm's `auto_augment.py`
and `random_erasing.py` (with Pillow, as in the published recipes), torchvision's ColorJitter.
Augmentation on the device: training/mixup.py.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dgpt_jax.data.normalization import IMAGENET_MEAN
from dgpt_jax.errors import UserError

LEVELS = 10  # magnitudes are in tenths
FILL = tuple(round(255 * x) for x in IMAGENET_MEAN)  # beyond the border
INTERPOLATIONS = {
    "bicubic": (Image.Resampling.BICUBIC,),
    "bilinear": (Image.Resampling.BILINEAR,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}


@dataclass(frozen=True)
class Op:
    """One operation: its name in OPS, its argument, Pillow's resampling filter."""

    name: str
    value: float
    filter: Image.Resampling = Image.Resampling.BICUBIC


Apply = Callable[[Image.Image, Op], Image.Image]


def _affine(matrix: Callable) -> Apply:
    def apply(image: Image.Image, op: Op) -> Image.Image:
        coefficients = matrix(op.value, *image.size)
        return image.transform(
            image.size, Image.Transform.AFFINE, coefficients, resample=op.filter, fillcolor=FILL
        )

    return apply


def _enhance(kind: Callable) -> Apply:
    return lambda image, op: kind(image).enhance(op.value)


def _posterize(image: Image.Image, op: Op) -> Image.Image:
    """Keeps the `value` highest bits: none at level 10, which is black. Newer Pillow, and so timm,
    raises an error for 0."""
    mask = 0xFF00 >> int(op.value) & 0xFF
    return image.point(3 * [i & mask for i in range(256)])


def _solarize_add(image: Image.Image, op: Op) -> Image.Image:
    table = [min(255, i + int(op.value)) if i < 128 else i for i in range(256)]
    return image.point(3 * table)


# Shears and translations are inverse maps; translations are fractions of the side; enhancements are
# Pillow's factors, where 1 is the identity.
OPS: dict[str, Apply] = {
    "autocontrast": lambda image, op: ImageOps.autocontrast(image),
    "equalize": lambda image, op: ImageOps.equalize(image),
    "invert": lambda image, op: ImageOps.invert(image),
    "rotate": lambda image, op: image.rotate(op.value, resample=op.filter, fillcolor=FILL),
    "posterize": _posterize,
    "solarize": lambda image, op: ImageOps.solarize(image, int(op.value)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda v, width, height: (1, v, 0, 0, 1, 0)),
    "shear_y": _affine(lambda v, width, height: (1, 0, 0, v, 1, 0)),
    "translate_x": _affine(lambda v, width, height: (1, 0, v * width, 0, 1, 0)),
    "translate_y": _affine(lambda v, width, height: (1, 0, 0, 0, 1, v * height)),
}
NAMES = tuple(OPS)
ENHANCED = ("color", "contrast", "brightness", "sharpness")
# Values at level 10; the sign is random.
SIGNED = {
    "rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45,
}  # fmt: skip


def value_of(name: str, level: float, negative: bool, increasing: bool) -> float:
    """Returns the argument of an operation at a level from 0 to 10.

    increasing: True if every operation gets stronger with the level (timm's `inc1`).
    """
    strength = level / LEVELS
    sign = -1.0 if negative else 1.0
    if name in SIGNED:
        return sign * strength * SIGNED[name]
    if name in ENHANCED:
        return max(0.1, 1.0 + sign * strength * 0.9) if increasing else strength * 1.8 + 0.1
    if name == "posterize":
        return 4 - int(strength * 4) if increasing else int(strength * 4)
    if name == "solarize":
        threshold = min(256, int(strength * 256))
        return 256 - threshold if increasing else threshold
    return min(128, int(strength * 110)) if name == "solarize_add" else 0


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations per image, drawn with replacement; applied with probability `prob` each,
    at a level drawn from N(magnitude, deviation) and clipped to 0…10."""

    magnitude: float
    deviation: float = 0.0
    layers: int = 2
    prob: float = 0.5
    increasing: bool = False
    interpolation: str = "bicubic"

    def draw(self, rng: np.random.Generator) -> list[Op]:
        """Returns the operations for one image, in order."""
        filters = INTERPOLATIONS[self.interpolation]
        drawn = []
        for name in rng.choice(len(NAMES), self.layers):
            applied, negative = rng.random() < self.prob, rng.random() < 0.5
            level = min(max(rng.normal(self.magnitude, self.deviation), 0.0), LEVELS)
            resampling = filters[rng.integers(len(filters))]
            if applied:
                value = value_of(NAMES[name], level, negative, self.increasing)
                drawn.append(Op(NAMES[name], value, resampling))
        return drawn


def rand_augment(text: str, interpolation: str = "bicubic") -> RandAugment:
    """Parses timm's `rand-m9-mstd0.5-inc1`; also n (layers), p (probability). Raises UserError."""
    kind, *terms = text.split("-")
    parsers = {
        "m": ("magnitude", int), "mstd": ("deviation", float), "n": ("layers", int),
        "p": ("prob", float), "inc": ("increasing", lambda digits: bool(int(digits))),
    }  # fmt: skip
    values: dict[str, Any] = {"magnitude": LEVELS}
    for term in terms:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", term)
        if match is None or match[1] not in parsers:
            break
        name, parse = parsers[match[1]]
        try:
            values[name] = parse(match[2])
        except ValueError:
            break
    else:
        if kind == "rand" and values.get("prob", 0) <= 1 and values.get("deviation", 0) <= LEVELS:
            return RandAugment(interpolation=interpolation, **values)
    raise UserError(
        f"cannot parse the augmentation {text!r}: use timm's syntax, rand-m9-mstd0.5-inc1, with m, "
        f"mstd, n, p and inc"
    )


def draw_jitter(rng: np.random.Generator, strengths: Sequence[float]) -> list[Op]:
    """Returns brightness, contrast and saturation in a random order, each by a factor uniform in
    1 ± its strength, as in torchvision."""
    drawn = []
    for i in rng.permutation(3):
        factor = rng.uniform(max(0.0, 1 - strengths[i]), 1 + strengths[i])
        if strengths[i]:
            drawn.append(Op(("brightness", "contrast", "color")[i], factor))
    return drawn


def apply(image: np.ndarray, ops: Sequence[Op]) -> np.ndarray:
    """Applies operations, in order, to an image, uint8 (height, width, 3)."""
    if not ops:
        return image
    result = Image.fromarray(image)
    for op in ops:
        result = OPS[op.name](result, op)
    return np.asarray(result)


NO_BOX = np.zeros(4, np.int32)


def draw_erased(
    rng: np.random.Generator,
    size: int,
    prob: float,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Returns the box to erase from a size×size image, (top, left, height, width) int32; zeros with
    probability 1 - prob or after ten tries. `area`: range of the fraction of the image, uniform;
    `aspect`: range of height over width, log-uniform."""
    if rng.random() >= prob:
        return NO_BOX
    for _ in range(10):
        target = rng.uniform(*area) * size * size
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        height, width = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if height < size and width < size:
            top = rng.integers(0, size - height + 1)
            left = rng.integers(0, size - width + 1)
            return np.array([top, left, height, width], np.int32)
    return NO_BOX
