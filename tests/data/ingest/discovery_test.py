"""Folders, lists and tars as sources of images, ImageNet's among them."""

import io
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from dgpt_jax.data.ingest import discovery, importer, tar_index
from dgpt_jax.errors import UserError
from dgpt_jax.storage import byte_ranges, tfds_dataset
from tests.support.data import smooth_image, write_folder


def import_all(src, out, **kwargs):
    return importer.import_images(src, out, say=lambda _: None, **kwargs)


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
    """Files by path, in reverse order: tars are not sorted."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), reverse=True)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def jpeg(seed=0) -> bytes:
    buffer = io.BytesIO()
    image = smooth_image(np.random.default_rng(seed), 20, 30)
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def ids(discovered: discovery.Discovered, split="train") -> list[str]:
    return [member.id for member in discovered.splits[split]]


def labels(discovered: discovery.Discovered, split="train") -> list[str]:
    return [discovered.classes[member.label] for member in discovered.splits[split]]


def class_tars(folder: Path) -> dict[str, bytes]:
    """One tar per class, like ImageNet's: files without the class folder."""
    tars = {}
    for class_dir in sorted(folder.iterdir()):
        tar = tar_of(folder.parent / "tars" / f"{class_dir.name}.tar", contents(class_dir))
        tars[tar.name] = tar.read_bytes()
    return tars


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
    prefix = {"dotted": "./", "wrapped": "outer/", "wrapped of tars": "outer/"}.get(form, "")
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


