"""Images of every depth, with transparency, damaged: what an import makes of them, and who else
reads them."""

import io
import json
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from dgpt_jax import images, import_settings, records, views
from dgpt_jax.schema import UserError
from dgpt_jax.user_images import Options
from tests.data import smooth_image

RAMP = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
COLOUR = np.stack([RAMP, RAMP.T, RAMP[::-1]], -1)
GREY = np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, -1)
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
    places = (273, 4, 8), (277, 3, 1), (278, 4, 64), (279, 4, len(raw)), (339, 3, sample)
    tags = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value)
        for tag, kind, value in sizes + places
    )
    return (
        b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + struct.pack("<H", 10) + tags + bytes(4)
    )


def turned(pixels) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return pillow(np.ascontiguousarray(pixels[::-1, ::-1]), "PNG", exif=exif)


def import_all(tmp_path, files: dict[str, bytes], out="out", **options):
    """(report, {name: image as training decodes it})"""
    folder = tmp_path / "src"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    report = images.import_images(folder, tmp_path / out, say=lambda _: None, **options)
    split = records.Split(tmp_path / out, "train")
    return report, {x["id"]: views.decode_picture(x["image"]) for x in split}


DEEP = {  # files whose pixels are those of GREY
    "opencv.png": opencv(".png", RAMP),
    "pillow.png": pillow(RAMP, "PNG"),
    "turned.png": turned(RAMP),
    "opencv.tif": opencv(".tif", RAMP),
    "deflated.tif": pillow(RAMP, "TIFF", compression="tiff_adobe_deflate"),
    "big endian.tif": pillow(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
    "12 bits.tif": tiff(12, 1, np.packbits(PACKED_12[..., 4:].reshape(64, -1), axis=1).tobytes()),
    "32 bits.tif": tiff(32, 1, (RAMP.astype("<u4") * 65537).tobytes()),
    "white is 0.tif": tiff(16, 1, (65535 - RAMP).astype("<u2").tobytes(), photometric=0),
    "16 bits.ppm": b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes(),
    "12 bits.ppm": b"P5 64 64 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
    "8 bits.tif": pillow(GREY, "TIFF"),
}
COLOURS = {
    "16 bits.png": opencv(".png", COLOUR[..., ::-1]),
    "16 bits.tif": opencv(".tif", COLOUR[..., ::-1]),
}
NO_RANGE = {
    "float.tif": (opencv(".tif", (RAMP / 65535).astype(np.float32)), "floats (mode F)"),
    "pfm.ppm": (b"Pf\n64 64\n-1.0\n" + RAMP.astype("<f4").tobytes(), "floats (mode F)"),
    "16 bits.tif": (tiff(16, 2, RAMP.astype("<i2").tobytes()), "signed integers (mode I)"),
    "32 bits.tif": (tiff(32, 2, RAMP.astype("<i4").tobytes()), "signed integers (mode I)"),
}


def test_deeper_than_8_bits(tmp_path):
    report, found = import_all(tmp_path, DEEP)
    assert not report.broken and found.keys() == DEEP.keys()
    for name, pixels in found.items():
        np.testing.assert_array_equal(pixels, GREY, err_msg=name)


def test_deep_colours(tmp_path):
    _, found = import_all(tmp_path, COLOURS)
    for name, pixels in found.items():
        assert np.abs(pixels.astype(int) - (COLOUR >> 8)).max() <= 1, name


def test_no_range_is_guessed(tmp_path):
    files = {name: data for name, (data, _) in NO_RANGE.items()}
    report, found = import_all(tmp_path, files | {"good.png": DEEP["opencv.png"]})
    assert list(found) == ["good.png"]
    assert report.broken == [
        f"{name}: {NO_RANGE[name][1]}, of which no range is black to white: import "
        f"them by tools/import_images.py with --range=LOW,HIGH"
        for name in sorted(NO_RANGE)
    ]


def test_a_range_is_given(tmp_path):
    options = Options.parse(range="0.25,0.75")
    files = {"float.tif": NO_RANGE["float.tif"][0], "colour.png": COLOURS["16 bits.png"]}
    files["white is 0.tif"] = tiff(32, 3, (1 - RAMP / 65535).astype("<f4").tobytes(), 0)
    files["8 bits.gif"] = pillow(GREY, "GIF")
    odd = np.tile(np.float32([np.nan, -np.inf, np.inf, 1e38]), 1024)
    files["odd.tif"] = tiff(32, 3, odd.tobytes())
    report, found = import_all(tmp_path, files, options=options)
    expected = ((RAMP / 65535 - 0.25) / 0.5 * 255).clip(0, 255)
    for name in ("float.tif", "white is 0.tif"):
        assert np.abs(found[name] - expected[..., None]).max() < 1, name
    assert (found["8 bits.gif"] == GREY).all()  # which has no depth for a range
    assert (found["odd.tif"][0, :4, 0] == (0, 0, 255, 255)).all()
    assert report.broken == [
        "colour.png: deeper than 8 bits in several channels: a range is for one"
    ]
    _, found = import_all(
        tmp_path, {"colour.png": DEEP["pillow.png"]}, "out2", options=Options.parse("red", "0,255")
    )
    assert (found["colour.png"] == RAMP.clip(0, 255)[..., None]).all()


@pytest.mark.parametrize(
    "words, message",
    [
        ({"range": "1"}, "--range=1: must be two numbers"),
        ({"range": "a,b"}, "--range=a,b: must be two numbers"),
        ({"range": "1,1"}, "--range=1,1: LOW must be less than HIGH"),
        ({"range": "0,nan"}, "--range=0,nan: LOW must be less than HIGH"),
        ({"background": "no colour"}, "--background=no colour: not a colour's name"),
    ],
)
def test_options_that_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        Options.parse(**words)


def icons() -> dict[str, bytes]:
    """Black with a transparent left half."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, 8:, 3] = 255
    named = np.zeros((16, 16), np.uint8)
    named[:, :8] = 7
    deep = named.astype(np.uint16) * 100
    return {
        "rgba.png": pillow(rgba, "PNG"),
        "deep rgba.png": opencv(".png", rgba.astype(np.uint16) * 257),
        "la.png": pillow(Image.fromarray(rgba).convert("LA"), "PNG"),
        "named grey.png": pillow(named, "PNG", transparency=7),
        "named deep grey.png": pillow(deep, "PNG", transparency=700),
        "named colour.png": pillow(named, "PNG", "RGB", transparency=(7, 7, 7)),
        "palette.png": pillow(Image.fromarray(rgba).quantize(4), "PNG"),
        "x.gif": pillow(Image.fromarray(rgba), "GIF"),
        "x.webp": pillow(rgba, "WEBP", lossless=True),
        "x.tif": pillow(rgba, "TIFF"),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_transparent_images(tmp_path):
    files = icons()
    opaque = pillow(np.full((4, 4, 4), 255, np.uint8), "PNG")
    report, found = import_all(tmp_path, files | {"opaque.png": opaque})
    assert report.transparent == len(files) and not report.broken
    for name in files:
        assert (found[name][:, :8] == 255).all() and (found[name][:, 8:] == 0).all(), name
    split = records.Split(tmp_path / "out", "train")
    assert {x["id"]: x["image"] for x in split}["opaque.png"] == opaque  # bytes are kept
    again = images.import_images(tmp_path / "src", tmp_path / "out", say=lambda _: None)
    assert again == report
    with pytest.raises(UserError, match=r"begun with background \[255, 255, 255\], now it is \[0"):
        import_all(tmp_path, {}, options=Options.parse("black"))
    _, found = import_all(tmp_path, {}, "red", options=Options.parse("#ff0000"))
    for name in files:
        assert (found[name][:, :8] == (255, 0, 0)).all() and (found[name][:, 8:] == 0).all(), name


def chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def damaged() -> dict[str, bytes]:
    picture = smooth_image(np.random.default_rng(0), 40, 60)
    png, jpeg = pillow(picture, "PNG"), pillow(picture, "JPEG")
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
        "half.webp": pillow(picture, "WEBP")[:200],
        "half.gif": pillow(Image.fromarray(picture), "GIF")[:200],
        "half.tif": pillow(picture, "TIFF")[:200],
        "colour float.tif": opencv(".tif", (COLOUR / 65535).astype(np.float32)),
        "header.tif": b"II*\0" + bytes([255] * 60),
    }
    avif = pillow(picture, "AVIF")
    data = avif.index(b"mdat") + 4
    avif = avif[:data] + b"\xff" * (len(avif) - data)
    return files | {"avif.jpg": avif}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_what_training_cannot_decode_is_left_out(tmp_path, monkeypatch):
    """And whatever Pillow raises: its parsers are many."""
    picture = smooth_image(np.random.default_rng(1), 40, 60)
    good = {"good.png": pillow(picture, "PNG"), "good.jpg": pillow(picture, "JPEG")}
    report, found = import_all(tmp_path, damaged() | good)
    assert found.keys() == good.keys()
    assert [line.partition(": ")[0] for line in report.broken] == sorted(damaged())
    assert not any(" at 0x" in line or "\n" in line for line in report.broken)
    for i, error in enumerate((RuntimeError, struct.error, TypeError, AttributeError)):

        def load(self, error=error):
            raise error("odd\nmore")

        monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", load)
        files = {"odd.tif": DEEP["8 bits.tif"]}
        report, _ = import_all(tmp_path, files, f"out{i}")
        assert f"odd.tif: {error.__name__}: odd" in report.broken


def test_formats_of_telephones(tmp_path):
    picture = smooth_image(np.random.default_rng(1), 40, 60)
    files = {"a.jfif": pillow(picture, "JPEG"), "b.avif": pillow(picture, "AVIF", quality=95)}
    _, found = import_all(tmp_path, files)
    assert found.keys() == files.keys()
    for name, pixels in found.items():
        assert np.abs(pixels.astype(int) - picture).mean() < 6, name


def test_an_import_of_an_earlier_version(tmp_path):
    """A finished one is left as it is; a part of one is not continued by other rules."""
    import_all(tmp_path, DEEP, shard_size=4)
    file = tmp_path / "out" / import_settings.FILE
    before = json.loads(file.read_text())
    file.write_text(
        json.dumps({k: v for k, v in before.items() if k not in ("background", "range")})
    )
    said = []
    words = tmp_path / "src", tmp_path / "out"
    images.import_images(*words, shard_size=4, say=said.append)
    assert said == [f"{tmp_path / 'out'} is finished: nothing to do"]
    (tmp_path / "out/dataset_info.json").unlink()
    with pytest.raises(UserError, match="was begun by an earlier version, .* and is not finished"):
        images.import_images(*words, shard_size=4, say=said.append)


def test_visualize_reads_as_an_import_does(tmp_path, capsys):
    import visualize

    picture = smooth_image(np.random.default_rng(0), 24, 24)
    files = {
        "a.tif": DEEP["opencv.tif"],
        "b.png": turned(picture),
        "c.png": icons()["rgba.png"],
        "d.jfif": pillow(picture, "JPEG"),
        "e.heic": b"x",
    }
    _, found = import_all(tmp_path, files)
    hidden = tmp_path / "src/.ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "a.png").write_bytes(files["b.png"])
    listed = visualize.list_images([str(tmp_path / "src")])
    said = capsys.readouterr().out
    assert "passed over files: 1 .heic\n" in said and "1 .ipynb_checkpoints" in said
    assert [visualize.label(x) for x in listed] == ["src/a", "src/b", "src/c", "src/d"]
    drawn = visualize.read_pictures(listed, 16)
    for image, pixels in zip(drawn, found.values(), strict=True):
        np.testing.assert_array_equal(image, views.centre_crop(pixels, 16, 16, squash=False))


def test_the_command(tmp_path, monkeypatch, capsys):
    """Its flags and report; names cannot move the terminal's cursor."""
    import import_images

    for name in ("cat", "dog"):
        folder = tmp_path / "src" / name
        folder.mkdir(parents=True)
        (folder / "icon.png").write_bytes(icons()["rgba.png"])
    (folder / "odd\x1b[2J\n.tif").write_bytes(NO_RANGE["float.tif"][0])
    (folder / "x.heic").write_bytes(b"")
    words = ["--background=#00f", "--range=0,1"]
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "src"), f"--out={tmp_path}/out", *words])
    import_images.main()
    said = capsys.readouterr().out
    assert "2 transparent images lie on #0000ff\n" in said
    assert "passed over files: 1 .heic\n" in said
    assert f"{tmp_path}/out: train 3; 2 classes (cat, dog); 0 unreadable files skipped\n" in said
    (folder / "odd\x1b[2J\n.tif").write_bytes(b"no image")
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "src"), f"--out={tmp_path}/out2"])
    import_images.main()
    said = capsys.readouterr().out
    assert "skipped dog/odd\\x1b[2J\\n.tif: not an image" in said and "\x1b" not in said


def test_readers_are_one():
    """No other module opens encoded images, or names extensions of its own."""
    root = Path(__file__).parent.parent
    files = [*(root / "dgpt_jax").rglob("*.py"), *(root / "tools").glob("*.py")]
    readers = {f.name for f in files if "Image.open(" in f.read_text()}
    assert readers == {"user_images.py", "views.py"}
    assert {f.name for f in files if "cv2.imdecode" in f.read_text()} == {"views.py"}
    assert {f.name for f in files if '".webp", ' in f.read_text()} == {"user_images.py", "views.py"}
