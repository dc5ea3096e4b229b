"""Importing images as users have them: odd files, reruns, kills."""

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

from dgpt_jax import cli, image_files, images, import_settings, records, shards, views
from dgpt_jax.schema import UserError
from tests import processes
from tests.data import smooth_image, write_folder


def import_all(src, out, **kwargs):
    return images.import_images(src, out, say=lambda _: None, **kwargs)


def pictures(out, split="train"):
    source = records.Split(out, split)
    return {source[i]["id"]: views.decode_picture(source[i]["image"]) for i in range(len(source))}


@pytest.fixture
def odd_folder(tmp_path):
    """One of each kind, and one broken file; returns the folder and the upright picture."""
    picture = smooth_image(np.random.default_rng(0), 20, 30)
    image = Image.fromarray(picture)
    folder = tmp_path / "src"
    (folder / "deeper").mkdir(parents=True)
    image.save(folder / "plain.png")
    image.save(folder / "plain.jpg", quality=95)
    image.convert("L").save(folder / "grey.jpg", quality=95)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.save(folder / "deeper" / "UPPER.JPEG", quality=95)
    image.save(folder / "bitmap.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned, to be shown after a turn by 90° clockwise
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "exif.jpg", quality=95, exif=exif)
    data = (folder / "plain.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "lost.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "notes.txt").write_text("not looked at")
    return folder, picture


def test_odd_files(odd_folder, tmp_path):
    folder, picture = odd_folder
    report = import_all(folder, tmp_path / "out")
    assert report.examples == {"train": 7} and report.classes == []
    assert [line.split(":")[0] for line in report.broken] == [
        "lost.jpg", "text.png", "truncated.jpg",
    ]  # fmt: skip
    found = pictures(tmp_path / "out")
    assert found["plain.png"].tolist() == picture.tolist() == found["bitmap.bmp"].tolist()
    # Bytes of an upright JPEG are kept as they are.
    source = records.Split(tmp_path / "out", "train")
    kept = {source[i]["id"]: source[i]["image"] for i in range(len(source))}
    assert kept["plain.jpg"] == (folder / "plain.jpg").read_bytes()
    for name in ("plain.jpg", "deeper/UPPER.JPEG", "exif.jpg", "cmyk.jpg"):
        assert found[name].shape == picture.shape, name
        error = np.abs(found[name].astype(int) - picture).mean()
        assert error < 6, (name, error)
    grey = np.asarray(Image.fromarray(picture).convert("L"), int)
    assert np.abs(found["grey.jpg"].astype(int) - grey[..., None]).mean() < 3


def test_class_folders_and_split_folders(tmp_path):
    write_folder(tmp_path / "src", 3, split="train")
    write_folder(tmp_path / "src", 2, split="test", classes=("a", "b"))
    report = import_all(tmp_path / "src", tmp_path / "out")
    assert report.examples == {"test": 4, "train": 6} and report.classes == ["a", "b"]
    source = records.Split(tmp_path / "out", "test")
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    assert source[3]["id"] == "b/001.png"


def test_shards_hold_the_files_in_order(tmp_path):
    write_folder(tmp_path / "src", 5)
    import_all(tmp_path / "src", tmp_path / "out", shard_size=3, threads=4)
    assert len(list((tmp_path / "out").glob("[!.]*array_record*"))) == 4
    source = records.Split(tmp_path / "out", "train")
    assert [source[i]["id"] for i in (0, 4, 5, 9)] == [
        "a/000.png", "a/004.png", "b/000.png", "b/004.png",
    ]  # fmt: skip


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_unlabelled_beside_labelled(tmp_path):
    """A test split without classes, as ImageNet's."""
    write_folder(tmp_path / "src/train", 1)
    shutil.copytree(tmp_path / "src/train/a", tmp_path / "src/test")
    assert import_all(tmp_path / "src", tmp_path / "out").examples == {"test": 1, "train": 2}
    assert [x["label"] for x in records.Split(tmp_path / "out", "test")] == [-1]
    assert [x["label"] for x in records.Split(tmp_path / "out", "train")] == [0, 1]


def test_a_shard_of_unreadable_files(tmp_path):
    write_folder(tmp_path / "src", 1, classes="abc")
    (tmp_path / "src/b/000.png").write_text("no image")
    assert import_all(tmp_path / "src", tmp_path / "out", shard_size=1).examples == {"train": 2}
    assert list(pictures(tmp_path / "out")) == ["a/000.png", "c/000.png"]


def test_bytes_of_an_example_are_those_of_any_process():
    """Fields by name; protobuf left to itself has another order in another process."""
    serialize = records.serializer(records.image_features(["a"]))
    data = serialize({"label": 0, "image": b"JPEG", "id": "a/b"})
    assert data.index(b"\x02id") < data.index(b"\x05image") < data.index(b"\x05label")


