"""Conversion of images of any depth, with transparency or damage, by imports and other readers."""

import io
import json
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest import import_settings, importer
from dgpt_jax.data.ingest.user_images import Options
from dgpt_jax.errors import UserError
from dgpt_jax.storage import tfds_dataset
from tests.support.data import smooth_image
from tests.support.paths import ROOT

RAMP = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
COLOR = np.stack([RAMP, RAMP.T, RAMP[::-1]], -1)
GRAY = np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, -1)
PACKED_12 = np.unpackbits((RAMP >> 4).astype(">u2").view(np.uint8).reshape(64, 64, 2), axis=-1)


def opencv(extension: str, pixels) -> bytes:
    return cv2.imencode(extension, pixels)[1].tobytes()


def pillow(pixels, form: str, mode=None, **options) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(bits: int, sample: int, raw: bytes, photometric=1) -> bytes:
    """64×64, one channel; sample: 1 unsigned, 2 signed, 3 float."""
    sizes = (256, 4, 64), (257, 4, 64), (258, 3, bits), (259, 3, 1), (262, 3, photometric)
    fields = (273, 4, 8), (277, 3, 1), (278, 4, 64), (279, 4, len(raw)), (339, 3, sample)
    tags = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value)
        for tag, kind, value in sizes + fields
    )
    return (
        b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + struct.pack("<H", 10) + tags + bytes(4)
    )


def rotated(pixels) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return pillow(np.ascontiguousarray(pixels[::-1, ::-1]), "PNG", exif=exif)


def import_all(tmp_path, files: dict[str, bytes], out="out", **options):
    """(report, {name: image as training decodes it})"""
    folder = tmp_path / "src"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    report = importer.import_images(folder, tmp_path / out, say=lambda _: None, **options)
    split = tfds_dataset.Split(tmp_path / out, "train")
    return report, {x["id"]: image_ops.decode_image(x["image"]) for x in split}


DEEP = {  # files with the pixels of GRAY
    "opencv.png": opencv(".png", RAMP),
    "pillow.png": pillow(RAMP, "PNG"),
    "turned.png": rotated(RAMP),
    "opencv.tif": opencv(".tif", RAMP),
    "deflated.tif": pillow(RAMP, "TIFF", compression="tiff_adobe_deflate"),
    "big endian.tif": pillow(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
    "12 bits.tif": tiff(12, 1, np.packbits(PACKED_12[..., 4:].reshape(64, -1), axis=1).tobytes()),
    "32 bits.tif": tiff(32, 1, (RAMP.astype("<u4") * 65537).tobytes()),
    "white is 0.tif": tiff(16, 1, (65535 - RAMP).astype("<u2").tobytes(), photometric=0),
    "16 bits.ppm": b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes(),
    "12 bits.ppm": b"P5 64 64 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
    "8 bits.tif": pillow(GRAY, "TIFF"),
}
COLORS = {
    "16 bits.png": opencv(".png", COLOR[..., ::-1]),
    "16 bits.tif": opencv(".tif", COLOR[..., ::-1]),
}
NO_RANGE = {
    "float.tif": (opencv(".tif", (RAMP / 65535).astype(np.float32)), "floats (mode F)"),
    "pfm.ppm": (b"Pf\n64 64\n-1.0\n" + RAMP.astype("<f4").tobytes(), "floats (mode F)"),
    "16 bits.tif": (tiff(16, 2, RAMP.astype("<i2").tobytes()), "signed integers (mode I)"),
    "32 bits.tif": (tiff(32, 2, RAMP.astype("<i4").tobytes()), "signed integers (mode I)"),
}


def test_deeper_than_8_bits(tmp_path):
    report, images = import_all(tmp_path, DEEP)
    assert not report.broken and images.keys() == DEEP.keys()
    for name, pixels in images.items():
        np.testing.assert_array_equal(pixels, GRAY, err_msg=name)


def test_deep_colors(tmp_path):
    _, images = import_all(tmp_path, COLORS)
    for name, pixels in images.items():
        assert np.abs(pixels.astype(int) - (COLOR >> 8)).max() <= 1, name


def test_signed_integers_and_floats_need_a_range(tmp_path):
    files = {name: data for name, (data, _) in NO_RANGE.items()}
    report, images = import_all(tmp_path, files | {"good.png": DEEP["opencv.png"]})
    assert list(images) == ["good.png"]
    for line, name in zip(report.broken, sorted(NO_RANGE), strict=True):
        assert line.startswith(f"{name}: {NO_RANGE[name][1]}") and "--range=LOW,HIGH" in line


def test_ranges(tmp_path):
    options = Options.parse(range="0.25,0.75")
    files = {"float.tif": NO_RANGE["float.tif"][0], "color.png": COLORS["16 bits.png"]}
    files["white is 0.tif"] = tiff(32, 3, (1 - RAMP / 65535).astype("<f4").tobytes(), 0)
    files["8 bits.gif"] = pillow(GRAY, "GIF")
    odd = np.tile(np.float32([np.nan, -np.inf, np.inf, 1e38]), 1024)
    files["odd.tif"] = tiff(32, 3, odd.tobytes())
    report, images = import_all(tmp_path, files, options=options)
    expected = ((RAMP / 65535 - 0.25) / 0.5 * 255).clip(0, 255)
    for name in ("float.tif", "white is 0.tif"):
        assert np.abs(images[name] - expected[..., None]).max() < 1, name
    assert (images["8 bits.gif"] == GRAY).all()  # a range does not apply to 8 bits
    assert (images["odd.tif"][0, :4, 0] == (0, 0, 255, 255)).all()
    assert [line.partition(":")[0] for line in report.broken] == ["color.png"]
    assert "--range" in report.broken[0]
    _, images = import_all(
        tmp_path, {"color.png": DEEP["pillow.png"]}, "out2", options=Options.parse("red", "0,255")
    )
    assert (images["color.png"] == RAMP.clip(0, 255)[..., None]).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"range": "1"}, "--range=1"),
        ({"range": "a,b"}, "--range=a,b"),
        ({"range": "1,1"}, "--range=1,1"),
        ({"range": "0,nan"}, "--range=0,nan"),
        ({"background": "no color"}, "--background=no color"),
    ],
)
def test_invalid_options(arguments, message):
    with pytest.raises(UserError, match=message):
        Options.parse(**arguments)


