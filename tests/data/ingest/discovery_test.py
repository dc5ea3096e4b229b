"""Folders, lists and tars as sources of images, ImageNet's among them."""

import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from dgpt_jax import image_files, images, records, tars
from dgpt_jax.schema import UserError
from tests.data import smooth_image, write_folder


def import_all(src, out, **kwargs):
    return images.import_images(src, out, say=lambda _: None, **kwargs)


def shards_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*array_record*")}


def tar_of(path: Path, files: dict[str, bytes], kind=tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Files by path, the last ones first: tars are in no order."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), reverse=True)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def jpeg(seed=0) -> bytes:
    buffer = io.BytesIO()
    picture = smooth_image(np.random.default_rng(seed), 20, 30)
    Image.fromarray(picture).save(buffer, "JPEG")
    return buffer.getvalue()


def ids(found: image_files.Found, split="train") -> list[str]:
    return [member.id for member in found.splits[split]]


def labels(found: image_files.Found, split="train") -> list[str]:
    return [found.classes[member.label] for member in found.splits[split]]


def class_tars(folder: Path) -> dict[str, bytes]:
    """A tar a class, as ImageNet's are: files without the class folder."""
    made = {}
    for place in sorted(folder.iterdir()):
        tar = tar_of(folder.parent / "tars" / f"{place.name}.tar", contents(place))
        made[tar.name] = tar.read_bytes()
    return made


@pytest.mark.parametrize(
    "form", ["plain", "ustar", "pax", "dotted", "wrapped", "of tars", "wrapped of tars", "folder"]
)
def test_a_tar_gives_the_same_bytes_as_its_folder(tmp_path, form):
    src, tar = tmp_path / "src", tmp_path / "some.tar"
    write_folder(src, 3, classes=("n02", "n01", "é" * 60))  # too long for a tar's plain header
    shutil.copy(src / "n01/000.png", src / "n01/broken.png")
    os.truncate(src / "n01/broken.png", 200)
    files = contents(src)
    if form == "folder":  # of class tars, as ImageNet-21K of 2011
        class_tars(src)
        tar = tmp_path / "tars"
    elif form.endswith("of tars"):
        files = class_tars(src)
    prefix = {"dotted": "./", "wrapped": "whole/", "wrapped of tars": "whole/"}.get(form, "")
    kind = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT}.get(form, tarfile.GNU_FORMAT)
    if form == "ustar":
        shutil.rmtree(src / ("é" * 60))
        files = contents(src)
    if tar.suffix == ".tar":
        tar_of(tar, {prefix + name: data for name, data in files.items()}, kind)
    expected = import_all(src, tmp_path / "folder/out", shard_size=4)
    assert import_all(tar, tmp_path / "tar/out", shard_size=4, threads=2) == expected
    assert len(expected.broken) == 1 and expected.classes[:2] == ["n01", "n02"]
    assert shards_of(tmp_path / "tar/out") == shards_of(tmp_path / "folder/out")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_tarfile_finds_them(tmp_path, kind):
    files = {f"{'a' * n}/b{n}.jpg": bytes(n) for n in (1, 50, 99, 100, 150)} | {"e.jpg": b""}
    files |= {} if kind == tarfile.USTAR_FORMAT else {f"{'ö/' * 150}c.jpg": bytes(512)}
    path = tar_of(tmp_path / "x.tar", files, kind)
    with path.open("rb") as file, tarfile.open(path) as tar:
        expected = [(os.fsencode(m.name), m.offset_data, m.size) for m in tar.getmembers()]
        assert list(tars.members(file.fileno(), path)) == expected
    system = tmp_path / "sub/y.tar"
    (tmp_path / "sub/folder").mkdir(parents=True)
    (tmp_path / "sub/folder/x.jpg").write_bytes(b"12")
    os.link(tmp_path / "sub/folder/x.jpg", tmp_path / "sub/folder/y.jpg")
    with tarfile.open(system, "w", format=kind) as tar:
        tar.add(tmp_path / "sub/folder", "folder")
    with system.open("rb") as file:  # a hard link has its file's bytes; folders are left out
        assert [size for _, _, size in tars.members(file.fileno(), system)] == [2, 2]


