"""Strategies for imports: damaged images of every format, and damaged archives of them."""

import contextlib
import functools
import gzip
import io
import shutil
import signal
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest import importer, user_images
from dgpt_jax.errors import UserError
from dgpt_jax.storage import tfds_dataset
from tests.fuzz.stored import mutated
from tests.support import data, image_forms


@contextlib.contextmanager
def deadline(seconds: int = 60):
    """Raises TimeoutError instead of hanging."""

    def expire(*_):
        raise TimeoutError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@functools.cache
def images() -> dict[str, bytes]:
    """{kind: file content} of 40×24 images in every format, bit depth and compression."""
    rgb = data.smooth_image(np.random.default_rng(0), 24, 40)
    deep, image = rgb.astype(np.uint16) * 257, Image.fromarray(rgb)
    rgba = Image.fromarray(np.dstack([rgb, rgb[..., :1]]))
    rotated = Image.Exif()
    rotated[user_images.ORIENTATION] = 6

    def encode(form: str, image=image, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    def opencv(extension: str, pixels) -> bytes:
        return cv2.imencode(extension, pixels)[1].tobytes()

    files = {form: encode(form) for form in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")}
    files |= {
        "JPEG, progressive": encode("JPEG", progressive=True),
        "JPEG, rotated": encode("JPEG", exif=rotated),
        "JPEG, CMYK": encode("JPEG", image.convert("CMYK")),
        "JPEG, two": encode("MPO", save_all=True, append_images=[image]),
        "PNG, 16 bits": opencv(".png", deep),
        "PNG, 16 bits grey": opencv(".png", deep[..., 0]),
        "PNG, palette": encode("PNG", image.quantize(16)),
        "PNG, transparent": encode("PNG", rgba),
        "PNG, rotated": encode("PNG", exif=rotated),
        "GIF, two": encode("GIF", save_all=True, append_images=[rgba.convert("RGB")]),
        "WEBP, lossless": encode("WEBP", rgba, lossless=True),
        "TIFF, 16 bits": encode("TIFF", Image.fromarray(deep[..., 0])),
        "TIFF, 16 bits RGB": opencv(".tif", deep),
        "TIFF, float": encode("TIFF", Image.fromarray(rgb[..., 0].astype(np.float32))),
        "TIFF, fax": encode("TIFF", image.convert("1"), compression="group4"),
    }
    files |= {
        f"TIFF, {compression}": encode("TIFF", compression=compression)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    }
    return files | ({"AVIF": encode("AVIF")} if user_images.AVIF else {})


def is_one_line(error: Exception) -> bool:
    return bool(str(error)) and len(str(error).splitlines()) == 1


def upright_size(content: bytes) -> tuple[int, int]:
    """(height, width) of an image file with its EXIF orientation applied."""
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        is_rotated = image.getexif().get(user_images.ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if is_rotated else (height, width)


def imported_image(draw, _):
    """Either a one-line error, or training decodes the imported image with its upright size."""
    kinds = images()
    content = draw(mutated(kinds[draw(st.sampled_from(sorted(kinds)))]))
    options = draw(st.sampled_from([user_images.DEFAULT, user_images.Options(range=(0.0, 255.0))]))
    with deadline(), warnings.catch_warnings(action="ignore"):
        try:
            stored = user_images.convert(content, options)
        except image_ops.UnreadableImage as e:
            assert is_one_line(e)
        else:
            image = image_ops.decode_image(stored.data)
            assert image.shape == (*upright_size(content), 3) and image.dtype == np.uint8


@functools.cache
def archive(form: int) -> tuple[bytes, list[int]]:
    """A tar of images, links and a tar, and the offsets of its header bytes."""
    kinds = list(images().values())

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
    offsets = [start + i for start in starts for i in range(512) if content[start + i]]
    return content, offsets


PACKING = {
    ".tar": lambda content: content, ".tar.gz": gzip.compress, ".tgz": gzip.compress,
}  # fmt: skip


@functools.cache
def form(suffix: str) -> bytes:
    """A zip, a parquet file or a WebDataset shard of a few images."""
    images = image_forms.samples(6)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        if suffix == ".zip":
            image_forms.write_zip(path, images, zipfile.ZIP_DEFLATED)
        elif suffix == ".parquet":
            parquet.write_table(image_forms.table(images), path, row_group_size=4)
        else:
            image_forms.write_members(path, [m for x in images for m in image_forms.members(x)])
        return path.read_bytes()


def imported_form(draw, directory: Path):
    """Either a one-line error, or every imported image can be read."""
    suffix = draw(st.sampled_from([".zip", ".parquet", ".tar"]))
    content = draw(mutated(form(suffix)))
    source, out = directory / f"x{suffix}", directory / "form"
    shutil.rmtree(out, ignore_errors=True)
    source.write_bytes(content)
    check_import(source, out)


def imported_archive(draw, directory: Path):
    """Either a one-line error, or every imported image can be read.

    Also inside a folder, where compressed archives are skipped.
    """
    suffix = draw(st.sampled_from(sorted(PACKING)))
    content, offsets = archive(draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    packed = PACKING[suffix](content)
    content = draw(mutated(packed, offsets if suffix == ".tar" else None))
    source, out = directory / "source", directory / "out"
    for path in (source, out):
        shutil.rmtree(path, ignore_errors=True)
    source.mkdir()
    (source / "good.png").write_bytes(images()["PNG"])
    path = source / f"x{suffix}"
    path.write_bytes(content)
    source = draw(st.sampled_from([source, path]))
    check_import(source, out)


def check_import(source: Path, out: Path):
    try:
        with deadline():
            report = importer.import_images(
                source, out, split="train", say=lambda _: None, threads=1
            )
    except UserError as e:
        assert is_one_line(e) and not (out / "dataset_info.json").exists()
    else:
        split = tfds_dataset.Split(out, "train")
        assert len(split) == report.examples["train"] > 0
        assert all(map(is_one_line, map(ValueError, report.broken + report.skipped)))
        for record in split:
            assert image_ops.decode_image(record["image"]).ndim == 3
