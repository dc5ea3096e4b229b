"""The rules of ImageNet's test sets: classes, corruptions, missing sets, random weights."""

import importlib.util
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli, evaluate
from dgpt_jax.errors import UserError
from dgpt_jax.evals import imagenet, robustness, test_sets
from dgpt_jax.weights import api, mapping
from dgpt_jax.weights.layouts import timm
from dgpt_jax.weights.types import Weights, encoder_shapes
from tests.support.data import tiny_model
from tests.support.imagenet_sets import WNIDS, counts, measured, picture, write


def test_constants():
    assert len(set(imagenet.IMAGENET_A)) == len(set(imagenet.IMAGENET_R)) == 200
    assert sum(imagenet.IMAGENET_A) == 102178 and sum(imagenet.IMAGENET_R) == 86135
    assert np.mean(list(imagenet.ALEXNET.values())) == pytest.approx(0.788993, abs=5e-7)
    assert len(imagenet.ALEXNET) == 15
    assert len(set(WNIDS)) == 1000 and sorted(WNIDS) == WNIDS
    assert imagenet.class_indices([WNIDS[7], WNIDS[999]], "x") == [7, 999]
    assert imagenet.class_indices(["10", "9", "999"], "x") == [10, 9, 999]
    with pytest.raises(UserError, match="x has 1 class name .* first 'cat'"):
        imagenet.class_indices(["cat", WNIDS[0]], "x")


def test_classes_equal_timms():
    """timm ships the lists as text files."""
    timm = importlib.util.find_spec("timm")
    if timm is None:
        pytest.skip("timm is not installed")
    for name, ours in (("a", imagenet.IMAGENET_A), ("r", imagenet.IMAGENET_R)):
        file = Path(timm.origin).parent / f"data/_info/imagenet_{name}_indices.txt"
        assert tuple(map(int, file.read_text().split())) == ours


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
@pytest.mark.parametrize("tar", [False, True])
def test_a_and_r_restrict_answers_to_their_200_classes(tmp_path, name, tar):
    classes = imagenet.IMAGENET_A if name == "imagenet-a" else imagenet.IMAGENET_R
    outside = next(i for i in range(40, 1000) if i not in classes)
    cases = [  # label, best, second, right
        (classes[0], classes[0], 0, True),
        (classes[1], outside, classes[1], True),  # the best is not among the 200: the second counts
        (classes[150], classes[151], 0, False),
        (classes[3], outside, 0, False),  # neither is 0: argmax gives the first of the 200
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


def test_corrupted(tmp_path):
    """Seventy-five sets in directories of their tars, each of another accuracy."""
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
    rows = measured(tmp_path, lines.append)
    assert "imagenet_c" not in rows and len(rows) == 74
    assert any("imagenet_c (74 of 75 " in x and "first fog/4" in x for x in lines)


def test_corrupted_images_are_cropped_and_not_resized():
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    np.testing.assert_array_equal(robustness.central(image, 224), image)
    large = np.pad(image, ((3, 3), (10, 10), (0, 0)))
    np.testing.assert_array_equal(robustness.central(large, 224), image)
    assert robustness.central(image, 64).shape == (64, 64, 3)


def test_missing_sets_are_listed(tmp_path):
    lines = []
    with pytest.raises(UserError, match="test sets"):
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
    """Random weights in timm's layout with a head of 1000 classes."""
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
    classifier = api.load_classifier(weights)
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


def interrupted(monkeypatch, sets: Path):
    right = robustness.measure

    def measure(settings, known, *more):
        if known.name == "imagenet_sketch":
            raise KeyboardInterrupt
        return right(settings, known, *more)

    monkeypatch.setattr(robustness, "measure", measure)


def damaged(_, sets: Path):
    write(sets / "sketch" / WNIDS[5] / "1.png", b"no image")


def without_labels(_, sets: Path):
    write(sets / "imagenet-hard" / "0.png", picture(0, 0))


def of_unknown_classes(_, sets: Path):
    write(sets / "imagenet-c/fog/4/cat/0.png", picture(0, 0))


@pytest.mark.parametrize(
    "fault,ending,measured_before",
    [
        (interrupted, 130, ["imagenet_a"]),
        (damaged, "sketch: .*1.png: .* not a readable image", ["imagenet_a"]),
        (without_labels, "imagenet-hard/labels.json: No such file", []),
        (of_unknown_classes, "fog/4 has 1 class name ", []),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_an_interrupted_evaluation_keeps_its_rows(
    weights, tmp_path, monkeypatch, capsys, fault, ending, measured_before
):
    """Set by set; an unusable set is reported before the first evaluation."""
    sets, out = tmp_path / "sets", tmp_path / "out.json"
    write(sets / "imagenet-a" / WNIDS[imagenet.IMAGENET_A[0]] / "0.png", picture(0, 0))
    write(sets / "sketch" / WNIDS[4] / "0.png", picture(0, 0))
    words = [
        "--config=configs/robustness_in1k.py", f"--config.data={sets}", f"--checkpoint={weights}",
        "--config.resize=16", f"--out={out}", "--config.batch_size=4",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    right, calls = robustness.Predictor.__call__, []

    def predict(self, *args):
        calls.append(args)
        return right(self, *args)

    monkeypatch.setattr(robustness.Predictor, "__call__", predict)
    with monkeypatch.context() as patched:
        fault(patched, sets)
        with pytest.raises(SystemExit) as ended:
            cli.run(evaluate.main)
    if isinstance(ending, str):
        assert re.search(ending, ended.value.code)
    else:
        assert ended.value.code == ending
    assert bool(calls) == bool(measured_before)
    rows = json.loads(out.read_text())["results"] if out.exists() else []
    assert [row["data"] for row in rows] == measured_before
    line = f"stopped: {out} has what was evaluated so far, 1 row"
    assert (line in capsys.readouterr().out) == bool(measured_before)
    if fault is interrupted:  # the same command completes, without duplicates
        cli.run(evaluate.main)
        rows = json.loads(out.read_text())["results"]
        assert [row["data"] for row in rows] == ["imagenet_a", "imagenet_sketch"]


def test_weights_without_a_head_are_refused(weights, tmp_path):
    state = api.load_classifier(weights)
    flat = mapping.flatten({k: v for k, v in state.params.items() if k != "head"})
    timm.save(Weights(state.model, flat, "mean", "random"), tmp_path)
    with pytest.raises(UserError, match="knn_in1k"):
        api.load_classifier(tmp_path)
