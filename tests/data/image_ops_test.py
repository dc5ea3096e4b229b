"""Resizing against the formula of antialiased bicubic, and decoding at a part of the size."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from dgpt_jax import views


def photograph() -> np.ndarray:
    return load_sample_image("china.jpg")


def matrix(inside: int, outside: int) -> np.ndarray:
    """(outside, inside): the weights of every pixel; the kernel (a = -0.5) is widened."""
    scale = inside / outside
    centres = (np.arange(outside)[:, None] + 0.5) * scale
    x = np.abs((np.arange(inside)[None] + 0.5 - centres) / max(scale, 1))
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def by_formula(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = matrix(image.shape[0], height), matrix(image.shape[1], width)
    exact = np.einsum("yh,hwc,xw->yxc", rows, image.astype(float), columns, optimize=True)
    return exact.clip(0, 255)


def off(found, exact) -> tuple[float, float]:
    difference = np.abs(found - exact)
    return float(difference.mean()), float(np.percentile(difference, 99.9))


@pytest.mark.parametrize("factor", [3, 4, 5])
@pytest.mark.parametrize("kind", ["noise", "checkerboard", "photograph"])
def test_resizing_is_antialiased_bicubic(kind, factor):
    """Within a rounding of the formula, as OpenCV's cubic, which is not antialiased, is not."""
    if kind == "noise":
        image = np.random.default_rng(0).integers(0, 256, (240, 300, 3), np.uint8)
    elif kind == "checkerboard":
        image = np.indices((240, 300)).sum(0)[..., None].repeat(3, 2) // 2 % 2 * np.uint8(255)
    else:
        image = photograph()
    image = image.astype(np.uint8)
    height, width = image.shape[0] // factor, image.shape[1] // factor
    exact = by_formula(image, height, width)
    mean, worst = off(views.resize(image, height, width), exact)
    assert mean <= 0.55 and worst <= 2  # rounding alone: 0.25, and 0.5 where all is 127.5
    plain = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    assert off(plain, exact)[0] > 0.85


def jpeg(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "side, size, shrink",
    [(671, 224, 1), (672, 224, 2), (1343, 224, 2), (1344, 224, 4), (2688, 224, 8), (9999, 16, 8)],
)
def test_how_much_decoding_shrinks(side, size, shrink):
    encoded = views.Encoded(jpeg(np.zeros((64, 64, 3), np.uint8)))
    for height, width in ((side, 5000), (10_000, side)):
        assert encoded.shrink(views.View(0, 0, height, width, False), size) == shrink
    png = views.Encoded(views.encode_picture(np.zeros((64, 64, 3), np.uint8), "png"))
    assert png.shrink(views.View(0, 0, side, side, False), size) == 1


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("options", [dict(quality=95, subsampling=0), dict(quality=85)])
def test_a_view_of_a_shrunk_decode_looks_the_same(shrink, options):
    """Crops at the least size that is shrunk, and twice that: no shift, no blur."""
    encoded = views.Encoded(jpeg(photograph(), **options))
    full, small = encoded.decode(), encoded.decode(shrink)
    assert (encoded.height, encoded.width) == full.shape[:2] == (427, 640)
    assert small.shape[:2] == (-(-427 // shrink), -(-640 // shrink))
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        size = int(rng.integers(12, 28))
        side = int(size * shrink * views.SPARE * rng.uniform(1, 1.2))
        top, left = rng.integers(0, 427 - side), rng.integers(0, 640 - side)
        view = views.View(int(top), int(left), side, side, bool(rng.integers(2)))
        assert encoded.shrink(view, size) == shrink
        exact = views.render(full, view, size).astype(float)
        error = views.render(small, view, size, shrink) - exact
        found.append(10 * np.log10(255**2 / np.square(error).mean()))
    assert min(found) > 34 and np.median(found) > 39
