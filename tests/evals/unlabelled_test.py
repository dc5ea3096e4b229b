"""Missing labels and non-finite features are refused, with split and count."""

import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dgpt_jax import train
from dgpt_jax.config import MeshConfig
from dgpt_jax.data import dataset, loader
from dgpt_jax.data.ingest import importer
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import (
    classification,
    feature_bank,
    features,
    fewshot,
    knn,
    pretraining,
    probe,
    robustness,
)
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.training import tasks
from tests.support import banks, imagenet_sets
from tests.support.classifying import settings
from tests.support.data import write_folder

NO_LABEL = r"Split\(.*, '{}'\): {} of {} examples"


@pytest.fixture(scope="module")
def half_labelled(tmp_path_factory):
    """Splits train, of class folders, and test, of images without labels (-1)."""
    root = tmp_path_factory.mktemp("half")
    write_folder(root / "folder", 6, split="train")
    write_folder(root / "more", 4)
    (root / "folder/test").mkdir()
    for i, file in enumerate(sorted((root / "more").glob("*/*.png"))):
        shutil.copy(file, root / f"folder/test/{i}.png")
    importer.import_images(root / "folder", root / "images", say=lambda _: 0)
    split = tfds_dataset.Split(root / "images", "test")
    assert {int(record["label"]) for record in split} == {-1}
    return root / "images"


def corner(image):
    return image[:16, :16]


def encode(params, images):
    return {"mean": params * images.astype(jnp.float32).mean(axis=(1, 2))}


def extract(source, params=1.0, max_examples=None):
    mesh = sharding.make_mesh(MeshConfig())
    return features.Extractor(encode, mesh, batch_size=5, max_examples=max_examples)(
        params, source, corner
    )


@pytest.fixture(scope="module")
def some_labelled(tmp_path_factory):
    """A split `test` of 8 examples; the last four have no label."""
    directory = tmp_path_factory.mktemp("some") / "images"
    examples = [
        {"image": imagenet_sets.picture(i, 0), "file_name": f"{i}", "label": label}
        for i, label in enumerate((0, 1, 0, 1, -1, -1, -1, -1))
    ]
    label = {"label": tfds.features.ClassLabel(names=["a", "b"])}
    imagenet_sets.stored(directory, "test", label, examples)
    return directory


def features_of(path, tmp_path):
    extract(features.RecordSource(tfds_dataset.Split(path, "test")))


def knn_while_pretraining(path, tmp_path):
    run = settings(
        path, task="pretrain", optim={"layer_decay": 1.0}, teacher={"width": 24, "grid": 4},
        evals={"heldout": "", "knn": str(path), "knn_train": "test", "knn_test": "test",
               "knn_resize": 18},
    )  # fmt: skip
    task = tasks.task_without_data(run)
    evaluate = pretraining.knn_accuracy(task, sharding.make_mesh(run.mesh))
    evaluate(task.init(jax.random.key(0)))


def training(path, tmp_path):
    run = settings(path, data={"split": "test"}, evals={"heldout": ""}, checkpoint={"best": ""})
    train.train(run, tmp_path / "run")


def batches(path, tmp_path):
    run = settings(path, data={"split": "test"})
    examples = dataset.open_labelled(run.data, run.model, run.classify, run.seed)
    stream = loader.train_batches(examples, 8, rows=np.arange(8), start_step=0)
    with contextlib.closing(stream):
        next(stream)


def accuracy(path, tmp_path):
    run = settings(path, evals={"heldout_split": "test", "batch_size": 8})
    task = tasks.task_without_data(run)
    evaluate = classification.accuracy(task, sharding.make_mesh(run.mesh))
    evaluate(task.init(jax.random.key(0)))


# reader of labels → unlabeled examples of its first bad batch
READERS = {
    features_of: "1 of 5", knn_while_pretraining: "4 of 8", training: "4 of 8", batches: "4 of 8",
    accuracy: "4 of 8",
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_split_without_labels(half_labelled, some_labelled, tmp_path, reader):
    with pytest.raises(UserError, match=NO_LABEL.format("test", 1, 1)) as caught:
        reader(half_labelled, tmp_path)  # none has one: the first is checked
    assert "-1" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=NO_LABEL.format("test", *READERS[reader].split(" of "))):
        reader(some_labelled, tmp_path)


def test_padding_does_not_count(half_labelled, some_labelled):
    source = features.RecordSource(tfds_dataset.Split(some_labelled, "test"))
    assert len(extract(source, max_examples=4)["mean"]) == 4
    assert (
        len(extract(features.RecordSource(tfds_dataset.Split(half_labelled, "train")))["mean"])
        == 12
    )


