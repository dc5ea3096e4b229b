"""Import of unusual files; reruns and interruptions."""

import functools
import json
import shutil
import signal
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest import discovery, import_settings, importer, shard_writer
from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, tfds_dataset
from tests.support import processes
from tests.support.data import smooth_image, write_folder


def import_all(src, out, **kwargs):
    return importer.import_images(src, out, say=lambda _: None, **kwargs)


def stored_images(out, split="train"):
    source = tfds_dataset.Split(out, split)
    return {source[i]["id"]: image_ops.decode_image(source[i]["image"]) for i in range(len(source))}


@pytest.fixture
def odd_folder(tmp_path):
    """A folder of files of each kind, some unreadable; and the upright image."""
    image_array = smooth_image(np.random.default_rng(0), 20, 30)
    image = Image.fromarray(image_array)
    folder = tmp_path / "src"
    (folder / "deeper").mkdir(parents=True)
    image.save(folder / "plain.png")
    image.save(folder / "plain.jpg", quality=95)
    image.convert("L").save(folder / "grey.jpg", quality=95)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.save(folder / "deeper" / "UPPER.JPEG", quality=95)
    image.save(folder / "bitmap.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90° clockwise for display
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "exif.jpg", quality=95, exif=exif)
    data = (folder / "plain.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "lost.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "notes.txt").write_text("not looked at")
    return folder, image_array


def test_odd_files(odd_folder, tmp_path):
    folder, image_array = odd_folder
    report = import_all(folder, tmp_path / "out")
    assert report.examples == {"train": 7} and report.classes == []
    assert [line.split(":")[0] for line in report.broken] == [
        "lost.jpg", "text.png", "truncated.jpg",
    ]  # fmt: skip
    images = stored_images(tmp_path / "out")
    assert images["plain.png"].tolist() == image_array.tolist() == images["bitmap.bmp"].tolist()
    # Bytes of an upright JPEG are unchanged.
    source = tfds_dataset.Split(tmp_path / "out", "train")
    stamps = {source[i]["id"]: source[i]["image"] for i in range(len(source))}
    assert stamps["plain.jpg"] == (folder / "plain.jpg").read_bytes()
    for name in ("plain.jpg", "deeper/UPPER.JPEG", "exif.jpg", "cmyk.jpg"):
        assert images[name].shape == image_array.shape, name
        error = np.abs(images[name].astype(int) - image_array).mean()
        assert error < 6, (name, error)
    grey = np.asarray(Image.fromarray(image_array).convert("L"), int)
    assert np.abs(images["grey.jpg"].astype(int) - grey[..., None]).mean() < 3


def test_class_folders_and_split_folders(tmp_path):
    write_folder(tmp_path / "src", 3, split="train")
    write_folder(tmp_path / "src", 2, split="test", classes=("a", "b"))
    report = import_all(tmp_path / "src", tmp_path / "out")
    assert report.examples == {"test": 4, "train": 6} and report.classes == ["a", "b"]
    source = tfds_dataset.Split(tmp_path / "out", "test")
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    assert source[3]["id"] == "b/001.png"


def test_shards_hold_the_files_in_order(tmp_path):
    write_folder(tmp_path / "src", 5)
    import_all(tmp_path / "src", tmp_path / "out", shard_size=3, threads=4)
    assert len(list((tmp_path / "out").glob("[!.]*array_record*"))) == 4
    source = tfds_dataset.Split(tmp_path / "out", "train")
    assert [source[i]["id"] for i in (0, 4, 5, 9)] == [
        "a/000.png", "a/004.png", "b/000.png", "b/004.png",
    ]  # fmt: skip


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_unlabelled_and_labelled_splits(tmp_path):
    """A test split without classes, like ImageNet's."""
    write_folder(tmp_path / "src/train", 1)
    shutil.copytree(tmp_path / "src/train/a", tmp_path / "src/test")
    assert import_all(tmp_path / "src", tmp_path / "out").examples == {"test": 1, "train": 2}
    assert [x["label"] for x in tfds_dataset.Split(tmp_path / "out", "test")] == [-1]
    assert [x["label"] for x in tfds_dataset.Split(tmp_path / "out", "train")] == [0, 1]


def test_a_shard_of_unreadable_files(tmp_path):
    write_folder(tmp_path / "src", 1, classes="abc")
    (tmp_path / "src/b/000.png").write_text("no image")
    assert import_all(tmp_path / "src", tmp_path / "out", shard_size=1).examples == {"train": 2}
    assert list(stored_images(tmp_path / "out")) == ["a/000.png", "c/000.png"]


def test_examples_are_serialized_deterministically():
    """Fields are sorted by name; protobuf's own order differs between processes."""
    serialize = tfds_dataset.serializer(tfds_dataset.image_features(["a"]))
    data = serialize({"label": 0, "image": b"JPEG", "id": "a/b"})
    assert data.index(b"\x02id") < data.index(b"\x05image") < data.index(b"\x05label")


def test_the_source_cannot_be_the_output(tmp_path, monkeypatch):
    write_folder(tmp_path / "src", 2)
    monkeypatch.chdir(tmp_path)
    paths = sorted((tmp_path / "src").rglob("*"))
    with pytest.raises(UserError, match="--out"):
        import_all(tmp_path / "src", "src/../src")
    assert sorted((tmp_path / "src").rglob("*")) == paths


