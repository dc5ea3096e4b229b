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


def render(image: np.ndarray, view: View, size: int) -> np.ndarray:
    """RGB uint8 (height, width, 3) through a view: (size, size, 3), antialiased bicubic."""
    crop = image[view.top : view.top + view.height, view.left : view.left + view.width]
    picture = resize(crop, size, size)
    return np.ascontiguousarray(picture[:, ::-1]) if view.flip else picture


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic, as the published protocols' Pillow does it (kernel a = -0.5)."""
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
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


def decode_picture(data: bytes) -> np.ndarray:
    """Encoded bytes as RGB uint8 (height, width, 3), EXIF orientation ignored.

    Raises ValueError on bytes that are no image, and before it takes any memory on a header of more
    than MAX_PIXELS.
    """
    unreadable = f"{len(data)} bytes that are no readable image"
    try:
        # OpenCV would decode six times as many pixels, and tells no size beforehand: 10 to 20 µs.
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError as e:
        raise ValueError(f"an image that is too large: {e}") from None
    except Exception:  # Pillow's parsers raise various
        raise ValueError(unreadable) from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"an image that is too large: {width}×{height} pixels")
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise ValueError(unreadable)
    return image
