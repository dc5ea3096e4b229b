"""Token stores: stored tokens against the live teacher, stored pictures against their views."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import build, pipeline, records, token_codec, towers, views
from dgpt_jax.config import Data, Teacher, Tokens
from dgpt_jax.schema import UserError, parse
from tests.data import TOWER, image_dataset, random_teacher, tiny_model, token_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(root, image dataset, teacher, store of 2 views)."""
    root = tmp_path_factory.mktemp("tokens")
    dataset = image_dataset(root, per_class=10)
    teacher = random_teacher(root / "teacher")
    return root, dataset, teacher, token_store(root, dataset, teacher, views=2)


def live_tokens(teacher, pictures):
    return build.Teacher(Teacher(weights=str(teacher)))(np.stack(pictures), len(pictures))


@pytest.mark.parametrize("codec,least", [("int8", 0.999), ("float16", 0.9999)])
def test_stored_tokens_are_the_live_teachers(made, tmp_path, codec, least):
    _, dataset, teacher, _ = made
    store = token_store(tmp_path, dataset, teacher, codec=codec)
    info, split = records.StoreInfo.load(store), records.Split(store, "view000")
    stored = token_codec.decode(np.stack([e["tokens"] for e in split]), info.channel_scale)
    source = records.Split(dataset, "train")
    crops = []
    for example, original in zip(split, source, strict=True):  # rendered anew, from the box
        view = views.View(*(int(n) for n in example["box"]), bool(example["flip"]))
        image = np.asarray(Image.open(io.BytesIO(original["image"])).convert("RGB"))
        crops.append(views.render(image, view, 16))
    assert token_codec.cosines(stored, live_tokens(teacher, crops)).min() >= least
    mirrored = live_tokens(teacher, [crop[:, ::-1] for crop in crops])
    assert np.median(token_codec.cosines(stored, mirrored).min(axis=1)) < 0.99


def test_stored_pictures_are_their_views_rendered_again(made):
    _, dataset, _, store = made
    source = records.Split(dataset, "train")
    for view in range(2):
        split = records.Split(store, records.view_split(view))
        for i in range(len(source)):
            image = views.decode_picture(source[i]["image"])
            box = views.View(*(int(n) for n in split[i]["box"]), bool(split[i]["flip"]))
            stored = views.decode_picture(split[i]["image"])
            np.testing.assert_array_equal(stored, views.render(image, box, 16))
            assert split[i]["id"] == source[i]["id"] and split[i]["label"] == source[i]["label"]
    flips = [int(e["flip"]) for e in records.Split(store, "view000")]
    assert 0 < sum(flips) < len(flips)


@pytest.mark.parametrize("damage", ["flip", "shift"])
def test_a_changed_picture_is_found(made, tmp_path, damage):
    _, _, teacher, store = made
    weights = Teacher(weights=str(teacher))
    rows = build.verify(store, weights)
    least = build.threshold(records.StoreInfo.load(store))
    assert [r["split"] for r in rows] == ["view000", "view001"] and rows[0]["examples"] == 20
    assert min(r["min"] for r in rows) >= least
    copy = shutil.copytree(store, tmp_path / "tokens")
    info = records.StoreInfo.load(copy)
    path = records.shard_path(copy, "view001", 1, 2)
    split = records.Split(copy, "view001")
    examples = list(split)[16:]
    picture = views.decode_picture(examples[2]["image"])
    changed = picture[:, ::-1] if damage == "flip" else np.roll(picture, 1, axis=1)
    examples[2]["image"] = views.encode_picture(np.ascontiguousarray(changed), "png")
    records.write_shard(path, records.token_features(info, split.label), examples)
    rows = build.verify(copy, weights)
    assert rows[0]["min"] >= least > rows[1]["min"]
    assert rows[1]["worst"].startswith(examples[2]["id"])


def test_another_teacher_is_refused(made, tmp_path):
    root, dataset, _, store = made
    other = random_teacher(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was built with the teacher"):
        build.verify(store, Teacher(weights=str(other)))
    with pytest.raises(UserError, match="was built with the teacher"):
        token_store(root, dataset, other, views=2)
    with pytest.raises(UserError, match="was built with codec int8"):
        token_store(root, dataset, root / "teacher", codec="float16")


def test_more_views_are_added_and_finished_shards_kept(made, tmp_path):
    _, dataset, teacher, store = made
    copy = shutil.copytree(store, tmp_path / "tokens")
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*array_record*")}
    token_store(tmp_path, dataset, teacher, views=3)
    assert list(records.open_builder(copy).info.splits) == ["view000", "view001", "view002"]
    assert len(before) == 4 and all(p.stat().st_mtime_ns == at for p, at in before.items())


def test_an_interrupted_build_goes_on_to_the_same_store(made, tmp_path, monkeypatch):
    _, dataset, teacher, store = made
    write = records.write_shard
    written = []

    def killed_at_the_third(path, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *args)

    monkeypatch.setattr(records, "write_shard", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        token_store(tmp_path, dataset, teacher, views=2)
    with pytest.raises(UserError, match="dataset_info.json"):
        records.Split(tmp_path / "tokens", "view000")
    with pytest.raises(UserError, match="was built with views"):  # not half one, half the other
        token_store(tmp_path, dataset, teacher, views=2, seed=1)
    monkeypatch.setattr(records, "write_shard", write)
    token_store(tmp_path, dataset, teacher, views=2)
    for path in store.glob("*array_record*"):
        assert (tmp_path / "tokens" / path.name).read_bytes() == path.read_bytes()


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
    info = records.StoreInfo.load(store)
    assert info.teacher["hash"] == build.Teacher(Teacher(weights=str(teacher))).hash
    assert info.source["examples"] == 20 and info.grid == (4, 4) and info.width == 24
    assert len(info.channel_scale) == 24 and 0.999 < info.cosine[0] <= info.cosine[1]
    assert json.loads((store / "dataset_info.json").read_text())["fileFormat"] == "array_record"


def test_pictures_larger_than_the_teachers_input(made, tmp_path):
    """The teacher resizes on the device; the student may be larger than it."""
    _, dataset, teacher, _ = made
    store = token_store(tmp_path, dataset, teacher, picture_size=32)
    split = records.Split(store, "view000")
    pictures = np.stack([views.decode_picture(split[i]["image"]) for i in range(4)])
    loaded = build.teacher_weights.load(str(teacher))
    expected = towers.teacher_tokens(loaded.tower, loaded.params, pictures)
    info = records.StoreInfo.load(store)
    stored = np.stack([split[i]["tokens"] for i in range(4)])
    decoded = token_codec.decode(stored, info.channel_scale)
    assert token_codec.cosines(decoded, np.asarray(expected)).min() > 0.999


def test_nothing_to_build_from(tmp_path):
    with pytest.raises(UserError, match=r"config.source is empty"):
        parse(Tokens, {})
    with pytest.raises(UserError, match="no such directory"):
        settings = {"source": str(tmp_path / "absent"), "teacher": {"weights": "x"}}
        build.build(parse(Tokens, settings), tmp_path / "out")
