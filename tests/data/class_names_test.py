"""Names of classes: kept with a head wherever it goes, compared wherever it meets data."""

import json

import numpy as np
import pytest

from dgpt_jax import class_labels, class_names, load, train
from dgpt_jax.convert import card, export, formats
from dgpt_jax.convert.weights import Weights, encoder_shapes
from dgpt_jax.evals import imagenet
from dgpt_jax.schema import UserError
from dgpt_jax.tasks import classify
from tests import classifying, data

WNIDS = class_labels.imagenet("labels.txt")


@pytest.mark.parametrize(
    "names,expected,found",
    [
        (["a", "b"], ["a", "b"], None),
        (["a", "b"], ["b", "a"], 0),
        (["a", "b"], ["a", "c"], 1),
        (["a", "b"], ["a", "b", "c"], 2),
        ([], ["a"], None),
        (["a"], (), None),
        (["0", "1"], ["a", "b"], None),
        (("a", "b"), ["0", "1"], None),
        (["1", "0"], ["a", "b"], 0),
    ],
)
def test_first_difference(names, expected, found):
    assert class_names.first_difference(names, expected) == found


def with_head(pooling: str, names=("cat", "dog", "Zebra, common")) -> Weights:
    model, rng = data.tiny_model(), np.random.default_rng(5)
    params = {
        name: np.float32(name.endswith("scale") + 0.2 * rng.standard_normal(shape))
        for name, shape in encoder_shapes(model, pooling, 3).items()
    }
    return Weights(model, params, pooling, "here", classes=names)


@pytest.mark.parametrize(
    "name,pooling", [("timm", "mean"), ("hf", "cls"), ("safetensors", "mean"), ("flax", "mean")]
)
def test_exports_keep_them(tmp_path, name, pooling):
    weights = with_head(pooling)
    path, _ = export.write(weights, formats.LAYOUTS[name], tmp_path / "out")
    assert load.load_classifier(path).classes == weights.classes
    text = card.text(weights, name, path, next(path.parent.rglob("*")), verified="")
    assert "3 classes (cat, dog, Zebra, common)" in text
    path, _ = export.write(with_head(pooling, ()), formats.LAYOUTS[name], tmp_path / "without")
    assert load.load_classifier(path).classes == ()


@pytest.mark.parametrize(
    "told,said",
    [
        ({"0": "a", "1": "b"}, "names 2 classes, the head has 3"),
        ({"0": "a", "1": "b", "5": "c"}, "names of the classes 0, 1, … are expected"),
        (["a", "b", 3], "names of the classes"),
        ("abc", "names of the classes"),
    ],
)
@pytest.mark.parametrize(
    "name,pooling,key", [("hf", "cls", "id2label"), ("timm", "mean", "label_names")]
)
def test_names_that_are_none(tmp_path, name, pooling, key, told, said):
    path, _ = export.write(with_head(pooling), formats.LAYOUTS[name], tmp_path / "out")
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: told}))
    with pytest.raises(UserError, match=said):
        formats.read(path)


@pytest.mark.parametrize(
    "names,said",
    [
        ((), ""),
        (WNIDS, ""),
        ([str(i) for i in range(1000)], ""),
        (WNIDS[::-1], f"class 0 is '{WNIDS[-1]}', ImageNet's is '{WNIDS[0]}'"),
        (WNIDS[1:] + WNIDS[:1], "class 0 is"),
        ([str(999 - i) for i in range(1000)], "class 0 is '999'"),
    ],
)
def test_the_order_of_imagenet(names, said):
    heard = []
    if not said:
        imagenet.check_order(names, "head", heard.append)
    else:
        with pytest.raises(UserError, match=said):
            imagenet.check_order(names, "head", heard.append)
    assert not heard


def test_an_order_that_names_do_not_tell_is_said():
    heard = []
    imagenet.check_order(["tench", *"abc"], "head", heard.append)
    assert "'tench'" in heard[0] and "on trust" in heard[0]


def test_a_head_starts_only_with_its_own_classes(tmp_path):
    path, _ = export.write(with_head("mean"), formats.LAYOUTS["timm"], tmp_path / "out")
    config = classifying.settings("x", classify={"weights": str(path), "num_classes": 3})
    same = classify.starting_weights(config, ["cat", "dog", "Zebra, common"])
    assert "head" in same.given and not [n for n in same.notes if "other classes" in n]
    other = classify.starting_weights(config, ["dog", "cat", "Zebra, common"])
    assert "head" not in other.given
    assert "its head is of other classes: 0 is 'cat', not 'dog'" in other.notes
    assert "head" in classify.starting_weights(config).given


def test_a_run_keeps_them(tmp_path):
    dataset = data.image_dataset(tmp_path, per_class=4, classes=("west", "east"))
    run = classifying.settings(
        dataset, evals={"heldout": ""}, checkpoint={"best": ""}, total="2 steps"
    )
    assert train.train(run, tmp_path / "run") == 0
    assert load.load_classifier(tmp_path / "run").classes == ("east", "west")
