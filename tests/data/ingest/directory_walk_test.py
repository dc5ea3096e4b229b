"""Listing of sources: rejected layouts, skipped files and their report."""

import io
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.data.ingest import discovery, importer
from dgpt_jax.errors import UserError
from dgpt_jax.evals import labelled
from dgpt_jax.storage import tfds_dataset
from tests.support import processes
from tests.support.data import smooth_image


def write(root: Path, names) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if path.suffix == ".heic" else png(i))
    return root


def png(seed=0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth_image(np.random.default_rng(seed), 8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, members) -> Path:
    """A tar of {name: bytes, or "=target" for a hard link, ">target" for a symbolic one}."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type = tarfile.LNKTYPE if data[0] == "=" else tarfile.SYMTYPE
                info.linkname = data[1:]
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def as_tar(folder: Path) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    members = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return pack(folder.with_suffix(".tar"), members)


HIDDEN = (
    ".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", ".Trash-1000", "#recycle", "$RECYCLE.BIN",
    "System Volume Information", "lost+found", "__pycache__", ".thumbnails",
)  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "tar", "class folders"])
@pytest.mark.parametrize("pattern", ["{}/x.png", "cat/{}/x.png", "cat/{}/deeper/x.png"])
def test_hidden_folders_are_not_classes(tmp_path, form, pattern):
    names = ["cat/1.png", "dog/2.png", "dog/.png"]
    src = write(tmp_path / "src", names + [pattern.format(name) for name in HIDDEN])
    if form == "class folders":
        files, classes, _ = labelled.class_folders(src)
        assert files.ids == ["cat/1.png", "dog/.png", "dog/2.png"] and classes == ["cat", "dog"]
        return
    discovered = discovery.discover(as_tar(src) if form == "tar" else src)
    assert discovered.classes == ["cat", "dog"] and len(discovered.splits["train"]) == 3
    (line,) = discovered.skipped.lines()
    assert line == "skipped hidden or system folders: " + ", ".join(
        f"1 {name}" for name in sorted(HIDDEN)
    )


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_other_files_are_counted(tmp_path, form):
    others = (
        "1.heic",
        "2.HEIC",
        "3.jxl",
        "4.pgm",
        "LICENSE",
        "a.0001",
        "a.0002",
        "._x.png",
        "b.md",
    )
    src = write(tmp_path / "src", ["cat/1.png", "dog/1.png", *(f"dog/{name}" for name in others)])
    discovered = discovery.discover(as_tar(src) if form == "tar" else src)
    assert discovered.skipped.lines() == [
        "skipped files: 3 without a known extension, 2 .heic, 1 ._* of macOS, 1 .jxl, 1 .md, 1 .pgm"
    ]
    none = write(tmp_path / "none", ["1.heic", "2.heic"])
    with pytest.raises(UserError, match="none contains no images.*2 .heic"):
        discovery.discover(none)


def test_pipes_sockets_devices_and_broken_links(tmp_path):
    """Opening a pipe would wait for a writer forever."""
    src = write(tmp_path / "src", ["cat/1.png", "dog/1.png"])
    write(tmp_path, ["elsewhere.png"])
    for name in ("cat/pipe.jpg", "cat/pipe.tar", "cat/pipe"):
        os.mkfifo(src / name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(src / "s.png"))
    for name, target in (
        ("cat/up", ".."), ("cat/outer", tmp_path), ("me", "me"), ("lost", "nowhere"),
        ("cat/lost.png", "nowhere"), ("cat/round.png", "round.png"), ("cat/null.png", "/dev/null"),
    ):  # fmt: skip
        (src / name).symlink_to(target)
    discovered = discovery.discover(src)
    assert discovered.classes == ["cat", "dog"]
    assert discovered.skipped.lines() == [
        f"skipped: {src}/{line}"
        for line in (
            "cat/null.png, a pipe, socket or device",
            "cat/outer, a link to a folder that contains it",
            "cat/pipe, a pipe, socket or device",
            "cat/pipe.jpg, a pipe, socket or device",
            "cat/pipe.tar, a pipe, socket or device",
            "cat/up, a link to a folder that contains it",
            "lost, a broken link",
            "me, a broken link",
            "s.png, a pipe, socket or device",
        )
    ]
    report = importer.import_images(src, tmp_path / "out", say=lambda _: None)
    assert [line.partition(":")[0] for line in report.broken] == ["cat/lost.png", "cat/round.png"]
    assert report.skipped == discovered.skipped.lines()
    for i in range(20):
        (src / f"lost{i}").symlink_to("nowhere")
    lines = discovery.discover(src).skipped.lines()
    assert len(lines) == 13 and lines[-1] == ("skipped: 17 more links, pipes, sockets or devices")


def test_pipes_and_missing_files(tmp_path):
    from dgpt_jax.commands import image_selection

    os.mkfifo(write(tmp_path / "set", ["a/1.png", "b/1.png"]) / "a/2.png")
    assert labelled.class_folders(tmp_path / "set")[0].ids == ["a/1.png", "b/1.png"]
    with pytest.raises(UserError, match=r"--labels=absent: No such file"):
        discovery.discover(tmp_path / "set", labels="absent")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match="pipe.tar"):
        discovery.discover(tmp_path / "pipe.tar")
    (tmp_path / "list.txt").write_text("pipe.tar\n")
    with pytest.raises(UserError, match="list.txt, line 1: .*pipe.tar"):
        discovery.discover(tmp_path / "list.txt")
    with pytest.raises(UserError, match="pipe.tar"):
        image_selection.list_images([str(tmp_path / "pipe.tar")])


@pytest.mark.parametrize("name", ["dog", "dog.tar"])
def test_unreadable_folders_and_tars_are_named(tmp_path, monkeypatch, name):
    """Emulated, because root may read everything."""
    src = write(tmp_path / "src", ["cat/1.png"])
    write(src, ["dog/1.png"]) if name == "dog" else pack(src / name, {"1.png": png()})

    def refusing(function):
        def refuse(path, *args, **kwargs):
            if os.fsdecode(path) == os.fspath(src / name):
                raise PermissionError(13, "Permission denied", path)
            return function(path, *args, **kwargs)

        return refuse

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr("builtins.open", refusing(open))
    for path in (src, src / name):
        with pytest.raises(UserError, match=f"{src / name}: Permission denied"):
            discovery.discover(path)


NO_CLASSES = {
    "COCO": ["train2017/1.png", "val2017/2.png"],
    "COCO, wrapped": ["coco/train2017/1.png", "coco/val2017/2.png"],
    "VOC": ["VOC2012/JPEGImages/1.png", "VOC2012/SegmentationClass/1.png"],
    "upper case": ["Train/cat/1.png", "Test/cat/1.png"],
    "long names": ["training/1.png", "testing/1.png"],
    "sets": ["train_set/1.png", "test-set/1.png"],
    "images": ["train_images/1.png", "test_images/1.png"],
    "STL": ["unlabeled/1.png", "other/1.png"],
    "masks": ["images/1.png", "masks/1.png"],
    "masks in splits": ["train/images/1.png", "train/masks/1.png", "val/images/1.png"],
    "labels": ["image/1.png", "label/1.png"],
    "Cityscapes": ["leftImg8bit/a/1.png", "gtFine/a/1.png"],
    "one among classes": ["cat/1.png", "dog/1.png", "test1/1.png"],
}
CLASSES = {
    "names that begin alike": ["training shoe/1.png", "testudo/1.png", "maskray/1.png"],
    "words within": ["no_mask/1.png", "crash test/1.png", "image frame/1.png"],
    "numbers": ["1/1.png", "2/1.png"],
    "known splits": ["train/cat/1.png", "val/cat/2.png", "test/3.png"],
    "one folder": ["images/1.png"],
    "one split": ["train2017/1.png"],
    "classes in one folder": ["images/cat/1.png", "images/dog/1.png"],
}


@pytest.mark.parametrize("layout", NO_CLASSES)
def test_rejected_layouts(tmp_path, layout):
    src = write(tmp_path / "src", NO_CLASSES[layout])
    with pytest.raises(UserError, match=f"{src}.*--split=train"):
        discovery.discover(src)
    assert discovery.discover(src, split="train").classes


@pytest.mark.parametrize("layout", CLASSES)
def test_accepted_layouts(tmp_path, layout):
    discovery.discover(write(tmp_path / "src", CLASSES[layout]))


SHARDS = {  # members of a tar: True if they are samples of a WebDataset
    "cls": (["0.png", "0.cls", "1.png", "1.cls"], True),
    "json": (["0.png", "0.json"], True),
    "text first": (["0.txt", "0.png"], True),
    "three": (["a/0.png", "a/0.txt", "a/0.json"], True),
    "several extensions": (["0.seg.png", "0.cls", "0.png"], True),
    "upper case": (["0.PNG", "0.CLS"], True),
    "notes": (["README.txt", "cat/0.png", "dog/0.png", "dog/list.json"], False),
    "another key": (["0.png", "1.cls", "2.png"], False),
    "another folder": (["a/0.cls", "b/0.png"], False),
    "of macOS": (["0.png", "._0.cls"], False),
}


@pytest.mark.parametrize("path", ["shard.tar", "folder/00000.tar", "outer.tar"])
@pytest.mark.parametrize("shard", SHARDS)
def test_shards_of_a_webdataset(tmp_path, shard, path):
    names, is_shard = SHARDS[shard]
    members = {name: png() if name.lower().endswith("png") else b"7" for name in names}
    (tmp_path / "folder").mkdir()
    tar = pack(tmp_path / path, members)
    if path == "outer.tar":
        tar = pack(tar, {"00000.tar": tar.read_bytes()})
    src = tar.parent if path.startswith("folder") else tar
    message = "several images" if shard == "several extensions" and path != "outer.tar" else ""
    if shard == "three":
        message = "ambiguous: .* no .cls, but folders .a."
    if is_shard and path == "outer.tar":
        message = "ambiguous: .*WebDataset.*--labels"
    if message:
        with pytest.raises(UserError, match=message):
            discovery.discover(src)
    else:
        discovered = discovery.discover(src)
        ids = [entry.id for entry in discovered.splits["train"]]
        assert all(name.endswith("png") for name in ids) != is_shard
        assert discovered.classes[7:] == (
            ["7"] if is_shard and {"0.cls", "0.CLS"} & set(names) else []
        )


def test_hard_links_in_tars(tmp_path):
    """Including links to links, to long names, to later members and broken ones."""
    long = "cat/" + "x" * 150 + ".png"
    members = {
        "cat/1.png": png(1), "dog/1.png": "=cat/1.png", "dog/2.png": "=./dog/1.png", long: png(2),
        "dog/3.png": f"={long}", "dog/4.png": "=cat/5.png", "cat/5.png": png(5),
        "dog/lost.png": "=nowhere", "dog/round.png": "=dog/round.png",
    }  # fmt: skip
    tar = pack(tmp_path / "x.tar", members)
    nested = pack(tmp_path / "y.tar", {"a.tar": tar.read_bytes(), "b.tar": tar.read_bytes()})
    for path, top in ((tar, ""), (nested, "b/")):
        report = importer.import_images(path, tmp_path / f"{path.stem}.out", say=lambda _: None)
        split = tfds_dataset.Split(tmp_path / f"{path.stem}.out", "train")
        stored = {x["id"]: x["image"] for x in split}
        for name, seed in (("1", 1), ("2", 1), ("3", 2), ("4", 5)):
            assert stored[f"{top}dog/{name}.png"] == png(seed)
        broken = {line.partition(":")[0] for line in report.broken}
        assert {f"{top}dog/lost.png", f"{top}dog/round.png"} <= broken


SYMBOLIC = {  # a link next to cat/1.png and cat/2.png: images that it adds, or the note
    "beside": ("cat/x.png", "1.png", {"cat/x.png": 1}),
    "upwards": ("dog/x.png", "../cat/1.png", {"dog/x.png": 1}),
    "round about": ("dog/x.png", "./../dog/../cat//2.png", {"dog/x.png": 2}),
    "to a link": ("dog/x.png", "../cat/hard.png", {"dog/x.png": 2}),
    "of no image's name": ("dog/x", "../cat/1.png", {}),
    "to a folder": ("dog/all", "../cat", {f"dog/all/{n}.png": s for n, s in
                                          (("1", 1), ("2", 2), ("hard", 2))}),
    "nothing": ("dog/x.png", "../cat/3.png", "a broken link"),
    "itself": ("dog/x.png", "x.png", "a broken link"),
    "out": ("dog/x.png", "../../cat/1.png", "a link out of it"),
    "absolute": ("dog/x.png", "/cat/1.png", "a link out of it"),
    "its folder": ("cat/up", ".", "a link to a folder that contains it"),
    "the whole": ("cat/up", "..", "a link to a folder that contains it"),
}  # fmt: skip


def test_links_in_linked_folders_of_a_tar(tmp_path):
    """The same images as in the unpacked folder."""
    members = {
        "src/train/cat/1.png": png(1), "src/train/cat/2.png": ">1.png", "src/train/dog": ">cat",
        "src/train/owl/3.png": png(3), "src/val": ">train", "src/train/owl/more": ">../emu",
        "src/train/emu/more": ">../owl", "src/train/emu/round": ">..",
        "src/train/elk/all": ">../emu", "src/train/fox/2.png": ">../dog/2.png",
        "src/train/gnu": ">../val/cat", "src/train/yak/3.png": ">../elk/all/more/3.png",
    }  # fmt: skip
    tar = pack(tmp_path / "x.tar", members)
    with tarfile.open(tar) as archive:
        archive.extractall(tmp_path / "x", filter="data")
    importer.import_images(tmp_path / "x", tmp_path / "unpacked", say=lambda _: None)
    importer.import_images(tar, tmp_path / "packed", say=lambda _: None)
    for split in ("train", "val"):
        unpacked, packed = (
            {x["id"]: x["image"] for x in tfds_dataset.Split(tmp_path / form, split)}
            for form in ("unpacked", "packed")
        )
        through_links = {"fox/2.png", "gnu/1.png", "yak/3.png"}
        assert unpacked == packed
        assert through_links | {"dog/2.png", "elk/all/more/3.png"} <= packed.keys()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", SYMBOLIC)
def test_symbolic_links_in_tars(tmp_path, case, nested):
    """Links within the archive are followed, others are noted."""
    name, target, expected = SYMBOLIC[case]
    members = {
        name: f">{target}", "cat/1.png": png(1), "cat/2.png": png(2), "cat/hard.png": "=cat/2.png",
        "owl/3.png": png(3),
    }  # fmt: skip
    tar = pack(tmp_path / "x.tar", members)
    if nested:
        tar = pack(tmp_path / "y.tar", {"a/x.tar": tar.read_bytes(), "a/z.png": png(9)})
    report = importer.import_images(tar, tmp_path / "out", say=lambda _: None)
    split = tfds_dataset.Split(tmp_path / "out", "train")
    stored = {x["id"]: x["image"] for x in split}
    added = expected if isinstance(expected, dict) else {}
    expected_bytes = {"cat/1.png": 1, "cat/2.png": 2, "cat/hard.png": 2, "owl/3.png": 3} | added
    top = "a/x/" if nested else ""
    expected_bytes = {f"{top}{name}": png(seed) for name, seed in expected_bytes.items()}
    assert stored == expected_bytes | ({"a/z.png": png(9)} if nested else {}) and not report.broken
    title = f"a/x.tar in {tar}" if nested else str(tar)
    notes = [] if isinstance(expected, dict) else [f"skipped: {name} in {title}, {expected}"]
    assert [line for line in report.skipped if "link" in line] == notes


@pytest.mark.parametrize("rest, has_note", [(bytes(4 << 20), False), (bytes(3000) + b"x", True)])
def test_bytes_after_the_end_of_a_tar(tmp_path, rest, has_note):
    tar = pack(tmp_path / "x.tar", {"1.png": png()})
    tar.write_bytes(tar.read_bytes() + rest)
    expected = [
        f"skipped: data after the end of {tar} at byte 1024: if the file is several tars, split it "
        f"there"
    ]
    lines = discovery.discover(tar).skipped.lines()
    assert lines == expected * has_note
    tar.write_bytes(tar.read_bytes() + pack(tmp_path / "y.tar", {"2.png": png()}).read_bytes())
    assert discovery.discover(tar).skipped.lines() == expected


BAD_NAMES = {"empty": "", "blank": " ", "leading": " cat", "trailing": "cat ", "tab": "cat\t",
             "break": "a\rb", "line separator": "a\u2028b", "escape": "a\x1b[2Jb"}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NAMES)
def test_class_names_that_tfds_cannot_store(tmp_path, case):
    """TFDS stores one name per line, strips it and drops empty ones."""
    src, name = write(tmp_path / "src", ["1.png", "2.png"]), BAD_NAMES[case]
    (src / "list.txt").write_text(f"1.png\t{name}\n2.png\tzebra\n", newline="")
    message = "class"
    with pytest.raises(UserError, match=message):
        discovery.discover(src / "list.txt")
    if case == "empty":
        return
    folders = tmp_path / "folders"
    for folder in (name, "zebra"):
        write(folders / folder, ["1.png"])
    with pytest.raises(UserError, match=message):
        discovery.discover(folders)


def test_class_names_are_read_back(tmp_path):
    names = ["a b", "a", "ü", "x,y"]
    src = write(tmp_path / "src", [f"{name}/1.png" for name in names])
    report = importer.import_images(src, tmp_path / "out", say=lambda _: None)
    assert tfds_dataset.Split(tmp_path / "out", "train").features["label"].names == report.classes
    assert report.classes == sorted(names)


def test_an_ascii_locale(tmp_path):
    """Names are escaped when printed, and stored unchanged."""
    src = write(tmp_path / "src", ["é/1.png", "z/1.png"])
    (src / "é/€.png").write_bytes(b"")
    process = processes.start(
        ["tools/import_images.py", src, f"--out={tmp_path / 'out'}"],
        PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0",
    )  # fmt: skip
    (output,) = processes.outputs_of([process], timeout=60)
    assert process.returncode == 0, output
    assert r"skipped \xe9/\u20ac.png: not an image" in output
    assert r"2 classes (z, \xe9)" in output
    assert tfds_dataset.Split(tmp_path / "out", "train").features["label"].names == ["z", "é"]


def test_errors_cannot_move_the_cursor(capsys):
    def fail():
        raise UserError("no such file: a\x1b[2J\u202e.png")

    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == r"error: no such file: a\x1b[2J\u202e.png"
