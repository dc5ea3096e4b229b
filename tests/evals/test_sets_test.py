"""ImageNet's test sets in their distributed layouts, against counts by hand."""

import io
import json
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dgpt_jax.data.ingest import discovery
from dgpt_jax.data.ingest import labels as class_labels
from dgpt_jax.errors import UserError
from dgpt_jax.evals import imagenet, labelled, test_sets
from tests.support.imagenet_sets import WNIDS, counts, measured, picture, stored, write


def test_v2_sorts_folder_numbers_by_value(tmp_path):
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    predictions = {0: 0, 2: 2, 10: 2, 100: 100, 999: 10}
    for label, predicted in predictions.items():
        write(folder / str(label) / "a.jpeg", picture(predicted, 0))
    row = measured(tmp_path)["imagenet_v2"]
    assert counts(row) == (3, 5) and row["accuracy"] == 60
    assert row["incomplete"] == "5 of 10000"


def test_tfds_layouts(tmp_path):
    """Labels are mapped to the 1000 classes, and the newest version is used."""
    label = {"label": tfds.features.ClassLabel(names=WNIDS)}
    right, wrong = picture(imagenet.IMAGENET_A[5], 0), picture(imagenet.IMAGENET_A[6], 0)
    for version, images in (("0.9.0", [wrong]), ("0.10.0", [right] * 3 + [wrong] * 2)):
        examples = [
            {"image": image, "file_name": f"{i}.jpg", "label": imagenet.IMAGENET_A[5]}
            for i, image in enumerate(images)
        ]
        stored(tmp_path / "imagenet_a" / version, "test", label, examples)
    real = {"real_label": tfds.features.Sequence(tfds.features.ClassLabel(names=WNIDS))}
    examples = [
        {"image": picture(970, 0), "file_name": str(labels), "real_label": labels}
        for labels in ([], [970, 795], [1], [970])
    ]
    stored(tmp_path / "imagenet2012_real/1.0.0", "validation", real, examples)
    corrupted = tmp_path / "imagenet2012_corrupted/fog_3/3.1.0"
    example = {"image": picture(7, 0), "file_name": "a", "label": 7}
    stored(corrupted, "validation", label, [example])
    rows = measured(tmp_path)
    assert counts(rows["imagenet_a"]) == (3, 5)
    assert counts(rows["imagenet_real"]) == (2, 3)
    assert counts(rows["imagenet_c/fog/3"]) == (1, 1)
    assert set(rows) == {"imagenet_a", "imagenet_real", "imagenet_c/fog/3"}


@pytest.mark.parametrize("names", ["tar", "class folders", "tfds"])
def test_validation_and_real_labels(tmp_path, names):
    """Both of the validation images; ReaL labels follow the number in a name, not the order."""
    truth = class_labels.imagenet("validation_labels.txt")
    label = {n: WNIDS.index(truth[n - 1]) for n in (3, 5, 17, 50000)}
    best = {3: label[3], 5: 1, 17: label[17], 50000: 0}
    files = {f"ILSVRC2012_val_{n:08d}.JPEG": picture(best[n], 0) for n in label}
    if names == "tar":
        with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as file:
            for name, data in reversed(files.items()):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    elif names == "class folders":
        for n, (name, data) in zip(label, files.items(), strict=True):
            write(tmp_path / "val" / WNIDS[label[n]] / name, data)
    else:
        feature = {"label": tfds.features.ClassLabel(names=WNIDS)}
        examples = [
            {"image": data, "file_name": name, "label": label[n]}
            for n, (name, data) in reversed([*zip(label, files.items(), strict=True)])
        ]
        stored(tmp_path / "imagenet2012/5.1.0", "validation", feature, examples)
    lines = []
    assert counts(measured(tmp_path, lines.append)["imagenet"]) == (2, 4)
    assert any(line.startswith("absent: imagenet_real; real.json") for line in lines)
    real = [[] for _ in range(50000)]
    real[2], real[4], real[49999] = [label[3]], [9, 1], [4]
    (tmp_path / "real.json").write_text(json.dumps(real))
    assert counts(measured(tmp_path)["imagenet_real"]) == (2, 3)  # 17 has no label


def test_sketch_and_hard(tmp_path):
    for label, predicted in ((4, 4), (900, 900), (30, 31)):
        write(tmp_path / "sketch" / WNIDS[label] / f"sketch_{label}.JPEG", picture(predicted, 0))
    hard = {"a.png": [3, 5], "b.png": [6], "c.png": [5]}
    for name in hard:
        write(tmp_path / "imagenet-hard" / name, picture(5, 0))
    (tmp_path / "imagenet-hard/labels.json").write_text(json.dumps(hard))
    rows = measured(tmp_path)
    assert counts(rows["imagenet_sketch"]) == (2, 3)
    assert counts(rows["imagenet_hard"]) == (2, 3)
    (tmp_path / "imagenet-hard/labels.json").write_text(json.dumps({"a.png": [3]}))
    with pytest.raises(UserError, match="labels.json .* 2 images.* b.png"):
        measured(tmp_path)