def test_imagenet(tmp_path):
    """Both tars in a folder beside what else is there; one alone; both unpacked."""
    names = epath.Path(imagenet_common.label_names_file()).read_text().split()
    src = tmp_path / "src"
    inner = {}
    for i, name in enumerate(names[::-1]):
        files = {f"{name}_{i}.JPEG": jpeg(i)} if i % 100 == 0 else {f"{name}_1.JPEG": b"x"}
        inner[f"{name}.tar"] = tar_of(tmp_path / "x.tar", files).read_bytes()
    train = tar_of(src / "ILSVRC2012_img_train.tar", inner)
    numbers = (50000, 1, 2, 77)
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(n) for n in numbers}
    tar_of(src / "ILSVRC2012_img_val.tar", val)
    (src / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"\x1f\x8b")
    found = image_files.find(src)
    assert list(found.splits) == ["train", "validation"] and len(found.passed.compressed) == 1
    assert found.classes == names  # in TFDS's order
    assert [member.label for member in found.splits["train"]] == list(range(1000))
    truth = epath.Path(imagenet_common.label_names_file()).parent / "validation_labels.txt"
    truth = truth.read_text().split()
    assert ids(found, "validation")[1:3] == [f"ILSVRC2012_val_{n:08d}.JPEG" for n in (2, 77)]
    assert labels(found, "validation") == [truth[n - 1] for n in sorted(numbers)]
    alone = image_files.find(src / "ILSVRC2012_img_val.tar")
    assert list(alone.splits) == ["validation"] and alone.classes == names
    assert labels(alone, "validation") == labels(found, "validation")
    assert list(image_files.find(train).splits) == ["train"]
    report = import_all(src, tmp_path / "out")
    assert report.examples == {"train": 10, "validation": 4} and len(report.broken) == 990
    stored = list(records.Split(tmp_path / "out", "validation"))
    assert [names[x["label"]] for x in stored] == labels(found, "validation")
    assert stored[0]["image"] == val["ILSVRC2012_val_00000001.JPEG"]


def test_lists(tmp_path):
    write_folder(tmp_path / "pictures", 2)
    (tmp_path / "odd.name").write_bytes(jpeg())
    listed = tmp_path / "list.txt"
    listed.write_text("pictures/b/001.png\todd one\n\n./pictures/a/000.png\t7\nodd.name\t7\n")
    found = image_files.find(listed, split="mine")
    assert ids(found, "mine") == ["odd.name", "pictures/a/000.png", "pictures/b/001.png"]
    assert labels(found, "mine") == ["7", "7", "odd one"]
    assert import_all(listed, tmp_path / "out").examples == {"train": 3}
    listed.write_text("pictures/b/001.png\npictures/a/000.png\n")
    assert labels(image_files.find(listed)) == ["a", "b"]
    listed.write_bytes(b"\xef\xbb\xbfpictures/b/001.png\tb\n")  # as Windows has it
    assert ids(image_files.find(listed)) == ["pictures/b/001.png"]
    listed.write_text(f"{tmp_path}/pictures/b/001.png\n")
    assert image_files.find(listed).classes == []
    for text, message in (
        (
            "pictures/b/001.png\tx\npictures/a/000.png\n",
            "line 2: a TAB and a class in all lines or",
        ),
        ("pictures/b/001.png\nabsent.png\n", f"line 2: {tmp_path}/absent.png: No such file"),
        ("pictures/b/001.png\npictures//b/001.png\n", "1 images are there twice, the first is b/"),
        ("\n", "holds no images"),
        ("\0", "neither a folder nor a tar nor a list"),
    ):
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            image_files.find(listed)


@pytest.mark.parametrize("name", ["für Züge", "画像", "1.b-c", "a+b"])
def test_names_of_datasets(tmp_path, name):
    """TFDS takes ASCII alone."""
    write_folder(tmp_path / "src", 1)
    assert import_all(tmp_path / "src", tmp_path / name).examples == {"train": 2}
    assert len(records.Split(tmp_path / name, "train")) == 2


@pytest.mark.parametrize("name", ["all", "a+b", "a[:5]", "a/b", "a b", "train.x", "-x", ".."])
def test_names_of_splits_that_tfds_would_not_read(tmp_path, name):
    with pytest.raises(UserError, match=rf"--split={re.escape(name)}: letters, digits"):
        import_all(tmp_path, tmp_path / "out", split=name)


def test_images_beside_class_folders(tmp_path):
    """The folders are no classes then, which is said."""
    write_folder(tmp_path / "src", 2)
    (tmp_path / "src/stray.jpg").write_bytes(jpeg())
    found = image_files.find(tmp_path / "src")
    assert not found.classes and found.passed.lines() == [
        "passed over: the folders in train as classes, because beside them are 1 of its 5 images, "
        "the first is stray.jpg"
    ]


