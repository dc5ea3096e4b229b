"""TIFFs of several deep channels: read by their upper 8 bits, or rejected."""

import struct

import numpy as np
import pytest
from PIL import Image

from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest import user_images

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 65536, (16, 12, 6), dtype=np.uint16)
OPAQUE = np.concatenate([WIDE[..., :3], np.full((16, 12, 1), 65535, np.uint16)], -1)
GREY_OPAQUE = OPAQUE[..., 2:]
RGB, GREY, CMYK, YCBCR, LAB = 2, 1, 5, 6, 8  # photometric interpretations


def tiff(values, photometric: int, *, planar=False, extra=(), sample=1, order="<") -> bytes:
    """Uncompressed, with one strip or one per channel; `values` (height, width, channels).

    extra: kinds of the extra channels (0 unknown, 1 and 2 opacity). sample: 1
    unsigned, 2 signed, 3 float.
    """
    height, width, channels = values.shape
    values = values.astype(values.dtype.newbyteorder(order))
    raw = (np.moveaxis(values, 2, 0) if planar else values).tobytes()
    strips = channels if planar else 1
    tags = {
        256: [width], 257: [height], 258: [values.dtype.itemsize * 8] * channels, 259: [1],
        262: [photometric], 273: [8 + i * len(raw) // strips for i in range(strips)],
        277: [channels], 278: [height], 279: [len(raw) // strips] * strips, 284: [1 + planar],
        338: list(extra), 339: [sample] * channels,
    }  # fmt: skip
    entries, values_data = b"", b""
    for tag, numbers in tags.items():
        if numbers:
            data = struct.pack(f"{order}{len(numbers)}I", *numbers)
            if len(data) > 4:
                values_data, data = (
                    values_data + data,
                    struct.pack(f"{order}I", 8 + len(raw) + len(values_data)),
                )
            entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + data
    count = struct.pack(f"{order}H", len(entries) // 12)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    start = struct.pack(f"{order}I", 8 + len(raw) + len(values_data))
    return mark + start + raw + values_data + count + entries + bytes(4)


def high_byte(values) -> np.ndarray:
    return (values >> 8).astype(np.uint8)


def from_cmyk(values) -> np.ndarray:
    return np.asarray(Image.fromarray(high_byte(values), "CMYK").convert("RGB"))


UNSUPPORTED = "TIFF"
PLANAR = "planar"
CASES = {  # (values, photometric, options): the image, or the error
    "rgb": ((OPAQUE[..., :3], RGB, {}), high_byte(OPAQUE[..., :3])),
    "rgba": ((OPAQUE, RGB, {"extra": [2]}), high_byte(OPAQUE[..., :3])),
    "rgba, premultiplied": ((OPAQUE, RGB, {"extra": [1]}), high_byte(OPAQUE[..., :3])),
    "rgb and a fourth": ((WIDE[..., :4], RGB, {"extra": [0]}), high_byte(WIDE[..., :3])),
    "cmyk": ((WIDE[..., :4], CMYK, {}), from_cmyk(WIDE[..., :4])),
    "planar rgb": ((OPAQUE[..., :3], RGB, {"planar": True}), PLANAR),
    "planar rgba": ((OPAQUE, RGB, {"planar": True, "extra": [2]}), PLANAR),
    "planar rgba, premultiplied": ((OPAQUE, RGB, {"planar": True, "extra": [1]}), PLANAR),
    "planar cmyk": ((WIDE[..., :4], CMYK, {"planar": True}), PLANAR),
    "planar, two": ((WIDE[..., :2], GREY, {"planar": True, "extra": [0]}), PLANAR),
    "planar of 8 bits": (
        (high_byte(OPAQUE[..., :3]), RGB, {"planar": True}),
        high_byte(OPAQUE[..., :3]),
    ),
    "two": ((WIDE[..., :2], GREY, {"extra": [0]}), UNSUPPORTED),
    "grey and opacity": ((GREY_OPAQUE, GREY, {"extra": [2]}), UNSUPPORTED),
    "five": ((WIDE[..., :5], GREY, {"extra": [0] * 4}), UNSUPPORTED),
    "six": ((WIDE, RGB, {"extra": [0] * 3}), UNSUPPORTED),
    "lab": ((WIDE[..., :3], LAB, {}), UNSUPPORTED),
    "ycbcr": ((WIDE[..., :3], YCBCR, {}), UNSUPPORTED),
    "signed": ((WIDE[..., :3].astype(np.int16), RGB, {"sample": 2}), UNSUPPORTED),
    "32 bits": ((WIDE[..., :3].astype(np.uint32), RGB, {}), UNSUPPORTED),
    "floats": ((WIDE[..., :3].astype(np.float32), RGB, {"sample": 3}), UNSUPPORTED),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("case", CASES)
def test_deep_tiffs_of_several_channels(case, order):
    (values, photometric, options), expected = CASES[case]
    data = tiff(values, photometric, order=order, **options)
    if isinstance(expected, str):
        with pytest.raises(image_ops.UnreadableImage, match=expected):
            user_images.convert(data)
    else:
        np.testing.assert_array_equal(user_images.rgb(data), expected)
