"""Token stores: stored tokens against the live teacher, stored images against their views."""

import io
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dgpt_jax.config import DataConfig, TokensConfig, roots
from dgpt_jax.config.schema import parse
from dgpt_jax.data import dataset as pipeline
from dgpt_jax.data import image_ops, token_codec, token_store
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.errors import UserError
from dgpt_jax.models import teacher_vit
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.tokens import build, verify
from dgpt_jax.tokens.teacher import Teacher
from dgpt_jax.weights import teacher_loading as teacher_weights
from tests.support import data
from tests.support.data import TOWER, tiny_model


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(root, image dataset, teacher, store of 2 views)."""
    root = tmp_path_factory.mktemp("tokens")
    dataset = data.image_dataset(root, per_class=10)
    teacher = data.random_teacher(root / "teacher")
    return root, dataset, teacher, data.token_store(root, dataset, teacher, views=2)


def live_tokens(weights, images):
    return Teacher(roots.TeacherConfig(weights=str(weights)), len(images))(np.stack(images))


def decoded_tokens(store, view=0):
    codec = StoreInfo.load(store).teacher.load_codec(store)
    examples = tfds_dataset.Split(store, token_store.view_split(view))
    return codec.decode(np.stack([example["tokens"] for example in examples]))


@pytest.mark.parametrize("codec,least", [("float16", 0.9999), ("int8", 0.999), ("int4", 0.95)])
def test_stored_tokens_are_the_live_teachers(built, tmp_path, codec, least):
    _, dataset, teacher, _ = built
    store = data.token_store(tmp_path, dataset, teacher, codec=codec)
    split, source = tfds_dataset.Split(store, "view000"), tfds_dataset.Split(dataset, "train")
    crops = []
    for example, original in zip(split, source, strict=True):  # rendered again from the box
        view = image_ops.View(*(int(n) for n in example["box"]), bool(example["flip"]))
        image = np.asarray(Image.open(io.BytesIO(original["image"])).convert("RGB"))
        crops.append(image_ops.render(image, view, 16))
    stored = decoded_tokens(store)
    assert token_codec.cosines(stored, live_tokens(teacher, crops)).min() >= least
    mirrored = live_tokens(teacher, [crop[:, ::-1] for crop in crops])
    assert np.median(token_codec.cosines(stored, mirrored).min(axis=1)) < least - 0.01


def test_tokens_of_the_largest_principal_axes(built, tmp_path):
    _, dataset, teacher, _ = built
    store = data.token_store(tmp_path, dataset, teacher, pca=8)
    info = StoreInfo.load(store)
    assert info.teacher.width == 8 and info.teacher.is_reduced and 0.5 < info.teacher.variance < 1
    images = [image_ops.decode_image(e["image"]) for e in tfds_dataset.Split(store, "view000")]
    live = live_tokens(teacher, images) @ info.teacher.load_codec(store).basis
    assert token_codec.cosines(decoded_tokens(store), live).min() > 0.999
    with pytest.raises(UserError, match="config.pca=None"):
        data.token_store(tmp_path, dataset, teacher)


def test_stored_images_equal_their_rendered_views(built):
    _, dataset, _, store = built
    source = tfds_dataset.Split(dataset, "train")
    for view in range(2):
        split = tfds_dataset.Split(store, token_store.view_split(view))
        for i in range(len(source)):
            image = image_ops.decode_image(source[i]["image"])
            box = image_ops.View(*(int(n) for n in split[i]["box"]), bool(split[i]["flip"]))
            stored = image_ops.decode_image(split[i]["image"])
            np.testing.assert_array_equal(stored, image_ops.render(image, box, 16))
            assert split[i]["id"] == source[i]["id"] and split[i]["label"] == source[i]["label"]
    flips = [int(e["flip"]) for e in tfds_dataset.Split(store, "view000")]
    assert 0 < sum(flips) < len(flips)


FAULTS = ("mirrored image", "shifted crop", "shuffled tokens", "tokens of another", "BGR")


def with_fault(store, to, fault: str):
    """Copies the store with a fault in one example of the last shard."""
    copy = shutil.copytree(store, to)
    info, split = StoreInfo.load(copy), tfds_dataset.Split(copy, "view001")
    examples = list(split)[16:]
    faulty, other = examples[2], examples[1]
    image = image_ops.decode_image(faulty["image"])
    changed = {
        "mirrored image": image[:, ::-1],
        "shifted crop": np.roll(image, 1, axis=1),
        "BGR": image[..., ::-1],
    }.get(fault, image)
    faulty["image"] = image_ops.encode_image(np.ascontiguousarray(changed), "png")
    if fault == "shuffled tokens":
        faulty["tokens"] = np.random.default_rng(0).permutation(faulty["tokens"])
    if fault == "tokens of another":
        faulty["tokens"] = other["tokens"]
    features = token_store.features(info, split.label)
    path = tfds_dataset.shard_path(copy, "view001", 1, 2, info.name)
    receipt = array_record_shards.write(path, map(tfds_dataset.serializer(features), examples))
    array_record_shards.write_manifest(
        copy, array_record_shards.shard_infos(copy) | {path.name: receipt}
    )
    return copy, faulty["id"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_detected(built, tmp_path, fault):
    _, _, teacher, store = built
    weights = roots.TeacherConfig(weights=str(teacher))
    limits = verify.thresholds(StoreInfo.load(store).teacher)
    copy, id_ = with_fault(store, tmp_path / "tokens", fault)
    reports = list(verify.verify(copy, weights))
    assert [(report.split, report.shard) for report in reports] == [
        ("view000", 0), ("view000", 1), ("view001", 0), ("view001", 1),
    ]  # fmt: skip
    assert [report.is_sound(*limits) for report in reports] == [True, True, True, False]
    assert reports[-1].worst.id == id_


@pytest.mark.parametrize("codec", ["float16", "int4"])
def test_faults_are_detected_with_every_codec(built, tmp_path, codec):
    _, dataset, teacher, _ = built
    store = data.token_store(tmp_path / "sound", dataset, teacher, codec=codec, views=2)
    limits = verify.thresholds(StoreInfo.load(store).teacher)
    for fault in FAULTS:
        copy, _ = with_fault(store, tmp_path / fault, fault)
        reports = list(verify.verify(copy, roots.TeacherConfig(weights=str(teacher))))
        assert [report.is_sound(*limits) for report in reports] == [True, True, True, False], fault


def test_views_are_compared_with_their_source(built, tmp_path):
    """An image and its tokens may match each other, but not the view that the store records."""
    _, dataset, teacher, store = built
    weights = roots.TeacherConfig(weights=str(teacher))
    limits = verify.thresholds(StoreInfo.load(store).teacher)
    assert all(report.is_sound(*limits) for report in verify.verify(store, weights, source=dataset))
    copy = shutil.copytree(store, tmp_path / "tokens")
    info = json.loads((copy / token_store.STORE_FILE).read_text())
    info["views"]["seed"] = 1
    (copy / token_store.STORE_FILE).write_text(json.dumps(info))
    reports = list(verify.verify(copy, weights, source=dataset))
    assert not any(report.is_sound(*limits) for report in reports)
    assert "box" in reports[0].worst.differs
    other = data.image_dataset(tmp_path / "other", per_class=10, seed=1)
    with pytest.raises(UserError, match="digest"):
        next(verify.verify(store, weights, source=other))
    info["views"]["seed"] = 0
    del info["source"]["digest"]  # as in earlier versions
    (copy / token_store.STORE_FILE).write_text(json.dumps(info))
    reports = list(verify.verify(copy, weights, source=other))
    assert "image" in reports[0].worst.differs


def test_another_teacher_is_rejected(built, tmp_path):
    root, dataset, teacher, store = built
    other = data.random_teacher(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="teacher"):
        list(verify.verify(store, roots.TeacherConfig(weights=str(other))))
    with pytest.raises(UserError, match=r"teacher teacher \(hash"):
        data.token_store(root, dataset, other, views=2)
    with pytest.raises(UserError, match=r"teacher teacher \(dtype float32"):
        settings = {
            "source": str(dataset),
            "image_size": 16,
            "image_encoding": "png",
            "shard_size": 16,
        }
        settings_of_teacher = {"weights": str(teacher), "dtype": "bfloat16"}
        build.build(parse(TokensConfig, settings | {"teacher": settings_of_teacher}), store)
    with pytest.raises(UserError, match="codec int8, not float16"):
        data.token_store(root, dataset, root / "teacher", codec="float16")


def test_training_reads_stored_examples(built):
    _, _, _, store = built
    examples = pipeline.open_examples(parse(DataConfig, {"path": str(store)}), tiny_model(), seed=0)
    assert len(examples) == 20
    first, again, later = examples(3, 7), examples(3, 7), examples(23, 7)
    assert first["tokens"].shape == (17, TOWER.out_width) and first["tokens"].dtype == np.int8
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    both = [tfds_dataset.Split(store, name)[7] for name in ("view000", "view001")]
    shown = [image_ops.decode_image(e["image"]) for e in both]
    for example in (first, later):  # an image and its tokens come from the same view
        view = [np.array_equal(example["image"], image) for image in shown].index(True)
        np.testing.assert_array_equal(example["tokens"], both[view]["tokens"])
    views = {e["image"].tobytes() for e in (examples(20 * epoch, 7) for epoch in range(8))}
    assert len(views) == 2


def test_store_metadata(built):
    _, _, teacher, store = built
    info = StoreInfo.load(store)
    tokens = info.teacher
    assert tokens.weights["hash"] == teacher_weights.load(str(teacher)).hash
    assert info.source["examples"] == 20 and tokens.grid == (4, 4) and tokens.width == 24
    assert (
        len(info.teacher.channel_scale) == 24
        and 0.999 < info.teacher.cosine[0] <= info.teacher.cosine[1]
    )
    assert json.loads((store / "dataset_info.json").read_text())["fileFormat"] == "array_record"


def test_images_larger_than_the_teachers_input(built, tmp_path):
    """The teacher resizes on the device; the student's input may be larger."""
    _, dataset, teacher, _ = built
    store = data.token_store(tmp_path, dataset, teacher, image_size=32)
    split = tfds_dataset.Split(store, "view000")
    images = np.stack([image_ops.decode_image(split[i]["image"]) for i in range(4)])
    loaded = teacher_weights.load(str(teacher))
    expected = teacher_vit.teacher_tokens(loaded.tower, loaded.params, images)
    assert token_codec.cosines(decoded_tokens(store)[:4], expected).min() > 0.999


