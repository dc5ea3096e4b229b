"""Token stores: stored tokens against the live teacher, stored pictures against their views."""

import io
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dgpt_jax import (
    build,
    config,
    pipeline,
    records,
    shards,
    token_codec,
    token_store,
    towers,
    verify,
    views,
)
from dgpt_jax.config import Data, Tokens
from dgpt_jax.convert import teacher as teacher_weights
from dgpt_jax.schema import UserError, parse
from dgpt_jax.teacher import Teacher
from dgpt_jax.token_store import StoreInfo
from tests import data
from tests.data import TOWER, tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(root, image dataset, teacher, store of 2 views)."""
    root = tmp_path_factory.mktemp("tokens")
    dataset = data.image_dataset(root, per_class=10)
    teacher = data.random_teacher(root / "teacher")
    return root, dataset, teacher, data.token_store(root, dataset, teacher, views=2)


def live_tokens(weights, pictures):
    return Teacher(config.Teacher(weights=str(weights)), len(pictures))(np.stack(pictures))


def decoded_tokens(store, view=0):
    codec = StoreInfo.load(store).load_codec(store)
    examples = records.Split(store, token_store.view_split(view))
    return codec.decode(np.stack([example["tokens"] for example in examples]))


@pytest.mark.parametrize("codec,least", [("float16", 0.9999), ("int8", 0.999), ("int4", 0.95)])
def test_stored_tokens_are_the_live_teachers(made, tmp_path, codec, least):
    _, dataset, teacher, _ = made
    store = data.token_store(tmp_path, dataset, teacher, codec=codec)
    split, source = records.Split(store, "view000"), records.Split(dataset, "train")
    crops = []
    for example, original in zip(split, source, strict=True):  # rendered anew, from the box
        view = views.View(*(int(n) for n in example["box"]), bool(example["flip"]))
        image = np.asarray(Image.open(io.BytesIO(original["image"])).convert("RGB"))
        crops.append(views.render(image, view, 16))
    stored = decoded_tokens(store)
    assert token_codec.cosines(stored, live_tokens(teacher, crops)).min() >= least
    mirrored = live_tokens(teacher, [crop[:, ::-1] for crop in crops])
    assert np.median(token_codec.cosines(stored, mirrored).min(axis=1)) < least - 0.01


def test_tokens_of_the_largest_principal_axes(made, tmp_path):
    _, dataset, teacher, _ = made
    store = data.token_store(tmp_path, dataset, teacher, pca=8)
    info = StoreInfo.load(store)
    assert info.width == 8 and info.is_reduced and 0.5 < info.variance < 1
    pictures = [views.decode_picture(e["image"]) for e in records.Split(store, "view000")]
    live = live_tokens(teacher, pictures) @ info.load_codec(store).basis
    assert token_codec.cosines(decoded_tokens(store), live).min() > 0.999
    with pytest.raises(UserError, match="has tokens of width 8, and config.pca is None"):
        data.token_store(tmp_path, dataset, teacher)


def test_stored_pictures_are_their_views_rendered_again(made):
    _, dataset, _, store = made
    source = records.Split(dataset, "train")
    for view in range(2):
        split = records.Split(store, token_store.view_split(view))
        for i in range(len(source)):
            image = views.decode_picture(source[i]["image"])
            box = views.View(*(int(n) for n in split[i]["box"]), bool(split[i]["flip"]))
            stored = views.decode_picture(split[i]["image"])
            np.testing.assert_array_equal(stored, views.render(image, box, 16))
            assert split[i]["id"] == source[i]["id"] and split[i]["label"] == source[i]["label"]
    flips = [int(e["flip"]) for e in records.Split(store, "view000")]
    assert 0 < sum(flips) < len(flips)


FAULTS = ("mirrored picture", "shifted crop", "shuffled tokens", "tokens of another", "BGR")


def with_fault(store, to, fault: str):
    """A copy of the store whose last shard has the fault in one example."""
    copy = shutil.copytree(store, to)
    info, split = StoreInfo.load(copy), records.Split(copy, "view001")
    examples = list(split)[16:]
    faulty, other = examples[2], examples[1]
    picture = views.decode_picture(faulty["image"])
    changed = {
        "mirrored picture": picture[:, ::-1],
        "shifted crop": np.roll(picture, 1, axis=1),
        "BGR": picture[..., ::-1],
    }.get(fault, picture)
    faulty["image"] = views.encode_picture(np.ascontiguousarray(changed), "png")
    if fault == "shuffled tokens":
        faulty["tokens"] = np.random.default_rng(0).permutation(faulty["tokens"])
    if fault == "tokens of another":
        faulty["tokens"] = other["tokens"]
    features = token_store.features(info, split.label)
    path = records.shard_path(copy, "view001", 1, 2, info.name)
    shards.seal(copy, shards.receipts(copy) | {path.name: shards.write(
        path, map(records.serializer(features), examples))})  # fmt: skip
    return copy, faulty["id"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(made, tmp_path, fault):
    _, _, teacher, store = made
    weights = config.Teacher(weights=str(teacher))
    limits = verify.thresholds(StoreInfo.load(store))
    copy, id_ = with_fault(store, tmp_path / "tokens", fault)
    rows = list(verify.verify(copy, weights))
    assert [(row.split, row.shard) for row in rows] == [
        ("view000", 0), ("view000", 1), ("view001", 0), ("view001", 1),
    ]  # fmt: skip
    assert [row.is_sound(*limits) for row in rows] == [True, True, True, False]
    assert rows[-1].worst.id == id_


@pytest.mark.parametrize("codec", ["float16", "int4"])
def test_faults_are_found_under_the_noise_of_the_codec(made, tmp_path, codec):
    _, dataset, teacher, _ = made
    store = data.token_store(tmp_path / "sound", dataset, teacher, codec=codec, views=2)
    limits = verify.thresholds(StoreInfo.load(store))
    for fault in FAULTS:
        copy, _ = with_fault(store, tmp_path / fault, fault)
        rows = list(verify.verify(copy, config.Teacher(weights=str(teacher))))
        assert [row.is_sound(*limits) for row in rows] == [True, True, True, False], fault


def test_views_are_compared_with_their_source(made, tmp_path):
    """A picture and its tokens may agree with each other and not be the view they claim to be."""
    _, dataset, teacher, store = made
    weights = config.Teacher(weights=str(teacher))
    limits = verify.thresholds(StoreInfo.load(store))
    assert all(row.is_sound(*limits) for row in verify.verify(store, weights, source=dataset))
    copy = shutil.copytree(store, tmp_path / "tokens")
    info = json.loads((copy / token_store.STORE_FILE).read_text())
    info["views"]["seed"] = 1
    (copy / token_store.STORE_FILE).write_text(json.dumps(info))
    rows = list(verify.verify(copy, weights, source=dataset))
    assert not any(row.is_sound(*limits) for row in rows)
    assert "drawn again it is" in rows[0].worst.differs
    other = data.image_dataset(tmp_path / "other", per_class=10, seed=1)
    with pytest.raises(UserError, match="built from other contents"):
        next(verify.verify(store, weights, source=other))
    info["views"]["seed"] = 0
    del info["source"]["digest"]  # as earlier versions wrote it
    (copy / token_store.STORE_FILE).write_text(json.dumps(info))
    rows = list(verify.verify(copy, weights, source=other))
    assert "off the view rendered again" in rows[0].worst.differs


def test_another_teacher_is_refused(made, tmp_path):
    root, dataset, teacher, store = made
    other = data.random_teacher(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was built with the teacher"):
        list(verify.verify(store, config.Teacher(weights=str(other))))
    with pytest.raises(UserError, match=r"was built with the teacher teacher \(hash"):
        data.token_store(root, dataset, other, views=2)
    with pytest.raises(UserError, match=r"was built with the teacher teacher \(dtype float32"):
        settings = {"source": str(dataset), "picture_size": 16, "picture": "png", "shard_size": 16}
        of = {"weights": str(teacher), "dtype": "bfloat16"}
        build.build(parse(Tokens, settings | {"teacher": of}), store)
    with pytest.raises(UserError, match="was built with codec int8"):
        data.token_store(root, dataset, root / "teacher", codec="float16")


def test_training_reads_what_was_stored(made):
    _, _, _, store = made
    examples = pipeline.open_examples(parse(Data, {"path": str(store)}), tiny_model(), seed=0)
    assert len(examples) == 20
    first, again, later = examples(3, 7), examples(3, 7), examples(23, 7)
    assert first["tokens"].shape == (17, TOWER.out_width) and first["tokens"].dtype == np.int8
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    both = [records.Split(store, name)[7] for name in ("view000", "view001")]
    shown = [views.decode_picture(e["image"]) for e in both]
    for example in (first, later):  # a picture and its tokens come from the same view
        view = [np.array_equal(example["image"], picture) for picture in shown].index(True)
        np.testing.assert_array_equal(example["tokens"], both[view]["tokens"])
    seen = {e["image"].tobytes() for e in (examples(20 * epoch, 7) for epoch in range(8))}
    assert len(seen) == 2


def test_a_store_carries_what_made_it(made):
    _, _, teacher, store = made
    info = StoreInfo.load(store)
    assert info.teacher["hash"] == teacher_weights.load(str(teacher)).hash
    assert info.source["examples"] == 20 and info.grid == (4, 4) and info.width == 24
    assert len(info.channel_scale) == 24 and 0.999 < info.cosine[0] <= info.cosine[1]
    assert json.loads((store / "dataset_info.json").read_text())["fileFormat"] == "array_record"


def test_pictures_larger_than_the_teachers_input(made, tmp_path):
    """The teacher resizes on the device; the student may be larger than it."""
    _, dataset, teacher, _ = made
    store = data.token_store(tmp_path, dataset, teacher, picture_size=32)
    split = records.Split(store, "view000")
    pictures = np.stack([views.decode_picture(split[i]["image"]) for i in range(4)])
    loaded = teacher_weights.load(str(teacher))
    expected = towers.teacher_tokens(loaded.tower, loaded.params, pictures)
    assert token_codec.cosines(decoded_tokens(store)[:4], expected).min() > 0.999


def test_nothing_to_build_from(tmp_path):
    with pytest.raises(UserError, match=r"config.source is empty"):
        parse(Tokens, {})
    with pytest.raises(UserError, match="no such directory"):
        settings = {"source": str(tmp_path / "absent"), "teacher": {"weights": "x"}}
        build.build(parse(Tokens, settings), tmp_path / "out")


def test_a_source_as_tfds_prepares_imagenet(made, tmp_path):
    """{file_name, image, label} and no id."""
    _, dataset, teacher, _ = made
    label = tfds.features.ClassLabel(names=["n01440764", "n01443537"])
    features = tfds.features.FeaturesDict(
        {"file_name": tfds.features.Text(), "image": tfds.features.Image(), "label": label}
    )
    source = tmp_path / "imagenet2012" / "5.1.0"
    source.mkdir(parents=True)
    examples = [
        {"file_name": f"n01440764_{i}.JPEG", "image": io.BytesIO(e["image"]), "label": i % 2}
        for i, e in enumerate(records.Split(dataset, "train"))
    ]
    path = records.shard_path(source, "train", 0, 1, "imagenet2012")
    receipt = shards.write(path, map(records.serializer(features), examples))
    records.write_metadata(source, features, {"train": [receipt]}, "imagenet2012")
    store = data.token_store(tmp_path, source, teacher)
    split = records.Split(store, "view000")
    assert [e["id"] for e in split][:2] == ["n01440764_0.JPEG", "n01440764_1.JPEG"]
    assert split.label.names == label.names and split[1]["label"] == 1
    assert StoreInfo.load(store).source["examples"] == 20