def test_no_readable_image(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.jpg").write_text("no image")
    for _ in range(2):  # a rerun raises the same error
        with pytest.raises(UserError, match="none of 1 image .* x.jpg: not an image"):
            import_all(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rerun_of_a_finished_import(tmp_path):
    src, out, lines = tmp_path / "src", tmp_path / "out", []
    write_folder(src, 3)
    (src / "a/broken.png").write_text("no image")
    first = import_all(src, out, shard_size=2)
    expected = files_of(out)
    assert importer.import_images(src, out, shard_size=2, say=lines.append) == first
    assert lines == [f"{out} is finished: nothing to do"]
    assert files_of(out) == expected and first.broken[0].startswith("a/broken.png: not an image")
    with pytest.raises(UserError, match="shard_size 2, not 3"):
        import_all(src, out, shard_size=3)
    shutil.copytree(src, tmp_path / "copy")
    with pytest.raises(UserError, match=f"source '{src}', not '{tmp_path}/copy'"):
        import_all(tmp_path / "copy", out, shard_size=2)
    (src / "a/000.png").write_bytes((src / "a/000.png").read_bytes() + b"x")
    with pytest.raises(UserError, match=r"other names or sizes of files, or other labels"):
        import_all(src, out, shard_size=2)
    with pytest.raises(UserError, match=r"splits train, not dev \(split folders, or --split\)"):
        import_all(src, out, shard_size=2, split="dev")
    table = tmp_path / "labels.txt"
    names = [path.relative_to(src) for path in sorted(src.rglob("*.png"))]
    table.write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    with pytest.raises(UserError, match=r"2 classes, not \d \(class folders, or --labels\)"):
        import_all(src, out, shard_size=2, labels=table)
    (out / import_settings.FILE).unlink()
    with pytest.raises(UserError, match=f"{out} already contains"):
        import_all(src, out, shard_size=2)


def test_too_little_disk_space(tmp_path, monkeypatch):
    write_folder(tmp_path / "src", 2)
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"deep/out needs .* choose another --out"):
        import_all(tmp_path / "src", tmp_path / "deep/out")
    assert not (tmp_path / "deep").exists()


def test_a_changed_source_aborts_the_import(tmp_path, monkeypatch):
    """Otherwise all later images would be skipped as unreadable."""
    write_folder(tmp_path / "src", 2)
    find = discovery.discover

    def spoiled(*args, **kwargs):
        images = find(*args, **kwargs)
        spoil()
        return images

    monkeypatch.setattr(discovery, "discover", spoiled)
    spoil = (tmp_path / "src/b/001.png").unlink
    with pytest.raises(UserError, match=r"b/001.png: No such file"):
        import_all(tmp_path / "src", tmp_path / "out")
    assert not list((tmp_path / "out").glob("[!.]*array_record*"))
    spoil = functools.partial((tmp_path / "src/b/000.png").write_text, "short")
    with pytest.raises(UserError, match=r"b/000.png .* bytes when listed, now 5"):
        import_all(tmp_path / "src", tmp_path / "out2")


def test_progress(tmp_path, monkeypatch):
    write_folder(tmp_path / "src", 2)
    (tmp_path / "src/a/broken.png").write_text("no image")
    lines = []
    monkeypatch.setattr(shard_writer, "SAY_EVERY", -1)
    importer.import_images(tmp_path / "src", tmp_path / "out", say=lines.append)
    assert lines[0] == f"{tmp_path / 'src'}: train 5 images, 2 classes, 0.00 MB"
    assert lines[3].startswith("images 3/5 (60.0%), ") and len(lines) == 7
    assert "img/s, 1 unreadable so far, eta 0m0" in lines[3]


def test_a_killed_import_resumes(tmp_path):
    """After Ctrl-C and kill -9, a third run gives the same bytes as an uninterrupted one."""
    src = tmp_path / "src"
    write_folder(src, 150, size=(100, 120))
    (src / "a/000.png").write_text("no image")
    out, expected = tmp_path / "stopped/out", tmp_path / "whole/out"
    words = ["tools/import_images.py", src, f"--out={out}", "--shard_size=10", "--threads=1"]
    for number, code, shards_before in ((signal.SIGINT, 130, 2), (signal.SIGKILL, -9, 5)):
        process = processes.start(words)
        while len(list(out.glob(".*.receipt"))) < shards_before and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        (output,) = processes.outputs_of([process], timeout=60)
        assert process.returncode == code, output
        assert "Traceback" not in output and not (out / "dataset_info.json").exists()
    assert ": keeping " in output  # of the second command
    stamps = {
        out / name: (out / name).stat().st_mtime_ns for name in array_record_shards.shard_infos(out)
    }
    assert 5 <= len(stamps) < 30
    (out / ".left.partial").write_text("partial shard")
    report = import_all(src, out, shard_size=10)
    assert report == import_all(src, expected, shard_size=10) and len(report.broken) == 1
    assert files_of(out) == files_of(expected)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_the_command(tmp_path, monkeypatch, capsys):
    from dgpt_jax.commands import import_images

    write_folder(tmp_path / "src", 2)
    (tmp_path / "src/a/broken.png").write_text("no image")
    words = [str(tmp_path / "src"), f"--out={tmp_path / 'out'}"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["import_images.py", *words])
        cli.run(import_images.main)
        lines = capsys.readouterr().out
        assert "skipped a/broken.png: not an image" in lines
        assert (
            "train 4; 2 classes (a, b); skipped 1 unreadable file\nnext: python tools/build"
            in lines
        )
    settings = json.loads((tmp_path / "out" / import_settings.FILE).read_text())
    assert settings["shard_size"] == importer.SHARD_SIZE and settings["images"] == {"train": 5}
    assert len(array_record_shards.shard_infos(tmp_path / "out")) == 1