def test_a_file_of_labels(tmp_path):
    src = tar_of(tmp_path / "x.tar", {f"pictures/{i} b.jpg": jpeg() for i in (1, 2, 3)})
    table = tmp_path / "labels.txt"
    for text in (
        "\ufeff1 b.jpg\t10\n2 b.jpg\t9\n3 b.jpg\t10\n",
        "1 b.jpg 10\n2 b.jpg 9\n3 b.jpg 10\n",
    ):
        table.write_text(text + "another.jpg 10\n", encoding="utf-8")
        found = image_files.find(src, labels=table)
        assert found.classes == ["9", "10"] and labels(found) == ["10", "9", "10"]
    for text, message in (
        ("1 b.jpg 1\n", "names no class for 2 of 3 images, the first is pictures/2 b.jpg"),
        ("1.jpg\n", "line 1: not a file name"),
        ("1.jpg 1\n1.jpg 2\n", "line 2: another class for 1.jpg"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            image_files.find(src, labels=table)


def test_truncated_and_damaged_tars(tmp_path):
    """Cut anywhere, or spoiled, is never taken for whole."""
    inner = tar_of(tmp_path / "n01.tar", {"n01_1.JPEG": jpeg(), "n01_2.JPEG": jpeg()}).read_bytes()
    tar = tar_of(tmp_path / "x.tar", {"n01.tar": inner, "n02.tar": inner})
    whole = tar.read_bytes()
    last = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in (100, 512, 1000, 1024, len(inner), len(inner) + 512, len(inner) + 1024, last):
        tar.write_bytes(whole[:cut])
        with pytest.raises(
            UserError, match=r"x.tar is truncated: it ends at byte \d+, (within|af)"
        ):
            image_files.find(tar)
    tar_of(tmp_path / "y.tar", {"n01.tar": inner[:1024]})
    with pytest.raises(
        UserError, match=r"n01.tar in .*y.tar is truncated: it ends at byte 1024, w"
    ):
        image_files.find(tmp_path / "y.tar")
    for at, message in ((10, "x.tar is no tar or"), (522, "n01.tar in .*x.tar is no tar or")):
        tar.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
        with pytest.raises(UserError, match=f"{message} damaged at byte 0, after its beginning"):
            image_files.find(tar)


def test_what_is_refused(tmp_path):
    for name, data, message in (
        ("a.tar", b"", "a.tar is empty"),
        ("b.tar", bytes(10240), "b.tar holds no images"),
        ("c.tar.gz", b"\x1f\x8b123", "c.tar.gz is compressed, .*: gunzip it first"),
        ("d.tar", b"\x1f\x8b123", "d.tar is compressed, .*: gunzip it first"),
        ("e.zip", b"PK\x03\x04", "e.zip is compressed, .*: unzip it first"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            image_files.find(tmp_path / name)
    notes = tar_of(tmp_path / "f.tar", {"notes.txt": b"x", "a/._x.jpg": b"macOS"})
    with pytest.raises(UserError, match="f.tar holds no images"):
        image_files.find(notes)
    with pytest.raises(UserError, match="x.tgz in .*g.tar is compressed, .*: gunzip it first"):
        image_files.find(tar_of(tmp_path / "g.tar", {"x.tgz": b"x"}))
    with pytest.raises(UserError, match="no such file or directory"):
        image_files.find(tmp_path / "absent")
    with pytest.raises(UserError, match="gs://bucket/x is not on this machine's disks"):
        image_files.find("gs://bucket/x")
    (tmp_path / "empty/sub").mkdir(parents=True)
    with pytest.raises(UserError, match="empty holds no images"):
        image_files.find(tmp_path / "empty")


def test_twice_and_mixed(tmp_path):
    write_folder(tmp_path / "src", 2, classes=("bus", "train"))
    with pytest.raises(
        UserError, match="holds train and beside that bus: if these are all classes"
    ):
        image_files.find(tmp_path / "src")
    found = image_files.find(tmp_path / "src", split="train")
    assert labels(found) == ["bus", "bus", "train", "train"]
    tar_of(tmp_path / "src/bus.tar", {"000.png": jpeg()})
    with pytest.raises(UserError, match=r"1 images are there twice, .* bus/000.png, in .*bus"):
        image_files.find(tmp_path / "src", split="train")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/cat").symlink_to(tmp_path / "src/bus")
    (tmp_path / "links/dog").symlink_to(tmp_path / "src/train")
    (tmp_path / "src/bus/round").symlink_to(tmp_path / "src/bus")
    assert labels(image_files.find(tmp_path / "links")) == ["cat", "cat", "dog", "dog"]
