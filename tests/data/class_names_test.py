"""Class names: kept with the head in all formats, compared with those of datasets."""

import json

import numpy as np
import pytest

from dgpt_jax import train
from dgpt_jax.data import class_names
from dgpt_jax.data.ingest import labels
from dgpt_jax.errors import UserError
from dgpt_jax.evals import imagenet
from dgpt_jax.training import initial_weights
from dgpt_jax.weights import api, card, export, registry
from dgpt_jax.weights.types import Weights, encoder_shapes
from tests.support import classifying, data

WNIDS = labels.imagenet("labels.txt")


@pytest.mark.parametrize(
    "names,expected,difference",
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
def test_first_difference(names, expected, difference):
    assert class_names.first_difference(names, expected) == difference


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
def test_exports_keep_class_names(tmp_path, name, pooling):
    weights = with_head(pooling)
    path, _ = export.write(weights, registry.LAYOUTS[name], tmp_path / "out")
    assert api.load_classifier(path).classes == weights.classes
    text = card.text(weights, name, path, next(path.parent.rglob("*")), verified="")
    assert "3 classes (cat, dog, Zebra, common)" in text
    path, _ = export.write(with_head(pooling, ()), registry.LAYOUTS[name], tmp_path / "without")
    assert api.load_classifier(path).classes == ()


@pytest.mark.parametrize(
    "names,message",
    [
        ({"0": "a", "1": "b"}, "names 2 classes, the head has 3"),
        ({"0": "a", "1": "b", "5": "c"}, "names of the classes 0, 1"),
        (["a", "b", 3], "names of the classes"),
        ("abc", "names of the classes"),
    ],
)
@pytest.mark.parametrize(
    "name,pooling,key", [("hf", "cls", "id2label"), ("timm", "mean", "label_names")]
)
def test_invalid_class_names(tmp_path, name, pooling, key, names, message):
    path, _ = export.write(with_head(pooling), registry.LAYOUTS[name], tmp_path / "out")
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: names}))
    with pytest.raises(UserError, match=message):
        registry.read(path)


@pytest.mark.parametrize(
    "names,message",
    [
        ((), ""),
        (WNIDS, ""),
        ([str(i) for i in range(1000)], ""),
        (WNIDS[::-1], f"class 0 is '{WNIDS[-1]}', ImageNet's is '{WNIDS[0]}'"),
        (WNIDS[1:] + WNIDS[:1], "class 0 is"),
        ([str(999 - i) for i in range(1000)], "class 0 is '999'"),
    ],
)
def test_the_order_of_imagenet(names, message):
    notes = []
    if not message:
        imagenet.check_order(names, "head", notes.append)
    else:
        with pytest.raises(UserError, match=message):
            imagenet.check_order(names, "head", notes.append)
    assert not notes


def test_an_unverifiable_order_is_noted():
    notes = []
    imagenet.check_order(["tench", *"abc"], "head", notes.append)
    assert "'tench'" in notes[0]


def test_a_head_is_loaded_only_for_its_own_classes(tmp_path):
    path, _ = export.write(with_head("mean"), registry.LAYOUTS["timm"], tmp_path / "out")
    config = classifying.settings("x", classify={"num_classes": 3}, init={"weights": str(path)})
    same = initial_weights.for_classifier(config, ["cat", "dog", "Zebra, common"])
    assert "head" in same.params and not [n for n in same.notes if "'cat'" in n]
    other = initial_weights.for_classifier(config, ["dog", "cat", "Zebra, common"])
    assert "head" not in other.params
    assert any("0 is 'cat', not 'dog'" in note for note in other.notes)
    assert "head" in initial_weights.for_classifier(config).params


@pytest.mark.slow
def test_training_keeps_class_names(tmp_path):
    dataset = data.image_dataset(tmp_path, per_class=4, classes=("west", "east"))
    run = classifying.settings(
        dataset, evals={"heldout": ""}, checkpoint={"best": ""}, total="2 steps"
    )
    assert train.train(run, tmp_path / "run") == 0
    assert api.load_classifier(tmp_path / "run").classes == ("east", "west")