def icons() -> dict[str, bytes]:
    """Black with a transparent left half."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, 8:, 3] = 255
    indexed = np.zeros((16, 16), np.uint8)
    indexed[:, :8] = 7
    deep = indexed.astype(np.uint16) * 100
    return {
        "rgba.png": pillow(rgba, "PNG"),
        "deep rgba.png": opencv(".png", rgba.astype(np.uint16) * 257),
        "la.png": pillow(Image.fromarray(rgba).convert("LA"), "PNG"),
        "indexed gray.png": pillow(indexed, "PNG", transparency=7),
        "indexed deep gray.png": pillow(deep, "PNG", transparency=700),
        "indexed color.png": pillow(indexed, "PNG", "RGB", transparency=(7, 7, 7)),
        "palette.png": pillow(Image.fromarray(rgba).quantize(4), "PNG"),
        "x.gif": pillow(Image.fromarray(rgba), "GIF"),
        "x.webp": pillow(rgba, "WEBP", lossless=True),
        "x.tif": pillow(rgba, "TIFF"),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_transparent_images(tmp_path):
    files = icons()
    opaque = pillow(np.full((4, 4, 4), 255, np.uint8), "PNG")
    report, images = import_all(tmp_path, files | {"opaque.png": opaque})
    assert report.transparent == len(files) and not report.broken
    for name in files:
        assert (images[name][:, :8] == 255).all() and (images[name][:, 8:] == 0).all(), name
    split = tfds_dataset.Split(tmp_path / "out", "train")
    assert {x["id"]: x["image"] for x in split}["opaque.png"] == opaque  # unchanged
    again = importer.import_images(tmp_path / "src", tmp_path / "out", say=lambda _: None)
    assert again == report
    with pytest.raises(UserError, match=r"background \[255, 255, 255\], not \[0"):
        import_all(tmp_path, {}, options=Options.parse("black"))
    _, images = import_all(tmp_path, {}, "red", options=Options.parse("#ff0000"))
    for name in files:
        assert (images[name][:, :8] == (255, 0, 0)).all() and (images[name][:, 8:] == 0).all(), name


def chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def damaged() -> dict[str, bytes]:
    image = smooth_image(np.random.default_rng(0), 40, 60)
    png, jpeg = pillow(image, "PNG"), pillow(image, "JPEG")
    end = png.index(b"IEND") - 4
    wrong = bytearray(png)
    wrong[end - 2] ^= 1
    files = {
        "cut by 5.png": png[:-5],
        "cut before its end.png": png[:end],
        "checksum.png": bytes(wrong),
        "half.png": png[: len(png) // 2],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "empty.jpg": b"",
        "text.jpg": b"no image",
        "half.webp": pillow(image, "WEBP")[:200],
        "half.gif": pillow(Image.fromarray(image), "GIF")[:200],
        "half.tif": pillow(image, "TIFF")[:200],
        "color float.tif": opencv(".tif", (COLOR / 65535).astype(np.float32)),
        "header.tif": b"II*\0" + bytes([255] * 60),
    }
    avif = pillow(image, "AVIF")
    data = avif.index(b"mdat") + 4
    avif = avif[:data] + b"\xff" * (len(avif) - data)
    return files | {"avif.jpg": avif}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_undecodable_images_are_skipped(tmp_path, monkeypatch):
    """Whatever type of error Pillow raises."""
    image = smooth_image(np.random.default_rng(1), 40, 60)
    good = {"good.png": pillow(image, "PNG"), "good.jpg": pillow(image, "JPEG")}
    report, images = import_all(tmp_path, damaged() | good)
    assert images.keys() == good.keys()
    assert [line.partition(": ")[0] for line in report.broken] == sorted(damaged())
    assert not any(" at 0x" in line or "\n" in line for line in report.broken)
    for i, error in enumerate((RuntimeError, struct.error, TypeError, AttributeError)):

        def load(self, error=error):
            raise error("odd\nmore")

        monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", load)
        files = {"odd.tif": DEEP["8 bits.tif"]}
        report, _ = import_all(tmp_path, files, f"out{i}")
        assert f"odd.tif: {error.__name__}: odd" in report.broken


def test_formats_of_phones(tmp_path):
    image = smooth_image(np.random.default_rng(1), 40, 60)
    files = {"a.jfif": pillow(image, "JPEG"), "b.avif": pillow(image, "AVIF", quality=95)}
    _, images = import_all(tmp_path, files)
    assert images.keys() == files.keys()
    for name, pixels in images.items():
        assert np.abs(pixels.astype(int) - image).mean() < 6, name


def test_an_import_of_an_earlier_version(tmp_path):
    """A finished one is unchanged; an unfinished one is not resumed with other decoding rules."""
    import_all(tmp_path, DEEP, shard_size=4)
    file = tmp_path / "out" / import_settings.FILE
    saved = json.loads(file.read_text())
    file.write_text(
        json.dumps({k: v for k, v in saved.items() if k not in ("background", "range")})
    )
    output = []
    arguments = tmp_path / "src", tmp_path / "out"
    importer.import_images(*arguments, shard_size=4, say=output.append)
    assert output == [f"{tmp_path / 'out'} is finished: nothing to do"]
    (tmp_path / "out/dataset_info.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path}/out .*earlier version.*--out"):
        importer.import_images(*arguments, shard_size=4, say=output.append)


def test_visualize_decodes_like_an_import(tmp_path, capsys):
    from dgpt_jax.commands import image_selection

    image = smooth_image(np.random.default_rng(0), 24, 24)
    files = {
        "a.tif": DEEP["opencv.tif"],
        "b.png": rotated(image),
        "c.png": icons()["rgba.png"],
        "d.jfif": pillow(image, "JPEG"),
        "e.heic": b"x",
    }
    _, images = import_all(tmp_path, files)
    hidden = tmp_path / "src/.ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "a.png").write_bytes(files["b.png"])
    entries = image_selection.list_images([str(tmp_path / "src")])
    output = capsys.readouterr().out
    assert "skipped files: 1 .heic\n" in output and "1 .ipynb_checkpoints" in output
    assert [image_selection.label(x) for x in entries] == ["src/a", "src/b", "src/c", "src/d"]
    images_read = image_selection.read_images(entries, 16)
    for image, pixels in zip(images_read, images.values(), strict=True):
        np.testing.assert_array_equal(image, image_ops.center_crop(pixels, 16, 16, squash=False))


def test_the_command(tmp_path, monkeypatch, capsys):
    """Flags and report; names cannot emit terminal escapes."""
    from dgpt_jax.commands import import_images

    for name in ("cat", "dog"):
        folder = tmp_path / "src" / name
        folder.mkdir(parents=True)
        (folder / "icon.png").write_bytes(icons()["rgba.png"])
    (folder / "odd\x1b[2J\n.tif").write_bytes(NO_RANGE["float.tif"][0])
    (folder / "x.heic").write_bytes(b"")
    arguments = ["--background=#00f", "--range=0,1"]
    monkeypatch.setattr(
        sys, "argv", ["x", str(tmp_path / "src"), f"--out={tmp_path}/out", *arguments]
    )
    import_images.main()
    output = capsys.readouterr().out
    assert "composited 2 transparent images on #0000ff\n" in output
    assert "skipped files: 1 .heic\n" in output
    assert f"{tmp_path}/out: train 3; 2 classes (cat, dog); skipped 0 unreadable files\n" in output
    (folder / "odd\x1b[2J\n.tif").write_bytes(b"no image")
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "src"), f"--out={tmp_path}/out2"])
    import_images.main()
    output = capsys.readouterr().out
    assert "skipped dog/odd\\x1b[2J\\n.tif: not an image" in output and "\x1b" not in output


def test_only_two_modules_open_images():
    """No other module opens encoded images or defines extensions."""
    files = [*(ROOT / "dgpt_jax").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    readers = {f.name for f in files if "Image.open(" in f.read_text()}
    assert readers == {"user_images.py", "image_ops.py"}
    assert {f.name for f in files if "cv2.imdecode" in f.read_text()} == {"image_ops.py"}
    assert {f.name for f in files if '".webp", ' in f.read_text()} == {
        "user_images.py",
        "image_ops.py",
    }