@pytest.mark.parametrize(
    "labels,bad", [([0, 1, -1, 1], 1), ([-1, -1], 2), ([0, 2], 1), ([0, 1], 0), ([], 0)]
)
def test_labels(labels, bad):
    if not bad:
        dataset.check_labels(np.array(labels, int), "split", 2)
        return
    with pytest.raises(UserError, match=f"split: {bad} of {len(labels)} examples"):
        dataset.check_labels(np.array(labels), "split", 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite(half_labelled, value):
    source = features.RecordSource(tfds_dataset.Split(half_labelled, "train"))
    message = r"'train'\): mean features of 12 of 12 examples are not finite \(NaN or Inf\)"
    with pytest.raises(UserError, match=message):
        extract(source, params=np.float32(value))
    rows, labels = banks.clusters(20, seed=1)
    rows[[3, 7], 2] = value
    with pytest.raises(UserError, match="features of 2 of 20 examples are not finite"):
        feature_bank.FeatureBank.from_arrays(rows, labels, banks.mesh_of(1))


def test_some_features_that_are_not_finite(half_labelled):
    """Counted per example over all batches, without padding."""
    source = features.RecordSource(tfds_dataset.Split(half_labelled, "train"))
    numbers = iter(range(100))

    def view(image):
        return np.full((16, 16, 3), next(numbers), np.uint8)

    def bad(params, images):
        number = images[:, 0, 0, 0].astype(jnp.float32)
        return {"n": jnp.where(number[:, None] % 2 == 0, jnp.nan, number[:, None])}

    extractor = features.Extractor(bad, sharding.make_mesh(MeshConfig()), batch_size=5, threads=1)
    with pytest.raises(UserError, match=r"n features of \d of 12 examples") as caught:
        extractor(0, source, view)
    assert int(str(caught.value).split(" features of ")[1].split()[0]) in (5, 6, 7)


def test_protocols_whose_fit_is_not_finite(monkeypatch):
    """Features are finite, but the fit overflows."""
    rows, labels = banks.clusters(40, seed=1)
    bank = feature_bank.FeatureBank.from_arrays(rows, labels, banks.mesh_of(1))
    broken = jnp.full((16, 5), jnp.nan), jnp.zeros(5)
    monkeypatch.setattr(probe, "fit", lambda *_, **__: broken)
    with pytest.raises(UserError, match="linear probe of 40 examples"):
        probe.linear_probe(bank, bank, l2_grid=(1.0,))
    scale = np.zeros(16, np.float32), np.ones(16, np.float32)
    problem = probe._problem(bank, np.zeros(40, int))
    assert int(probe._hits(problem, scale, broken, 0, mesh=bank.mesh)) == 0
    monkeypatch.setattr(np.linalg, "solve", lambda a, b: np.full(b.shape, np.nan))
    with pytest.raises(UserError, match="least squares of 40 examples"):
        fewshot.correct(bank, bank)
    assert knn.correct(bank, bank, ks=(1,)) == {1: 40}


@dataclasses.dataclass(frozen=True)
class Broken(imagenet_sets.Fake):
    """A NaN logit of a masked class, in images whose best class is 7."""

    def logits(self, images):
        logits = super().logits(images)
        bad = logits.argmax(axis=-1) == 7
        return logits.at[:, 5].set(jnp.where(bad, jnp.nan, logits[:, 5]))


def test_logits_that_are_not_finite(tmp_path, monkeypatch):
    for i, best in enumerate((7, 3, 7)):
        path = tmp_path / "imagenet-a" / imagenet_sets.WNIDS[6] / f"{i}.png"
        imagenet_sets.write(path, imagenet_sets.picture(best, 0))
    assert imagenet_sets.measured(tmp_path)["imagenet_a"]["test"] == 3
    monkeypatch.setattr(imagenet_sets, "Fake", Broken)
    with pytest.raises(UserError, match="imagenet-a: logits of 2 of 3 examples are not finite"):
        imagenet_sets.measured(tmp_path)


def test_a_mask_without_classes():
    predict = object.__new__(robustness.Predictor)
    with pytest.raises(UserError, match="somewhere: "):
        predict("somewhere", None, np.array([[True, False], [False, False]]))


@pytest.mark.parametrize("classes,top5", [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(tmp_path, classes, top5):
    write_folder(tmp_path / "folder", 2, classes=tuple("abcdef"[:classes]))
    importer.import_images(tmp_path / "folder", tmp_path / "images", say=lambda _: 0)
    run = settings(tmp_path / "images", classify={"num_classes": classes})
    task = tasks.open_task(run)
    metrics = classification.accuracy(task, sharding.make_mesh(run.mesh))(
        task.init(jax.random.key(0))
    )
    assert {"val/top1", "val/top1_squash"} <= metrics.keys()
    assert {"val/top5", "val/top5_squash"} & metrics.keys() == (
        {"val/top5", "val/top5_squash"} if top5 else set()
    )


@pytest.mark.parametrize(
    ("names", "trained", "message"),
    [
        (["a", "b"], ["a", "b"], ""),
        (["0", "1"], ["a", "b"], ""),  # numbers as names: cannot be compared
        (["a", "b"], ["0", "1"], ""),
        (["b", "c"], ["a", "b"], "class 0 is 'b' in test, .*'a' in train"),
        (["b", "a"], ["a", "b"], "class 0 is 'b' in test, .*'a' in train"),
        (["a", "B"], ["a", "b"], "class 1 is 'B' in test, .*'b' in train"),
    ],
)
def test_classes_of_two_datasets(names, trained, message):
    """As many classes, but different ones."""
    splits = [Named("test", names), Named("train", trained)]
    ending = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
    with ending:
        dataset.require_same_classes(*splits)


class Named:
    """A split with a name and classes only."""

    def __init__(self, name: str, classes: list[str]):
        self.name, self.label = name, tfds.features.ClassLabel(names=classes)

    def __repr__(self):
        return self.name


def test_a_heldout_set_of_another_import(tmp_path):
    for name, classes in (("train", ("a", "b")), ("test", ("b", "c"))):
        write_folder(tmp_path / name, 4, classes=classes)
        importer.import_images(tmp_path / name, tmp_path / f"{name}_images", say=lambda _: 0)
    config = settings(
        tmp_path / "train_images",
        evals={"heldout": str(tmp_path / "test_images"), "heldout_split": "train"},
    )
    with pytest.raises(UserError, match="class 0 is 'b' in Split.*test_images.* 'a' in"):
        train.train(config, tmp_path / "run")
