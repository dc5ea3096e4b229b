"""ImageNet's test sets in the layouts in which they are distributed, against counts by hand."""

import dataclasses
import io
import json
import sys
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dgpt_jax import class_labels, cli, evaluate, load, records, schema, shards
from dgpt_jax.config import Evaluate
from dgpt_jax.convert import layout, timm
from dgpt_jax.convert.weights import Weights, encoder_shapes
from dgpt_jax.evals import imagenet, labelled, robustness, test_sets
from dgpt_jax.schema import UserError
from tests.data import tiny_model

WNIDS = class_labels.imagenet("labels.txt")


def picture(first: int, second: int, size=(20, 24)) -> bytes:
    """A PNG of one colour, which tells the fake classifier its best and its second class."""
    colour = (first // 32 * 8, first % 32 * 8, second % 32 * 8)
    image = np.full((*size, 3), colour, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Fake:
    """The best class is in the colours of the middle; then comes the class of the third colour, a
    number below 32, then the lower numbers first."""

    model = tiny_model()
    params: object = ()
    source = "fake"
    num_classes = 1000

    def logits(self, pictures):
        colour = (pictures[:, 8, 8] // 8).astype(jnp.int32)
        best, second = colour[:, 0] * 32 + colour[:, 1], colour[:, 2]
        scores = -jnp.arange(1000.0)[None].repeat(len(pictures), 0) / 1000
        rows = jnp.arange(len(pictures))
        return scores.at[rows, second].set(1.0).at[rows, best].set(2.0)


def write(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def measured(root, say=lambda line: None) -> dict[str, dict]:
    settings = schema.parse(
        Evaluate,
        dict(data=str(root), protocol="robustness", resize=18, batch_size=4),
    )
    rows = robustness.evaluate(settings, Fake(), {}, say)
    return {row["data"]: row for row in rows}


def counts(row) -> tuple[int, int]:
    return row["correct"], row["test"]


def stored(directory, split: str, fields: dict, examples: list[dict]):
    """A TFDS directory as `tfds build` makes it."""
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "file_name": tfds.features.Text()}
        | fields
    )
    serialize = records.serializer(features)
    directory.mkdir(parents=True)
    path = records.shard_path(directory, split, 0, 1)
    receipt = shards.write(path, (serialize(example) for example in examples), [])
    records.write_metadata(directory, features, {split: [receipt]})


def test_facts():
    assert len(set(imagenet.IMAGENET_A)) == len(set(imagenet.IMAGENET_R)) == 200
    assert sum(imagenet.IMAGENET_A) == 102178 and sum(imagenet.IMAGENET_R) == 86135
    assert np.mean(list(imagenet.ALEXNET.values())) == pytest.approx(0.788993, abs=5e-7)
    assert len(imagenet.ALEXNET) == 15
    assert len(set(WNIDS)) == 1000 and sorted(WNIDS) == WNIDS
    assert imagenet.class_indices([WNIDS[7], WNIDS[999]], "x") == [7, 999]
    assert imagenet.class_indices(["10", "9", "999"], "x") == [10, 9, 999]
    with pytest.raises(UserError, match="x: 1 class names .* first is 'cat'"):
        imagenet.class_indices(["cat", WNIDS[0]], "x")


def test_v2_sorts_its_numbers_by_value(tmp_path):
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    predictions = {0: 0, 2: 2, 10: 2, 100: 100, 999: 10}
    for label, predicted in predictions.items():
        write(folder / str(label) / "a.jpeg", picture(predicted, 0))
    row = measured(tmp_path)["imagenet_v2"]
    assert counts(row) == (3, 5) and row["accuracy"] == 60
    assert row["incomplete"] == "5 of 10000"


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
@pytest.mark.parametrize("tar", [False, True])
def test_a_and_r_answer_among_their_200(tmp_path, name, tar):
    classes = imagenet.IMAGENET_A if name == "imagenet-a" else imagenet.IMAGENET_R
    outside = next(i for i in range(40, 1000) if i not in classes)
    cases = [  # label, best, second, right
        (classes[0], classes[0], 0, True),
        (classes[1], outside, classes[1], True),  # the best is none of the 200: the second counts
        (classes[150], classes[151], 0, False),
        (classes[3], outside, 0, False),  # 0 is none of them either: the first of the 200 it is
        (classes[0], outside, 0, True),
    ]
    for i, (label, best, second, _) in enumerate(cases):
        write(tmp_path / name / WNIDS[label] / f"{i}.jpg", picture(best, second))
    write(tmp_path / name / "README.txt", b"about")
    if tar:
        with tarfile.open(tmp_path / f"{name}.tar", "w") as file:
            file.add(tmp_path / name, name)
        (tmp_path / name).rename(tmp_path / "elsewhere")
    row = measured(tmp_path)[name.replace("-", "_")]
    assert counts(row) == (sum(case[3] for case in cases), len(cases))


def test_sets_as_tfds_has_them(tmp_path):
    """Labels count all 1000 classes, the newest version is taken."""
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
    found = measured(tmp_path)
    assert counts(found["imagenet_a"]) == (3, 5)
    assert counts(found["imagenet_real"]) == (2, 3)
    assert counts(found["imagenet_c/fog/3"]) == (1, 1)
    assert set(found) == {"imagenet_a", "imagenet_real", "imagenet_c/fog/3"}


@pytest.mark.parametrize("names", ["tar", "class folders", "tfds"])
def test_validation_and_real_labels(tmp_path, names):
    """Of ImageNet's own validation images; ReaL goes by the number in a name, not by the order."""
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
    found = measured(tmp_path)
    assert counts(found["imagenet_sketch"]) == (2, 3)
    assert counts(found["imagenet_hard"]) == (2, 3)
    (tmp_path / "imagenet-hard/labels.json").write_text(json.dumps({"a.png": [3]}))
    with pytest.raises(UserError, match="labels.json has no labels of 2 images: b.png"):
        measured(tmp_path)


def test_objectnet(tmp_path):
    """A red border is cut off, folders without a class of ImageNet do not count."""
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
    cases = [  # folder, best, second; right among all, right among those that are mapped
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
    found = measured(tmp_path)
    assert counts(found["objectnet"]) == (3, 5)
    assert counts(found["objectnet_113"]) == (4, 5)
    source = test_sets.find(tmp_path, next(s for s in test_sets.SETS if s.name == "objectnet"))
    image, _ = source.read(0)
    assert image.shape == (18, 18, 3) and len(np.unique(image.reshape(-1, 3), axis=0)) == 1


def test_corrupted(tmp_path):
    """Seventy-five folders, in those of their tars; each with a share of right answers."""
    tars = {"noise": "noise", "blur": "blur", "snow": "weather", "frost": "weather"}
    right, n = {}, 3
    for c, corruption in enumerate(imagenet.ALEXNET):
        inner = tars.get(corruption.rpartition("_")[2], "digital" if c % 2 else "")
        for severity in range(1, 6):
            hits = right[corruption, severity] = (c + severity) % (n + 1)
            for i in range(n):
                folder = tmp_path / "imagenet-c" / inner / corruption / str(severity)
                name = f"ILSVRC2012_val_{i:08d}.JPEG"
                write(folder / WNIDS[8 + i] / name, picture(8 + i if i < hits else 30, 0))
    row = measured(tmp_path)["imagenet_c"]
    error = {c: np.mean([1 - right[c, s] / n for s in range(1, 6)]) for c in imagenet.ALEXNET}
    assert row["mean error"] == pytest.approx(100 * np.mean(list(error.values())))
    ratios = [error[c] / alexnet for c, alexnet in imagenet.ALEXNET.items()]
    assert row["mCE"] == pytest.approx(100 * np.mean(ratios))
    assert "low" not in row  # the same images in all of them
    alexnet = {f"{c}/{s}": 1 - e for c, e in imagenet.ALEXNET.items() for s in range(1, 6)}
    assert robustness.corruption_errors(alexnet) == pytest.approx((78.8993, 100.0), abs=1e-4)
    # One is missing: no mean.
    folder = next((tmp_path / "imagenet-c").glob("**/fog/4"))
    folder.rename(tmp_path / "fog4")
    lines = []
    found = measured(tmp_path, lines.append)
    assert "imagenet_c" not in found and len(found) == 74
    assert any(
        "imagenet_c (74 of 75 are there, so there is no mean), first fog/4" in x for x in lines
    )


def test_corrupted_pictures_are_cropped_and_not_resized():
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    np.testing.assert_array_equal(robustness.central(image, 224), image)
    large = np.pad(image, ((3, 3), (10, 10), (0, 0)))
    np.testing.assert_array_equal(robustness.central(large, 224), image)
    assert robustness.central(image, 64).shape == (64, 64, 3)


def test_all_that_is_absent_is_named(tmp_path):
    lines = []
    with pytest.raises(UserError, match="holds none of the test sets"):
        measured(tmp_path, lines.append)
    assert [line.split(";")[0] for line in lines] == [
        f"absent: {known.name}" for known in test_sets.SETS
    ] + ["absent: imagenet_c, first gaussian_noise/1"]
    assert all(len(line.split("; ", 1)[1]) > 30 for line in lines)


def test_counting():
    predicted = np.array([3, 4, 5, 6])
    labels = np.array([[3, -1], [1, 4], [-1, -1], [7, 8]])
    assert robustness.correct(predicted, labels) == (2, 3)
    assert robustness.correct(np.array([-1, 0]), np.array([[-1], [0]])) == (1, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """timm's layout with a head of 1000 classes, random."""
    path = tmp_path_factory.mktemp("timm")
    model = tiny_model(segments=(1, 1))
    rng = np.random.default_rng(0)
    flat = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in encoder_shapes(model, "mean", 1000).items()
    }
    timm.save(Weights(model, flat, "mean", "random"), path)
    return path


def test_one_command_on_real_weights(weights, tmp_path, monkeypatch, capsys):
    classifier = load.load_classifier(weights)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    best = np.asarray(classifier.logits(images)).argmax(axis=1)
    for i, image in enumerate(images):
        label = best[i] if i < 4 else (best[i] + 1) % 1000
        path = tmp_path / "sets/sketch" / WNIDS[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    words = [
        "--config=configs/robustness_in1k.py", f"--config.data={tmp_path / 'sets'}",
        f"--checkpoint={weights}", "--config.resize=16", f"--out={tmp_path / 'out.json'}",
        "--config.batch_size=4",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    cli.run(evaluate.main)
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (row["data"], row["correct"], row["test"]) == ("imagenet_sketch", 4, 7)
    assert row["how"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    shown = capsys.readouterr().out
    assert "absent: imagenet_a; imagenet-a.tar (sha256 3bb36322" in shown
    assert shown.strip().splitlines()[-1].startswith("next: ")


def test_weights_without_a_head_are_refused(weights, tmp_path):
    state = load.load_classifier(weights)
    flat = layout.flatten({k: v for k, v in state.params.items() if k != "head"})
    timm.save(Weights(state.model, flat, "mean", "random"), tmp_path)
    with pytest.raises(UserError, match="no classification head.*knn_in1k"):
        load.load_classifier(tmp_path)


def test_labels_are_padded():
    np.testing.assert_array_equal(labelled.padded([[1], [], [2, 3]]), [[1, -1], [-1, -1], [2, 3]])
    assert labelled.padded([], 3).shape == (0, 3)