def test_objectnet(tmp_path):
    """Crops the red border and ignores folders without an ImageNet class."""
    root = tmp_path / "objectnet-1.0"
    mappings = {
        "folder_to_objectnet_label.json": {
            "chair": "Chair", "mug": "Mug", "sock": "Sock", "x": "X",
        },
        "objectnet_to_imagenet_1k.json": {
            "Chair": "folding chair; rocking chair", "Mug": "coffee mug", "Sock": "sock",
        },
        # Our number → the line, from 0.
        "pytorch_to_imagenet_2012_id.json": {"20": 0, "21": 1, "22": 2, "23": 3},
    }  # fmt: skip
    for name, content in mappings.items():
        write(root / "mappings" / name, json.dumps(content).encode())
    lines = "sock\nfolding chair\ncoffee mug\nrocking chair\n"
    write(root / "mappings/imagenet_to_label_2012_v2", lines.encode())
    cases = [  # folder, best, second; correct among all, correct among mapped classes
        ("chair", 21, 0, True, True),
        ("chair", 23, 0, True, True),
        ("chair", 500, 23, False, True),
        ("mug", 21, 22, False, False),
        ("sock", 20, 0, True, True),
        ("x", 20, 0, None, None),
    ]
    for i, (folder, best, second, *_) in enumerate(cases):
        image = np.array(Image.open(io.BytesIO(picture(best, second, (18, 18)))))
        framed = np.full((22, 22, 3), (255, 0, 0), np.uint8)
        framed[2:-2, 2:-2] = image
        path = root / "images" / folder / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(framed).save(path)
    rows = measured(tmp_path)
    assert counts(rows["objectnet"]) == (3, 5)
    assert counts(rows["objectnet_113"]) == (4, 5)
    source = test_sets.find(tmp_path, next(s for s in test_sets.SETS if s.name == "objectnet"))
    image, _ = source.read(0)
    assert image.shape == (18, 18, 3) and len(np.unique(image.reshape(-1, 3), axis=0)) == 1


def _tar(path):
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("inside.png"), io.BytesIO())


LAYOUTS = {  # files below a directory → True if their names suffice
    "plain": (["b/2.png", "b/10.png", "a/x.JPEG", "a/._x.JPEG", "a/notes.txt", "READ.me"], True),
    "numbers": (["10/a.png", "9/a.png", "10/b.png"], True),
    "odd names": (["a b/ü.png", "a b/z.png", "a-b/.png", "é/1.png", "z/1.PNG"], True),
    "one class": (["a/1.png", "a/2.png"], True),
    "an empty folder": (["a/1.png", "b/notes.txt"], True),
    "a tar": (["a/1.png", "a/2.tar"], False),
    "tars of classes": (["a.tar", "b.tar"], False),
    "deeper": (["a/1.png", "b/c/2.png"], False),
    "splits": (["train/1.png", "val/2.png"], False),
    "ImageNet's name": (["ILSVRC2012_img_val/1.png"], False),
    "beside": (["a/1.png", "2.png"], False),
    "nothing": (["a/notes.txt"], False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_folders_are_listed_by_name(tmp_path, layout):
    """If names suffice, the files are those that discovery.discover lists, in its order."""
    names, enough = LAYOUTS[layout]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _tar(path) if path.suffix == ".tar" else path.write_bytes(name.encode())
    if enough:
        folder = tmp_path / names[0].partition("/")[0]
        (tmp_path / "linked").symlink_to(folder, target_is_directory=True)
        (folder / "to nothing.png").symlink_to("nowhere")
    listing = labelled.class_folders(tmp_path)
    assert (listing is not None) == enough
    if enough:
        files, classes, of = listing
        images = discovery.discover(tmp_path, split="train")
        members = images.splits["train"]
        assert files.ids == [members[i].id for i in range(len(members))]
        assert [classes[i] for i in of] == [images.classes[i] for i in members.label]
        at = files.ids.index(names[0])
        assert files[at].read() == members[at].read() == names[0].encode()
        lost = files.take(np.array([files.ids.index(f"{folder.name}/to nothing.png")]))
        with pytest.raises(UserError, match="to nothing.png: "):
            lost[0].read()


def test_imagenet_c_is_listed_by_name(tmp_path, monkeypatch):
    """3.75 million files: none is stat'ed, and no set is listed twice."""
    for corruption in imagenet.ALEXNET:
        for severity in imagenet.SEVERITIES:
            write(tmp_path / f"imagenet-c/{corruption}/{severity}/{WNIDS[7]}/a.png", picture(7, 0))
    listed, list_folders = [], labelled.class_folders
    monkeypatch.setattr(
        labelled, "class_folders", lambda path: listed.append(path) or list_folders(path)
    )
    monkeypatch.setattr(discovery, "discover", None)
    assert measured(tmp_path)["imagenet_c"]["accuracy"] == 100
    assert len(listed) == len({*listed}) == 75


def test_labels_are_padded():
    np.testing.assert_array_equal(labelled.padded([[1], [], [2, 3]]), [[1, -1], [-1, -1], [2, 3]])
    assert labelled.padded([], 3).shape == (0, 3)
