"""Resizing against the formula of antialiased bicubic, and decoding at reduced size."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from dgpt_jax.data import image_ops


def photograph() -> np.ndarray:
    return load_sample_image("china.jpg")


def matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): the weights of every pixel; the kernel (a = -0.5) is widened."""
    scale = n_in / n_out
    centers = (np.arange(n_out)[:, None] + 0.5) * scale
    x = np.abs((np.arange(n_in)[None] + 0.5 - centers) / max(scale, 1))
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return weights / weights.sum(1, keepdims=True)


def by_formula(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = matrix(image.shape[0], height), matrix(image.shape[1], width)
    exact = np.einsum("yh,hwc,xw->yxc", rows, image.astype(float), columns, optimize=True)
    return exact.clip(0, 255)


def deviation(psnr, exact) -> tuple[float, float]:
    difference = np.abs(psnr - exact)
    return float(difference.mean()), float(np.percentile(difference, 99.9))


@pytest.mark.parametrize("factor", [3, 4, 5])
@pytest.mark.parametrize("kind", ["noise", "checkerboard", "photograph"])
def test_resizing_is_antialiased_bicubic(kind, factor):
    """Equal to the formula up to rounding; OpenCV's cubic is not antialiased and differs."""
    if kind == "noise":
        image = np.random.default_rng(0).integers(0, 256, (240, 300, 3), np.uint8)
    elif kind == "checkerboard":
        image = np.indices((240, 300)).sum(0)[..., None].repeat(3, 2) // 2 % 2 * np.uint8(255)
    else:
        image = photograph()
    image = image.astype(np.uint8)
    height, width = image.shape[0] // factor, image.shape[1] // factor
    exact = by_formula(image, height, width)
    mean, worst = deviation(image_ops.resize(image, height, width), exact)
    assert mean <= 0.55 and worst <= 2  # rounding alone: 0.25, and 0.5 where all is 127.5
    plain = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    assert deviation(plain, exact)[0] > 0.85


def jpeg(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "side, size, shrink",
    [(671, 224, 1), (672, 224, 2), (1343, 224, 2), (1344, 224, 4), (2688, 224, 8), (9999, 16, 8)],
)
def test_shrink_factor_of_decoding(side, size, shrink):
    encoded = image_ops.EncodedImage(jpeg(np.zeros((64, 64, 3), np.uint8)))
    for height, width in ((side, 5000), (10_000, side)):
        assert encoded.shrink(image_ops.View(0, 0, height, width, False), size) == shrink
    png = image_ops.EncodedImage(image_ops.encode_image(np.zeros((64, 64, 3), np.uint8), "png"))
    assert png.shrink(image_ops.View(0, 0, side, side, False), size) == 1


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("options", [dict(quality=95, subsampling=0), dict(quality=85)])
def test_views_of_a_reduced_decode_match_the_full_one(shrink, options):
    """Crops of the smallest reduced size and up to 1.2 times that: no shift, no blur."""
    encoded = image_ops.EncodedImage(jpeg(photograph(), **options))
    full, small = encoded.decode(), encoded.decode(shrink)
    assert (encoded.height, encoded.width) == full.shape[:2] == (427, 640)
    assert small.shape[:2] == (-(-427 // shrink), -(-640 // shrink))
    rng, psnr = np.random.default_rng(0), []
    for _ in range(20):
        size = int(rng.integers(12, 28))
        side = int(size * shrink * image_ops.MIN_OVERSAMPLING * rng.uniform(1, 1.2))
        top, left = rng.integers(0, 427 - side), rng.integers(0, 640 - side)
        view = image_ops.View(int(top), int(left), side, side, bool(rng.integers(2)))
        assert encoded.shrink(view, size) == shrink
        exact = image_ops.render(full, view, size).astype(float)
        error = image_ops.render(small, view, size, shrink) - exact
        psnr.append(10 * np.log10(255**2 / np.square(error).mean()))
    assert min(psnr) > 34 and np.median(psnr) > 39
