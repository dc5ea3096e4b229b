"""Conversion of images of any format, bit depth and orientation to what training decodes.

EXIF orientation is applied. Transparent images are composited on a background. Images deeper than 8
bits: unsigned integers are scaled by the range of their container, so that a TIFF, a PGM and a PNG
of the same values are equal (their upper 8 bits, as when OpenCV decodes a PNG); signed integers and
floats have no such range and are rejected unless one is given. A TIFF whose zero is white is
inverted, as with 8 bits; several deep channels are supported if they are interleaved.
"""

import io
import re
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, ImageColor, ImageFile, ImageOps, TiffImagePlugin, features

from dgpt_jax import invocation
from dgpt_jax.data import image_ops
from dgpt_jax.errors import UserError

AVIF = (".avif",) if features.check("avif") else ()
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", *AVIF,
)  # fmt: skip
ORIENTATION = 0x0112  # EXIF
# Tags of TIFF.
BITS, PHOTOMETRIC, PLANAR = 258, 262, 284
# Pillow's raw modes of one channel of unsigned integers; the group is the container's bits.
UNSIGNED = re.compile(r"I;(12|16|32)[BLNR]*")


@dataclass(frozen=True)
class Options:
    """Conversion options.

    background: RGB behind transparent images. range: (low, high) values that become black and white
    in single-channel images deeper than 8 bits; None: the container's range.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    range: tuple[float, float] | None = None

    @classmethod
    def parse(cls, background: str = "white", range: str | None = None) -> "Options":
        """Parses a color name or #rrggbb, and "LOW,HIGH". Raises UserError."""
        try:
            rgb = ImageColor.getrgb(background)[:3]
        except ValueError:
            raise UserError(f"--background={background}: not a color name or #rrggbb") from None
        if range is None:
            return cls(rgb)
        try:
            low, high = map(float, range.split(","))
        except ValueError:
            raise UserError(f"--range={range}: give two numbers, LOW,HIGH") from None
        if not (np.isfinite([low, high]).all() and low < high):
            raise UserError(f"--range={range}: LOW must be less than HIGH, both finite")
        return cls(rgb, (low, high))


DEFAULT = Options()


@dataclass(frozen=True)
class StoredImage:
    """Encoded bytes that image_ops.decode_image reads; `transparent` if they were composited."""

    data: bytes
    transparent: bool = False


def rgb(data: bytes, options: Options = DEFAULT) -> np.ndarray:
    """Decodes an image to RGB uint8 (height, width, 3), as training does after an import. Raises
    UnreadableImage."""
    return image_ops.decode_image(convert(data, options).data)


def convert(data: bytes, options: Options = DEFAULT) -> StoredImage:
    """Converts a file's bytes to those that an import stores. Raises UnreadableImage.

    JPEG and PNG that need no change keep their bytes. The result has also been decoded by OpenCV,
    as in training: it rejects checksums that Pillow does not verify.
    """
    try:
        result = _convert(data, options)
    except (image_ops.UnreadableImage, MemoryError):
        raise
    except PIL.UnidentifiedImageError:  # Pillow's message contains an address
        is_tiff = data[:4] in (b"II*\0", b"MM\0*")
        tiff = (
            "a TIFF that Pillow cannot read: several channels of floats, signed integers or 32 "
            "bits, or two or more than four channels of 16 bits"
        )
        reason = tiff if is_tiff else "not an image format that Pillow supports"
        raise image_ops.UnreadableImage(reason) from None
    except Image.DecompressionBombError as e:
        raise image_ops.UnreadableImage(f"too large: {e}") from None
    except Exception as e:  # Pillow's parsers raise many types
        line = re.sub(r" at 0x[0-9a-f]+", "", (str(e).strip().splitlines() or [""])[0])
        raise image_ops.UnreadableImage(f"{type(e).__name__}: {line[:200]}") from None
    try:
        encoded = image_ops.EncodedImage(result.data)
        full = image_ops.View(0, 0, encoded.height, encoded.width, flip=False)
        encoded.decode(encoded.shrink(full, 1))
    except image_ops.UnreadableImage as e:
        raise image_ops.UnreadableImage(
            f"Pillow can read it, but OpenCV, used in training, cannot: {e}"
        ) from None
    return result


