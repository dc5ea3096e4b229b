"""What users import: images of every format, and archives of them, damaged in any way."""

import functools
import gzip
import io
import shutil
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from dgpt_jax import images, records, user_images, views
from dgpt_jax.schema import UserError
from tests import data
from tests.fuzz.stored import mutated

PATIENCE = 20  # seconds


@functools.cache
def pictures() -> dict[str, bytes]:
    """{kind: an image of 40 × 24 pixels} in every format, depth and way of packing."""
    rgb = data.smooth_image(np.random.default_rng(0), 24, 40)
    deep, image = rgb.astype(np.uint16) * 257, Image.fromarray(rgb)
    rgba = Image.fromarray(np.dstack([rgb, rgb[..., :1]]))
    turned = Image.Exif()
    turned[user_images.ORIENTATION] = 6

    def saved(form: str, picture=image, **options) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        return buffer.getvalue()

    def opencv(extension: str, pixels) -> bytes:
        return cv2.imencode(extension, pixels)[1].tobytes()

    found = {form: saved(form) for form in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")}
    found |= {
        "JPEG, progressive": saved("JPEG", progressive=True),
        "JPEG, turned": saved("JPEG", exif=turned),
        "JPEG, CMYK": saved("JPEG", image.convert("CMYK")),
        "JPEG, two": saved("MPO", save_all=True, append_images=[image]),
        "PNG, 16 bits": opencv(".png", deep),
        "PNG, 16 bits grey": opencv(".png", deep[..., 0]),
        "PNG, palette": saved("PNG", image.quantize(16)),
        "PNG, transparent": saved("PNG", rgba),
        "PNG, turned": saved("PNG", exif=turned),
        "GIF, two": saved("GIF", save_all=True, append_images=[rgba.convert("RGB")]),
        "WEBP, lossless": saved("WEBP", rgba, lossless=True),
        "TIFF, 16 bits": saved("TIFF", Image.fromarray(deep[..., 0])),
        "TIFF, 16 bits RGB": opencv(".tif", deep),
        "TIFF, float": saved("TIFF", Image.fromarray(rgb[..., 0].astype(np.float32))),
        "TIFF, fax": saved("TIFF", image.convert("1"), compression="group4"),
    }
    found |= {
        f"TIFF, {way}": saved("TIFF", compression=way)
        for way in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    }
    return found | ({"AVIF": saved("AVIF")} if user_images.AVIF else {})


def is_one_line(error: Exception) -> bool:
    return bool(str(error)) and len(str(error).splitlines()) == 1


def upright_size(content: bytes) -> tuple[int, int]:
    """(height, width) that a file tells of its image as it is to be seen."""
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        is_turned = image.getexif().get(user_images.ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if is_turned else (height, width)


def imported_image(draw, _):
    """Taken, and then decoded as in training to an image of its size; or refused by one line."""
    kinds = pictures()
    content = draw(mutated(kinds[draw(st.sampled_from(sorted(kinds)))]))
    options = draw(st.sampled_from([user_images.DEFAULT, user_images.Options(range=(0.0, 255.0))]))
    began = time.monotonic()
    with warnings.catch_warnings(action="ignore"):
        try:
            stored = user_images.stored(content, options)
        except views.Unreadable as e:
            assert is_one_line(e)
        else:
            image = views.decode_picture(stored.data)
            assert image.shape == (*upright_size(content), 3) and image.dtype == np.uint8
    assert time.monotonic() - began < PATIENCE


@functools.cache
def archive(form: int) -> tuple[bytes, list[int]]:
    """A tar of images, links and a tar, and the places of its headers."""
    kinds = list(pictures().values())

    def write(members: dict[str, bytes | tuple[bytes, str]]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                if isinstance(content, tuple):
                    info.type, info.linkname = content
                    tar.addfile(info)
                else:
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    inner = write({"y.png": kinds[0], "z.png": (tarfile.SYMTYPE, "y.png")})
    content = write(
        {
            "a/1.png": kinds[0], "a/2.jpg": kinds[1], "b/" + "x" * 120 + ".bmp": kinds[3],
            "b/hard.png": (tarfile.LNKTYPE, "a/1.png"),
            "b/soft.png": (tarfile.SYMTYPE, "../a/2.jpg"),
            "c": (tarfile.SYMTYPE, "a"), "b/round": (tarfile.SYMTYPE, ".."),
            "b/lost.png": (tarfile.SYMTYPE, "lost.png"), "d.tar": inner,
        }
    )  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        starts = [member.offset for member in tar.getmembers()]
    places = [start + i for start in starts for i in range(512) if content[start + i]]
    return content, places


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/1.png", content)
    return buffer.getvalue()


PACKING = {
    ".tar": lambda content: content, ".tar.gz": gzip.compress, ".tgz": gzip.compress,
    ".zip": zipped,
}  # fmt: skip


def imported_archive(draw, directory: Path):
    """Imported, and then every image can be read; or refused by one line. Also in a folder, where
    what is compressed is passed over."""
    suffix = draw(st.sampled_from(sorted(PACKING)))
    content, places = archive(draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    packed = PACKING[suffix](content)
    content = draw(mutated(packed, places if suffix == ".tar" else None))
    source, out = directory / "source", directory / "out"
    for place in (source, out):
        shutil.rmtree(place, ignore_errors=True)
    source.mkdir()
    (source / "good.png").write_bytes(pictures()["PNG"])
    path = source / f"x{suffix}"
    path.write_bytes(content)
    began = time.monotonic()
    try:
        report = images.import_images(
            draw(st.sampled_from([source, path])), out, split="train", say=lambda _: None, threads=1
        )
    except UserError as e:
        assert is_one_line(e) and not (out / "dataset_info.json").exists()
    else:
        split = records.Split(out, "train")
        assert len(split) == report.examples["train"] > 0
        assert all(map(is_one_line, map(ValueError, report.broken + report.passed)))
        for record in split:
            assert views.decode_picture(record["image"]).ndim == 3
    assert time.monotonic() - began < PATIENCE
