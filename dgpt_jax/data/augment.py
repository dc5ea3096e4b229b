"""Supervised augmentation of pictures: RandAugment, colour jitter and erased boxes, on the host.

What is drawn is data, as views are: a list of operations, a box. Sources: timm's
`auto_augment.py`, `random_erasing.py` (with Pillow, as the published recipes ran them) and
torchvision's ColorJitter. mixing.py has what happens on the device.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dgpt_jax import vit
from dgpt_jax.schema import UserError

LEVELS = 10  # magnitudes are tenths
FILL = tuple(round(255 * x) for x in vit.IMAGENET_MEAN)  # what comes in from beyond the border
INTERPOLATIONS = {
    "bicubic": (Image.Resampling.BICUBIC,),
    "bilinear": (Image.Resampling.BILINEAR,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}


@dataclass(frozen=True)
class Op:
    """One operation: its name in OPS, its argument there, Pillow's number of the filter."""

    name: str
    value: float
    filter: int = Image.Resampling.BICUBIC


def _affine(matrix: Callable) -> Callable:
    def apply(image, op: Op):
        coefficients = matrix(op.value, *image.size)
        return image.transform(
            image.size, Image.Transform.AFFINE, coefficients, resample=op.filter, fillcolor=FILL
        )

    return apply


def _enhance(kind) -> Callable:
    return lambda image, op: kind(image).enhance(op.value)


def _posterize(image, op: Op):
    """Keeps the `value` highest bits: none at level 10, which is black. Newer Pillow, and timm with
    it, raises an error there."""
    mask = 0xFF00 >> int(op.value) & 0xFF
    return image.point(3 * [i & mask for i in range(256)])


def _solarize_add(image, op: Op):
    table = [min(255, i + int(op.value)) if i < 128 else i for i in range(256)]
    return image.point(3 * table)


# Name → (picture, operation) → picture. Shears and shifts are inverse maps; shifts are parts of the
# side; colour and its like are Pillow's factors, where 1 changes nothing.
OPS: dict[str, Callable] = {
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
# Largest values, at level 10; they may go to either side.
SIGNED = {
    "rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45,
}  # fmt: skip


def value_of(name: str, level: float, negative: bool, increasing: bool) -> float:
    """The argument of an operation at a level from 0 to 10.

    increasing: whether every operation does more at higher levels, as timm's `inc1` has it.
    """
    part = level / LEVELS
    sign = -1.0 if negative else 1.0
    if name in SIGNED:
        return sign * part * SIGNED[name]
    if name in ENHANCED:
        return max(0.1, 1.0 + sign * part * 0.9) if increasing else part * 1.8 + 0.1
    if name == "posterize":
        return 4 - int(part * 4) if increasing else int(part * 4)
    if name == "solarize":
        threshold = min(256, int(part * 256))
        return 256 - threshold if increasing else threshold
    return min(128, int(part * 110)) if name == "solarize_add" else 0


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations a picture, drawn with replacement; each happens with probability `prob`
    at a level drawn around `magnitude` and cut to 0…10."""

    magnitude: float
    deviation: float = 0.0
    layers: int = 2
    prob: float = 0.5
    increasing: bool = False
    interpolation: str = "bicubic"

    def draw(self, rng: np.random.Generator) -> list[Op]:
        """The operations that one picture gets, in order."""
        filters = INTERPOLATIONS[self.interpolation]
        drawn = []
        for name in rng.choice(len(NAMES), self.layers):
            happens, negative = rng.random() < self.prob, rng.random() < 0.5
            level = min(max(rng.normal(self.magnitude, self.deviation), 0.0), LEVELS)
            chosen = filters[rng.integers(len(filters))]
            if happens:
                value = value_of(NAMES[name], level, negative, self.increasing)
                drawn.append(Op(NAMES[name], value, chosen))
        return drawn


def rand_augment(text: str, interpolation: str = "bicubic") -> RandAugment:
    """timm's `rand-m9-mstd0.5-inc1`; also n (layers) and p (probability). Raises UserError."""
    kind, *parts = text.split("-")
    read = {"m": ("magnitude", int), "mstd": ("deviation", float), "n": ("layers", int),
            "p": ("prob", float), "inc": ("increasing", lambda word: bool(int(word)))}  # fmt: skip
    found = {"magnitude": LEVELS}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        name, kind_of = read.get(match[1], (None, None)) if match else (None, None)
        try:
            found[name] = kind_of(match[2])
        except (TypeError, ValueError):
            name = None
        if name is None:
            break
    else:
        if kind == "rand" and found.get("prob", 0) <= 1 and found.get("deviation", 0) <= LEVELS:
            return RandAugment(interpolation=interpolation, **found)
    raise UserError(
        f"cannot read the augmentation {text!r}: write rand-m9-mstd0.5-inc1, with m, mstd, n, p, "
        f"inc as timm has them"
    )


def draw_jitter(rng: np.random.Generator, strengths: Sequence[float]) -> list[Op]:
    """Brightness, contrast, saturation in a random order, each by a factor within 1 ± its strength,
    as torchvision draws them."""
    drawn = []
    for i in rng.permutation(3):
        factor = rng.uniform(max(0.0, 1 - strengths[i]), 1 + strengths[i])
        if strengths[i]:
            drawn.append(Op(("brightness", "contrast", "color")[i], factor))
    return drawn


def apply(picture: np.ndarray, ops: Sequence[Op]) -> np.ndarray:
    """uint8 (height, width, 3) through the operations, in order."""
    if not ops:
        return picture
    image = Image.fromarray(picture)
    for op in ops:
        image = OPS[op.name](image, op)
    return np.asarray(image)


NOTHING = np.zeros(4, np.int32)


def draw_erased(
    rng: np.random.Generator,
    size: int,
    prob: float,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """The box (top, left, height, width), int32, that is erased from a size×size picture; all 0
    with probability 1 - prob. Shares of the area, height over width (log-uniform); ten tries."""
    if rng.random() >= prob:
        return NOTHING
    for _ in range(10):
        target = rng.uniform(*area) * size * size
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        height, width = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if height < size and width < size:
            top = rng.integers(0, size - height + 1)
            left = rng.integers(0, size - width + 1)
            return np.array([top, left, height, width], np.int32)
    return NOTHING