def _convert(data: bytes, options: Options) -> StoredImage:
    with Image.open(io.BytesIO(data)) as image:
        form, raw_mode = image.format, _raw_mode(image)  # before the image is loaded
        jpeg = form in ("JPEG", "MPO")  # MPO: a phone's JPEG with a second image
        deep = image.mode == "F" or image.mode.startswith("I")
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        if tags.get(PLANAR) == 2 and max(tags[BITS]) > 8:
            raise image_ops.UnreadableImage(  # Pillow would read single bytes as channels
                "several planar channels deeper than 8 bits: save it with interleaved channels"
            )
        if options.range and not deep and _is_deep(image):
            raise image_ops.UnreadableImage(
                "several channels deeper than 8 bits: --range applies to single-channel images"
            )
        transparent = image.has_transparency_data and np.asarray(_alpha(image)).min() < 255
        upright = image.getexif().get(ORIENTATION, 1) == 1 and image.mode != "CMYK"
        if upright and (jpeg or form == "PNG") and not transparent and not (deep and options.range):
            # Loads the full image to detect truncation; of a JPEG an eighth of the size is enough,
            # in two thirds of the time.
            image.draft("RGB", (1, 1))
            image.load()
            return StoredImage(data)
        inverted = tags.get(PHOTOMETRIC) == 0
        image = ImageOps.exif_transpose(image)
        alpha = _alpha(image) if transparent else None
        if deep:
            image = _to_8_bits(image, form, raw_mode, options, inverted)
        image = image.convert("RGB")
        if alpha:
            image = Image.composite(image, Image.new("RGB", image.size, options.background), alpha)
        buffer = io.BytesIO()
        if jpeg:
            image.save(buffer, "JPEG", quality=95, subsampling=0)
        else:
            image.save(buffer, "PNG")
        return StoredImage(buffer.getvalue(), transparent)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Returns Pillow's raw mode: the layout of the channels in the file."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""  # a GIF has numbers


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """True if Pillow reduces deeper channels to 8 bits."""
    arguments = image.tile[0][3] if image.tile and image.format == "PPM" else None
    largest = arguments[1] if isinstance(arguments, tuple) else 0
    return ";16" in _raw_mode(image) or (isinstance(largest, int) and largest > 255)


def _alpha(image: Image.Image) -> Image.Image:
    """Returns the opacity, 8 bits."""
    if image.mode.startswith("I"):  # a 16-bit PNG has one transparent value
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(255 * opaque.astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _to_8_bits(
    image: Image.Image, form: str | None, raw_mode: str, options: Options, inverted: bool
) -> Image.Image:
    """Scales one deeper channel to 8 bits. Raises UnreadableImage."""
    values = np.asarray(image)
    unsigned = UNSIGNED.fullmatch(raw_mode) if form in ("PNG", "TIFF") else None
    # Pillow scales the values of a PPM from its own maximum to 16 bits.
    bits = 16 if form == "PPM" and image.mode != "F" else int(unsigned[1]) if unsigned else 0
    if bits == 32:
        values = values.view(np.uint32)  # Pillow has no unsigned mode
    if options.range:
        low, high = options.range
        values = np.nan_to_num(values.astype(np.float64), nan=low).clip(low, high)
        scaled = (255 * (values - low) / (high - low)).round()
    elif bits:
        scaled = values >> (bits - 8)
    else:
        kind = "floats" if image.mode == "F" else "signed integers"
        raise image_ops.UnreadableImage(
            f"{kind} (mode {image.mode}) have no default range from black to white: import them "
            f"with `{invocation.command('import')} --range=LOW,HIGH`"
        )
    scaled = scaled.astype(np.uint8)
    return Image.fromarray(255 - scaled if inverted else scaled)
