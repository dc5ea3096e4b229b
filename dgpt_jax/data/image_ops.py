"""Pictures: decoding them, views (crop box and flip, as data), and rendering through a view."""

import io
import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

# Formats that are decoded, by Pillow's names; a phone's MPO is among JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Where Pillow refuses too, so that what was imported can be read: 13377² pixels, half a GB.
MAX_PIXELS = 178_956_970
# Shrinking leaves at least so many pixels for one of the result: photographs then differ from those
# of a full decode by 46 dB (median; 39 at worst), at 1.0 by 39 (30).
SPARE = 1.5
SHRINKING = {  # OpenCV's bit for it alone: its names with COLOR say BGR too
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


@dataclass(frozen=True)
class View:
    """A crop box in pixels of the source image, and whether the result is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.top, self.left, self.height, self.width


def draw(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    clip: bool = False,
) -> View:
    """A random resized crop of a height×width image, and a mirror with probability ½ if `flip`.

    `scale` bounds the crop's share of the area, `ratio` its width over height (drawn
    log-uniformly). After ten misses: the largest centred crop within `ratio`, as in torchvision.
    With `clip` none is missed: what sticks out is cut off, as MAE's util/crop.py does for probes.
    """
    mirrored = bool(flip and rng.random() < 0.5)
    log_ratio = np.log(ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        # Twice the side is as much of a miss as more, which may be infinite.
        w = round(min(math.sqrt(area * aspect), 2 * width))
        h = round(min(math.sqrt(area / aspect), 2 * height))
        if clip:
            w, h = min(max(w, 1), width), min(max(h, 1), height)
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return View(top, left, h, w, mirrored)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = max(1, round(min(height * aspect, width)))
    h = max(1, round(min(width / aspect, height)))
    return View((height - h) // 2, (width - w) // 2, h, w, mirrored)


def render(image: np.ndarray, view: View, size: int, shrunk: int = 1) -> np.ndarray:
    """RGB uint8 (height, width, 3) through a view: (size, size, 3), antialiased bicubic.

    `shrunk`: of how many pixels on a side, of those that the view counts, one of `image` is made.
    """
    top, left = view.top // shrunk, view.left // shrunk
    bottom, right = (-(-end // shrunk) for end in (view.top + view.height, view.left + view.width))
    crop, box = image[top:bottom, left:right], None
    if shrunk > 1:
        x, y = view.left / shrunk - left, view.top / shrunk - top
        box = (x, y, x + view.width / shrunk, y + view.height / shrunk)
    picture = resize(crop, size, size, box)
    return np.ascontiguousarray(picture[:, ::-1]) if view.flip else picture


def resize(image: np.ndarray, height: int, width: int, box=None) -> np.ndarray:
    """Antialiased bicubic, as the published protocols' Pillow does it (kernel a = -0.5).

    `box`: (left, top, right, bottom), fractions of pixels allowed; default: all of the image.
    """
    if box is None and image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)


def centre_crop(image: np.ndarray, resize_to: int, size: int, *, squash: bool) -> np.ndarray:
    """The evaluation view: resize, then the central size×size pixels.

    `resize_to` is the shorter side after resizing (MAE, DINOv2), or both sides with `squash` (the
    official D-iGPT's fine-tuning).
    """
    height, width = image.shape[:2]
    if squash:
        target = (resize_to, resize_to)
    elif height <= width:
        target = (resize_to, max(resize_to, int(resize_to * width / height)))
    else:
        target = (max(resize_to, int(resize_to * height / width)), resize_to)
    image = resize(image, *target)
    top, left = (round((n - size) / 2) for n in image.shape[:2])
    return image[top : top + size, left : left + size]


ENCODINGS = {
    # Colours at full resolution: 20.9 → 25.9 kB a 224² photograph, 40.2 → 43.0 dB.
    "jpeg95": (
        ".jpg",
        [
            cv2.IMWRITE_JPEG_QUALITY,
            95,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ],
    ),
    "webp-lossless": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
    "png": (".png", []),
}


def encode_picture(image: np.ndarray, kind: str) -> bytes:
    """RGB uint8 (height, width, 3) as bytes of "jpeg95", "webp-lossless" or "png"."""
    extension, options = ENCODINGS[kind]
    ok, data = cv2.imencode(extension, image[..., ::-1], options)
    if not ok:
        raise ValueError(f"OpenCV could not encode a picture of shape {image.shape} as {kind}")
    return data.tobytes()


class Unreadable(ValueError):
    """Bytes that are no image, or one that is too large."""


class Encoded:
    """An image in its bytes: its size is known before it is decoded.

    Raises Unreadable, before any memory is taken where a header tells more than MAX_PIXELS.
    """

    def __init__(self, data: bytes):
        self._data = data
        try:
            # OpenCV would decode six times as many pixels, and tells no size beforehand: 10 to 20
            # µs.
            with Image.open(io.BytesIO(data), formats=FORMATS) as header:
                self.width, self.height = header.size
                self._jpeg = header.format in ("JPEG", "MPO")
        except Image.DecompressionBombError as e:
            raise Unreadable(f"an image that is too large: {e}") from None
        except Exception:  # Pillow's parsers raise various
            raise self._unreadable() from None
        if self.width * self.height > MAX_PIXELS:
            raise Unreadable(f"an image that is too large: {self.width}×{self.height} pixels")

    def _unreadable(self) -> Unreadable:
        return Unreadable(f"{len(self._data)} bytes that are no readable image")

    def shrink(self, view: View, size: int) -> int:
        """How many pixels on a side may become one while decoding for a view of size² pixels.

        A JPEG's blocks of 8×8 frequencies give 4×4, 2×2 or 1 pixel at less work.
        """
        least = min(view.height, view.width) / size
        return next((n for n in (8, 4, 2) if self._jpeg and least >= n * SPARE), 1)

    def decode(self, shrink: int = 1) -> np.ndarray:
        """RGB uint8 (height, width, 3), EXIF orientation ignored; sides are rounded up where they
        are divided by `shrink`."""
        try:
            flags = SHRINKING[shrink] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imdecode(np.frombuffer(self._data, np.uint8), flags)
        except cv2.error:
            image = None
        if image is None:
            raise self._unreadable()
        return image


def decode_picture(data: bytes) -> np.ndarray:
    """Encoded bytes as RGB uint8 (height, width, 3), as Encoded does it. Raises Unreadable."""
    return Encoded(data).decode()
