"""Images as users have them, in any format, depth and orientation, as training will read them.

EXIF orientation is baked in. Transparent images are composited on a background. Images deeper than
8 bits: unsigned integers are scaled by the range of their container, so that a TIFF, a PGM and a
PNG of the same values are equal (their upper 8 bits count, as where OpenCV decodes a PNG); signed
integers and floats have no such range and are refused unless one is given. A TIFF whose zero is
white is inverted, as those of 8 bits are; one of several deep channels is read where these lie
together, pixel by pixel.
"""

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError, features

from dgpt_jax import views
from dgpt_jax.schema import UserError

AVIF = (".avif",) if features.check("avif") else ()
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", *AVIF,
)  # fmt: skip
ORIENTATION = 0x0112  # EXIF
# Tags of TIFF.
BITS, PHOTOMETRIC, PLANAR = 258, 262, 284
# Pillow's raw modes of one channel of unsigned integers: bits of the container.
UNSIGNED = re.compile(r"I;(12|16|32)[BLNR]*")


@dataclass(frozen=True)
class Options:
    """How what has no colours of its own becomes some.

    background: RGB, below transparent images. range: (low, high), the values that become black and
    white in images of one channel that are deeper than 8 bits; None: the container's range.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    range: tuple[float, float] | None = None

    @classmethod
    def parse(cls, background: str = "white", range: str | None = None) -> "Options":
        """Of a colour's name or #rrggbb, and "LOW,HIGH". Raises UserError."""
        try:
            rgb = ImageColor.getrgb(background)[:3]
        except ValueError:
            raise UserError(f"--background={background}: not a colour's name or #rrggbb") from None
        if range is None:
            return cls(rgb)
        try:
            low, high = map(float, range.split(","))
        except ValueError:
            raise UserError(f"--range={range}: must be two numbers, LOW,HIGH") from None
        if not (np.isfinite([low, high]).all() and low < high):
            raise UserError(f"--range={range}: LOW must be less than HIGH, both finite")
        return cls(rgb, (low, high))


DEFAULT = Options()


@dataclass(frozen=True)
class Stored:
    """Encoded bytes that views.decode_picture reads, and whether transparency was composited."""

    data: bytes
    transparent: bool = False


def rgb(data: bytes, options: Options = DEFAULT) -> np.ndarray:
    """RGB uint8 (height, width, 3) of a user's image, equal to what training decodes after an
    import. Raises views.Unreadable."""
    return views.decode_picture(stored(data, options).data)


def stored(data: bytes, options: Options = DEFAULT) -> Stored:
    """What an import stores of a file's bytes. Raises views.Unreadable with one line.

    Bytes of JPEG and PNG that need no change are kept. All that is stored has been decoded by
    views.decode_picture, too: OpenCV refuses checksums that Pillow does not look at.
    """
    try:
        result = _stored(data, options)
    except (views.Unreadable, MemoryError):
        raise
    except UnidentifiedImageError:  # its own message holds an address, another one every time
        is_tiff = data[:4] in (b"II*\0", b"MM\0*")
        kind = (
            "a TIFF of a kind that Pillow cannot read, as of floats, of signed integers or of 32 "
            "bits in several channels, or of 16 bits in two or more than four"
        )
        raise views.Unreadable(kind if is_tiff else "not an image that Pillow knows") from None
    except Image.DecompressionBombError as e:
        raise views.Unreadable(f"too large: {e}") from None
    except Exception as e:  # Pillow's parsers raise various
        line = re.sub(r" at 0x[0-9a-f]+", "", (str(e).strip().splitlines() or [""])[0])
        raise views.Unreadable(f"{type(e).__name__}: {line[:200]}") from None
    try:
        encoded = views.Encoded(result.data)
        whole = views.View(0, 0, encoded.height, encoded.width, flip=False)
        encoded.decode(encoded.shrink(whole, 1))
    except views.Unreadable as e:
        raise views.Unreadable(
            f"Pillow reads it, but OpenCV, as in training, does not: {e}"
        ) from None
    return result


def _stored(data: bytes, options: Options) -> Stored:
    with Image.open(io.BytesIO(data)) as image:
        form, channels = image.format, _raw_mode(image)  # while it is not loaded
        jpeg = form in ("JPEG", "MPO")  # MPO: a telephone's JPEG with a second image
        deep = image.mode == "F" or image.mode.startswith("I")
        if form == "TIFF" and image.tag_v2.get(PLANAR) == 2 and max(image.tag_v2[BITS]) > 8:
            raise views.Unreadable(  # of which Pillow would take bytes for channels
                "deeper than 8 bits in several channels, each stored by itself (planar): save it "
                "with its channels together, pixel by pixel"
            )
        if options.range and not deep and _is_deep(image):
            raise views.Unreadable("deeper than 8 bits in several channels: a range is for one")
        transparent = image.has_transparency_data and _alpha(image).getextrema()[0] < 255
        upright = image.getexif().get(ORIENTATION, 1) == 1 and image.mode != "CMYK"
        if upright and (jpeg or form == "PNG") and not transparent and not (deep and options.range):
            # Whole, so that a truncated file is found; that of a JPEG is seen at an eighth of
            # its size as well, in two thirds of the time.
            image.draft("RGB", (1, 1))
            image.load()
            return Stored(data)
        inverted = form == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0
        image = ImageOps.exif_transpose(image)
        alpha = _alpha(image) if transparent else None
        if deep:
            image = _scaled(image, form, channels, options, inverted)
        image = image.convert("RGB")
        if alpha:
            image = Image.composite(image, Image.new("RGB", image.size, options.background), alpha)
        buffer = io.BytesIO()
        if jpeg:
            image.save(buffer, "JPEG", quality=95, subsampling=0)
        else:
            image.save(buffer, "PNG")
        return Stored(buffer.getvalue(), transparent)


def _raw_mode(image) -> str:
    """Pillow's name of the channels as they lie in the file."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""  # a GIF has numbers there


def _is_deep(image) -> bool:
    """True where Pillow has reduced channels of more than 8 bits to 8."""
    largest = image.tile[0][3][1] if image.tile and image.format == "PPM" else 0
    return ";16" in _raw_mode(image) or (isinstance(largest, int) and largest > 255)


def _alpha(image) -> Image.Image:
    """Opacity, 8 bits."""
    if image.mode.startswith("I"):  # a PNG of 16 bits names one value that is transparent
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(255 * opaque.astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _scaled(image, form: str, channels: str, options: Options, inverted: bool) -> Image.Image:
    """One channel deeper than 8 bits as one of 8. Raises views.Unreadable."""
    values = np.asarray(image)
    unsigned = UNSIGNED.fullmatch(channels) if form in ("PNG", "TIFF") else None
    # Pillow scales a PPM's values from its own largest one to 16 bits.
    bits = 16 if form == "PPM" and image.mode != "F" else int(unsigned[1]) if unsigned else 0
    if bits == 32:
        values = values.view(np.uint32)  # Pillow has no such mode
    if options.range:
        low, high = options.range
        values = np.nan_to_num(values.astype(np.float64), nan=low).clip(low, high)
        scaled = (255 * (values - low) / (high - low)).round()
    elif bits:
        scaled = values >> (bits - 8)
    else:
        kind = "floats" if image.mode == "F" else "signed integers"
        raise views.Unreadable(
            f"{kind} (mode {image.mode}), of which no range is black to white: import "
            f"them by tools/import_images.py with --range=LOW,HIGH"
        )
    scaled = scaled.astype(np.uint8)
    return Image.fromarray(255 - scaled if inverted else scaled)