@pytest.mark.parametrize("prefix", ["photos/", "outer/photos/"])
def test_a_folder_around_all_images_is_no_class(tmp_path, prefix):
    """In a tar, a zip and a folder: the same dataset as the folder itself, which has no labels."""
    images = {f"{i}.jpg": jpeg(i) for i in range(3)}
    wrapped = {prefix + name: data for name, data in images.items()}
    for root, files in (("plain", images), ("wrapped", wrapped)):
        for name, data in files.items():
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    tar_of(tmp_path / "some.tar", wrapped)
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for name, data in wrapped.items():
            archive.writestr(name, data)
    expected = import_all(tmp_path / "plain", tmp_path / "plain_out/x")
    assert expected.classes == expected.skipped == []
    for form in ("wrapped", "some.tar", "some.zip"):
        report = import_all(tmp_path / form, out := tmp_path / f"{form}_out/x")
        assert report.classes == [] and report.examples == expected.examples
        assert report.skipped == [
            "skipped: the folder photos as a class, because it holds all images"
        ]
        assert shards_of(out) == shards_of(tmp_path / "plain_out/x")
    table = tmp_path / "labels.txt"
    table.write_text("".join(f"photos/{i}.jpg {'ab'[i % 2]}\n" for i in range(3)))
    labelled = discovery.discover(tmp_path / "some.zip", labels=table)
    assert labels(labelled) == ["a", "b", "a"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_tarfile(tmp_path, kind):
    files = {f"{'a' * n}/b{n}.jpg": bytes(n) for n in (1, 50, 99, 100, 150)} | {"e.jpg": b""}
    files |= {} if kind == tarfile.USTAR_FORMAT else {f"{'ö/' * 150}c.jpg": bytes(512)}
    path = tar_of(tmp_path / "x.tar", files, kind)
    with byte_ranges.RangeReader(str(path)) as file, tarfile.open(path) as tar:
        expected = [(os.fsencode(m.name), m.offset_data, m.size) for m in tar.getmembers()]
        assert list(tar_index.members(file, path)) == expected
    system = tmp_path / "sub/y.tar"
    (tmp_path / "sub/folder").mkdir(parents=True)
    (tmp_path / "sub/folder/x.jpg").write_bytes(b"12")
    os.link(tmp_path / "sub/folder/x.jpg", tmp_path / "sub/folder/y.jpg")
    with tarfile.open(system, "w", format=kind) as tar:
        tar.add(tmp_path / "sub/folder", "folder")
    with byte_ranges.RangeReader(
        str(system)
    ) as file:  # a hard link has its file's bytes; folders are skipped
        assert [size for _, _, size in tar_index.members(file, system)] == [2, 2]


def test_imagenet(tmp_path):
    """Both tars in a folder with other files; one alone."""
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
    discovered = discovery.discover(src)
    assert (
        list(discovered.splits) == ["train", "validation"]
        and len(discovered.skipped.compressed) == 1
    )
    assert discovered.classes == names  # in TFDS's order
    assert [member.label for member in discovered.splits["train"]] == list(range(1000))
    validation_classes = (
        epath.Path(imagenet_common.label_names_file()).parent / "validation_labels.txt"
    )
    validation_classes = validation_classes.read_text().split()
    assert ids(discovered, "validation")[1:3] == [f"ILSVRC2012_val_{n:08d}.JPEG" for n in (2, 77)]
    assert labels(discovered, "validation") == [validation_classes[n - 1] for n in sorted(numbers)]
    alone = discovery.discover(src / "ILSVRC2012_img_val.tar")
    assert list(alone.splits) == ["validation"] and alone.classes == names
    assert labels(alone, "validation") == labels(discovered, "validation")
    assert list(discovery.discover(train).splits) == ["train"]
    report = import_all(src, tmp_path / "out")
    assert report.examples == {"train": 10, "validation": 4} and len(report.broken) == 990
    stored = list(tfds_dataset.Split(tmp_path / "out", "validation"))
    assert [names[x["label"]] for x in stored] == labels(discovered, "validation")
    assert stored[0]["image"] == val["ILSVRC2012_val_00000001.JPEG"]


def test_lists(tmp_path):
    write_folder(tmp_path / "pictures", 2)
    (tmp_path / "odd.name").write_bytes(jpeg())
    list_file = tmp_path / "list.txt"
    list_file.write_text("pictures/b/001.png\todd one\n\n./pictures/a/000.png\t7\nodd.name\t7\n")
    discovered = discovery.discover(list_file, split="mine")
    assert ids(discovered, "mine") == ["odd.name", "pictures/a/000.png", "pictures/b/001.png"]
    assert labels(discovered, "mine") == ["7", "7", "odd one"]
    assert import_all(list_file, tmp_path / "out").examples == {"train": 3}
    list_file.write_text("pictures/b/001.png\npictures/a/000.png\n")
    assert labels(discovery.discover(list_file)) == ["a", "b"]
    list_file.write_bytes(b"\xef\xbb\xbfpictures/b/001.png\tb\n")  # as on Windows
    assert ids(discovery.discover(list_file)) == ["pictures/b/001.png"]
    list_file.write_text(f"{tmp_path}/pictures/b/001.png\n")
    assert discovery.discover(list_file).classes == []
    for text, message in (
        (
            "pictures/b/001.png\tx\npictures/a/000.png\n",
            "list.txt, line 2",
        ),
        ("pictures/b/001.png\nabsent.png\n", f"line 2: {tmp_path}/absent.png: No such file"),
        ("pictures/b/001.png\npictures//b/001.png\n", "1 image twice.* 001.png, in .*b/"),
        ("\n", "no images"),
        ("\0", "list.txt is not a folder"),
    ):
        list_file.write_text(text)
        with pytest.raises(UserError, match=message):
            discovery.discover(list_file)


@pytest.mark.parametrize("name", ["für Züge", "画像", "1.b-c", "a+b"])
def test_names_of_datasets(tmp_path, name):
    """TFDS only accepts ASCII."""
    write_folder(tmp_path / "src", 1)
    assert import_all(tmp_path / "src", tmp_path / name).examples == {"train": 2}
    assert len(tfds_dataset.Split(tmp_path / name, "train")) == 2


@pytest.mark.parametrize("name", ["all", "a+b", "a[:5]", "a/b", "a b", "train.x", "-x", ".."])
def test_invalid_split_names(tmp_path, name):
    with pytest.raises(UserError, match=f"--split={re.escape(name)}:"):
        import_all(tmp_path, tmp_path / "out", split=name)


def test_images_next_to_class_folders(tmp_path):
    """The folders are not classes then, which is noted."""
    write_folder(tmp_path / "src", 2)
    (tmp_path / "src/stray.jpg").write_bytes(jpeg())
    discovered = discovery.discover(tmp_path / "src")
    assert not discovered.classes and discovered.skipped.lines() == [
        "skipped: the folders in train as classes, because 1 of its 5 images are in none, the "
        "first is stray.jpg"
    ]


def test_label_files(tmp_path):
    src = tar_of(tmp_path / "x.tar", {f"pictures/{i} b.jpg": jpeg() for i in (1, 2, 3)})
    table = tmp_path / "labels.txt"
    for text in (
        "\ufeff1 b.jpg\t10\n2 b.jpg\t9\n3 b.jpg\t10\n",
        "1 b.jpg 10\n2 b.jpg 9\n3 b.jpg 10\n",
    ):
        table.write_text(text + "another.jpg 10\n", encoding="utf-8")
        discovered = discovery.discover(src, labels=table)
        assert discovered.classes == ["9", "10"] and labels(discovered) == ["10", "9", "10"]
    for text, message in (
        ("1 b.jpg 1\n", "--labels.* 2 of 3 images.* pictures/2 b.jpg"),
        ("1.jpg\n", "line 1: not a file name"),
        ("1.jpg 1\n1.jpg 2\n", "line 2: .* 1.jpg"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            discovery.discover(src, labels=table)


def test_truncated_and_damaged_tars(tmp_path):
    """Truncated or damaged anywhere."""
    inner = tar_of(tmp_path / "n01.tar", {"n01_1.JPEG": jpeg(), "n01_2.JPEG": jpeg()}).read_bytes()
    tar = tar_of(tmp_path / "x.tar", {"n01.tar": inner, "n02.tar": inner})
    content = tar.read_bytes()
    last = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for cut in (100, 512, 1000, 1024, len(inner), len(inner) + 512, len(inner) + 1024, last):
        tar.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"x.tar is truncated: .* byte \d+, (within|after)"):
            discovery.discover(tar)
    tar_of(tmp_path / "y.tar", {"n01.tar": inner[:1024]})
    with pytest.raises(UserError, match="n01.tar in .*y.tar is truncated: .* byte 1024, within"):
        discovery.discover(tmp_path / "y.tar")
    for at, message in ((10, "x.tar"), (522, "n01.tar in .*x.tar")):
        tar.write_bytes(content[:at] + b"x" + content[at + 1 :])
        with pytest.raises(UserError, match=f"{message} .*damaged at byte 0"):
            discovery.discover(tar)


def test_rejected_sources(tmp_path):
    for name, data, message in (
        ("a.tar", b"", "a.tar is empty"),
        ("b.tar", bytes(10240), "b.tar contains no images"),
        ("c.tar.gz", b"\x1f\x8b123", "c.tar.gz is compressed.*gunzip"),
        ("d.tar", b"\x1f\x8b123", "d.tar is compressed.*gunzip"),
        ("e.zip", b"PK\x03\x04", "e.zip is not a zip or is truncated"),
        ("e.bin", b"PK\x03\x04", "e.bin is compressed.*unzip"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            discovery.discover(tmp_path / name)
    notes = tar_of(tmp_path / "f.tar", {"notes.txt": b"x", "a/._x.jpg": b"macOS"})
    with pytest.raises(UserError, match="f.tar contains no images"):
        discovery.discover(notes)
    with pytest.raises(UserError, match="x.tgz in .*g.tar is compressed.*gunzip"):
        discovery.discover(tar_of(tmp_path / "g.tar", {"x.tgz": b"x"}))
    with pytest.raises(UserError, match="absent"):
        discovery.discover(tmp_path / "absent")
    (tmp_path / "empty/sub").mkdir(parents=True)
    with pytest.raises(UserError, match="empty contains no images"):
        discovery.discover(tmp_path / "empty")


def test_duplicates_and_ambiguous_folders(tmp_path):
    write_folder(tmp_path / "src", 2, classes=("bus", "train"))
    with pytest.raises(UserError, match="train .*bus: .*--split=train"):
        discovery.discover(tmp_path / "src")
    discovered = discovery.discover(tmp_path / "src", split="train")
    assert labels(discovered) == ["bus", "bus", "train", "train"]
    tar_of(tmp_path / "src/bus.tar", {"000.png": jpeg()})
    with pytest.raises(UserError, match="1 image .* bus/000.png, in .*bus"):
        discovery.discover(tmp_path / "src", split="train")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/cat").symlink_to(tmp_path / "src/bus")
    (tmp_path / "links/dog").symlink_to(tmp_path / "src/train")
    (tmp_path / "src/bus/round").symlink_to(tmp_path / "src/bus")
    assert labels(discovery.discover(tmp_path / "links")) == ["cat", "cat", "dog", "dog"]