def test_the_source_is_not_written_into(tmp_path, monkeypatch):
    write_folder(tmp_path / "src", 2)
    monkeypatch.chdir(tmp_path)
    before = sorted((tmp_path / "src").rglob("*"))
    with pytest.raises(UserError, match="is the source itself"):
        import_all(tmp_path / "src", "src/../src")
    assert sorted((tmp_path / "src").rglob("*")) == before


def test_none_can_be_read(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.jpg").write_text("no image")
    for _ in range(2):  # and a rerun says the same
        with pytest.raises(
            UserError, match=r"none of the 1 images .* the first: x.jpg: not an image"
        ):
            import_all(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rerun(tmp_path):
    src, out, said = tmp_path / "src", tmp_path / "out", []
    write_folder(src, 3)
    (src / "a/broken.png").write_text("no image")
    first = import_all(src, out, shard_size=2)
    whole = files_of(out)
    assert images.import_images(src, out, shard_size=2, say=said.append) == first
    assert said == [f"{out} is finished: nothing to do"]
    assert files_of(out) == whole and first.broken[0].startswith("a/broken.png: not an image")
    with pytest.raises(UserError, match=r"begun with shard_size 2, now it is 3"):
        import_all(src, out, shard_size=3)
    shutil.copytree(src, tmp_path / "copy")
    with pytest.raises(UserError, match=f"begun with source '{src}', now it is '{tmp_path}/copy'"):
        import_all(tmp_path / "copy", out, shard_size=2)
    (src / "a/000.png").write_bytes((src / "a/000.png").read_bytes() + b"x")
    with pytest.raises(UserError, match=r"begun with files_digest '\w+', now it is '\w+'"):
        import_all(src, out, shard_size=2)
    (out / import_settings.FILE).unlink()
    with pytest.raises(UserError, match="already holds a dataset"):
        import_all(src, out, shard_size=2)


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    write_folder(tmp_path / "src", 2)
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs about 0.00 GB more and .* has 0.00 GB free"):
        import_all(tmp_path / "src", tmp_path / "deep/out")
    assert not (tmp_path / "deep").exists()


def test_a_source_that_changes_ends_the_import(tmp_path, monkeypatch):
    """Else all that follows would be left out as unreadable."""
    write_folder(tmp_path / "src", 2)
    find = image_files.find

    def spoiled(*args, **kwargs):
        found = find(*args, **kwargs)
        spoil()
        return found

    monkeypatch.setattr(image_files, "find", spoiled)
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
    said = []
    monkeypatch.setattr(images, "SAY_EVERY", -1)
    images.import_images(tmp_path / "src", tmp_path / "out", say=said.append)
    assert said[0] == f"{tmp_path / 'src'}: train 5 images, 2 classes, 0.00 GB"
    assert said[3].startswith("3/5 (60.0%), ") and len(said) == 7
    assert "img/s, 1 unreadable so far, eta 0m0" in said[3]


def test_killed_and_stopped_it_continues(tmp_path):
    """Ctrl-C, kill -9, and a third run: the same bytes as from one that was left alone."""
    src = tmp_path / "src"
    write_folder(src, 150, size=(100, 120))
    (src / "a/000.png").write_text("no image")
    out, whole = tmp_path / "stopped/out", tmp_path / "whole/out"
    words = ["tools/import_images.py", src, f"--out={out}", "--shard_size=10", "--threads=1"]
    for number, code, shards_before in ((signal.SIGINT, 130, 2), (signal.SIGKILL, -9, 5)):
        process = processes.start(words)
        while len(list(out.glob(".*.receipt"))) < shards_before and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        (output,) = processes.outputs_of([process], timeout=60)
        assert process.returncode == code, output
        assert "Traceback" not in output and not (out / "dataset_info.json").exists()
    assert "shards are kept" in output  # of the second command
    kept = {out / name: (out / name).stat().st_mtime_ns for name in shards.receipts(out)}
    assert 5 <= len(kept) < 30
    (out / ".left.partial").write_text("as a writer that was killed leaves it")
    report = import_all(src, out, shard_size=10)
    assert report == import_all(src, whole, shard_size=10) and len(report.broken) == 1
    assert files_of(out) == files_of(whole)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_the_command(tmp_path, monkeypatch, capsys):
    import import_images

    write_folder(tmp_path / "src", 2)
    (tmp_path / "src/a/broken.png").write_text("no image")
    words = [str(tmp_path / "src"), f"--out={tmp_path / 'out'}"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["import_images.py", *words])
        cli.run(import_images.main)
        said = capsys.readouterr().out
        assert "skipped a/broken.png: not an image" in said
        assert (
            "train 4; 2 classes (a, b); 1 unreadable files skipped\nnext: python tools/build"
            in said
        )
    settings = json.loads((tmp_path / "out" / import_settings.FILE).read_text())
    assert settings["shard_size"] == images.SHARD_SIZE and settings["images"] == {"train": 5}
    assert len(shards.receipts(tmp_path / "out")) == 1
