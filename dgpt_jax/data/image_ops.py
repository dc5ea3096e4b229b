"""Decoding and encoding of images; views (crop box and flip, as data) and their rendering."""

import io
import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

# Decoded formats, by Pillow's names; Pillow opens MPO (phones) as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Pillow's own limit, so that imported images can be read: 13377² pixels, half a GB.
MAX_PIXELS = 178_956_970
# Minimum number of decoded pixels per output pixel and side when a JPEG is decoded at reduced size:
# PSNR to a full decode is then 46 dB (median; 39 at worst), at 1.0 it is 39 (30).
MIN_OVERSAMPLING = 1.5
REDUCED_FLAGS = {  # OpenCV's bit for the size alone: its names with COLOR also say BGR
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


@dataclass(frozen=True)
class View:
    """Crop box in pixels of the source image; `flip` mirrors the result horizontally."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.top, self.left, self.height, self.width


def draw_view(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    clip: bool = False,
) -> View:
    """Returns a random resized crop of a height×width image, mirrored with probability ½ if `flip`.

    `scale` bounds the crop's fraction of the area, `ratio` its width over height (log-uniform). If
    ten draws do not fit the image: the largest centered crop within `ratio`, as in torchvision.
    With `clip` the first draw is clipped to the image, as in MAE's util/crop.py for probes.
    """
    mirrored = bool(flip and rng.random() < 0.5)
    log_ratio = np.log(ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        # Larger sides, up to infinity, do not fit either.
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


def render(image: np.ndarray, view: View, size: int, shrink: int = 1) -> np.ndarray:
    """Returns RGB uint8 (height, width, 3) rendered through a view: (size, size, 3).

    `shrink`: factor by which `image` was reduced when decoded; the view is in unreduced pixels.
    """
    top, left = view.top // shrink, view.left // shrink
    bottom, right = (-(-end // shrink) for end in (view.top + view.height, view.left + view.width))
    crop, box = image[top:bottom, left:right], None
    if shrink > 1:
        x, y = view.left / shrink - left, view.top / shrink - top
        box = (x, y, x + view.width / shrink, y + view.height / shrink)
    resized = resize(crop, size, size, box)
    return np.ascontiguousarray(resized[:, ::-1]) if view.flip else resized


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resizes with Pillow's antialiased bicubic filter (a = -0.5), as published protocols do.

    `box`: (left, top, right, bottom) in fractional pixels; default: the full image.
    """
    if box is None and image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)


def center_crop(image: np.ndarray, resize_to: int, size: int, *, squash: bool) -> np.ndarray:
    """Returns the evaluation view: the image resized, then its central size×size pixels.

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
    # 4:4:4 against 4:2:0 chroma: 20.9 → 25.9 kB per 224² photograph, 40.2 → 43.0 dB.
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


def encode_image(image: np.ndarray, kind: str) -> bytes:
    """Encodes RGB uint8 (height, width, 3) as one of ENCODINGS."""
    extension, options = ENCODINGS[kind]
    ok, data = cv2.imencode(extension, image[..., ::-1], options)
    if not ok:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape} as {kind}")
    return data.tobytes()


class UnreadableImage(ValueError):
    """Bytes that are not an image, or an image that is too large."""


class EncodedImage:
    """Encoded image whose size is read before it is decoded.

    Raises UnreadableImage, before allocating memory if the header gives more than MAX_PIXELS.
    """

    def __init__(self, data: bytes):
        self._data = data
        try:
            # OpenCV has a limit six times as high and does not give the size: this costs 10-20 µs.
            with Image.open(io.BytesIO(data), formats=FORMATS) as header:
                self.width, self.height = header.size
                self._jpeg = header.format in ("JPEG", "MPO")
        except Image.DecompressionBombError as e:
            raise UnreadableImage(f"the image is too large: {e}") from None
        except Exception:  # Pillow's parsers raise many types
            raise self._unreadable() from None
        if self.width * self.height > MAX_PIXELS:
            raise UnreadableImage(f"the image is too large: {self.width}×{self.height} pixels")

    def _unreadable(self) -> UnreadableImage:
        return UnreadableImage(f"{len(self._data)} bytes that are not a readable image")

    def shrink(self, view: View, size: int) -> int:
        """Returns the factor (1, 2, 4 or 8) by which sides may be reduced while decoding for a view
        rendered at size² pixels. JPEG decodes 8×8 blocks to 4×4, 2×2 or 1 pixel at less cost."""
        least = min(view.height, view.width) / size
        return next((n for n in (8, 4, 2) if self._jpeg and least >= n * MIN_OVERSAMPLING), 1)

    def decode(self, shrink: int = 1) -> np.ndarray:
        """Returns RGB uint8 (height, width, 3) without applying the EXIF orientation; sides are
        divided by `shrink`, rounded up. Raises UnreadableImage."""
        try:
            flags = REDUCED_FLAGS[shrink] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imdecode(np.frombuffer(self._data, np.uint8), flags)
        except cv2.error:
            image = None
        if image is None:
            raise self._unreadable()
        return image


def decode_image(data: bytes) -> np.ndarray:
    """Decodes bytes to RGB uint8 (height, width, 3). Raises UnreadableImage."""
    return EncodedImage(data).decode()