def test_missing_sources(tmp_path):
    with pytest.raises(UserError, match="config.source"):
        parse(TokensConfig, {})
    with pytest.raises(UserError, match="absent"):
        settings = {"source": str(tmp_path / "absent"), "teacher": {"weights": "x"}}
        build.build(parse(TokensConfig, settings), tmp_path / "out")


def test_a_source_as_tfds_prepares_imagenet(built, tmp_path):
    """{file_name, image, label} without an id."""
    _, dataset, teacher, _ = built
    label = tfds.features.ClassLabel(names=["n01440764", "n01443537"])
    features = tfds.features.FeaturesDict(
        {"file_name": tfds.features.Text(), "image": tfds.features.Image(), "label": label}
    )
    source = tmp_path / "imagenet2012" / "5.1.0"
    source.mkdir(parents=True)
    examples = [
        {"file_name": f"n01440764_{i}.JPEG", "image": io.BytesIO(e["image"]), "label": i % 2}
        for i, e in enumerate(tfds_dataset.Split(dataset, "train"))
    ]
    path = tfds_dataset.shard_path(source, "train", 0, 1, "imagenet2012")
    receipt = array_record_shards.write(path, map(tfds_dataset.serializer(features), examples))
    tfds_dataset.write_metadata(source, features, {"train": [receipt]}, "imagenet2012")
    store = data.token_store(tmp_path, source, teacher)
    split = tfds_dataset.Split(store, "view000")
    assert [e["id"] for e in split][:2] == ["n01440764_0.JPEG", "n01440764_1.JPEG"]
    assert split.label.names == label.names and split[1]["label"] == 1
    assert StoreInfo.load(store).source["examples"] == 20
