"""Embeddings hold load_encoder's features, in every format and from every source."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest import importer
from dgpt_jax.data.ingest.types import Columns
from dgpt_jax.errors import UserError
from dgpt_jax.evals.embedding import feature_batches, feature_store, run
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.weights import api
from dgpt_jax.weights.types import Preprocess
from tests.support import data, embeddings, image_forms
from tests.support.embeddings import FakeEncoder, contents
from tests.support.processes import on_devices


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of real images and an encoder."""
    root = tmp_path_factory.mktemp("embedding")
    embeddings.real_images(root / "images")
    embeddings.encoder_file(root / "encoder.safetensors")
    return root


@pytest.fixture(scope="module")
def encoder(root):
    return api.load_encoder(root / "encoder.safetensors")


@pytest.fixture(autouse=True, scope="module")
def compile_once():
    """Tests with the same encoder and options share its compiled program."""
    compiled = {}

    def cached(encoder, *options):
        key = (id(encoder), *options)  # the encoder is kept, so that its id is not used again
        if key not in compiled:
            compiled[key] = encoder, feature_batches.Encoder(encoder, *options)
        return compiled[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Encoder", cached)
        yield


def embed(src, encoder, out, **options):
    options = dict(batch_size=4, shard_size=8, threads=2) | options
    return run.embed(src, encoder, out, say=lambda _: None, **options)


@pytest.mark.parametrize("tokens", feature_store.TOKENS)
@pytest.mark.parametrize("to", feature_store.FORMATS)
def test_the_features_of_load_encoder(root, encoder, tmp_path, to, tokens):
    info = embed(root / "images", encoder, tmp_path / "out", to=to, tokens=tokens)
    files = sorted((root / "images").rglob("*.png"))
    ids, labels, features, _ = contents(tmp_path / "out")
    assert ids == [f"{path.parent.name}/{path.name}" for path in files]
    classes = ("china", "digits", "flower")
    assert [classes[label] for label in labels] == [path.parent.name for path in files]
    assert features.dtype == np.float32 and features.shape[1:] == tuple(info.shape)
    expected = embeddings.expected(encoder, files, tokens)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert info.splits == {"train": {"rows": len(files), "unreadable": []}}
    assert not list((tmp_path / "out").glob(".*"))


DTYPES = [
    ("npy", "float16"), ("parquet", "float16"), ("safetensors", "float16"), ("store", "float16"),
    ("safetensors", "bfloat16"), ("store", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("to,dtype", DTYPES)
def test_other_dtypes_are_rounded_once(root, encoder, tmp_path, to, dtype):
    exact = embeddings.expected(encoder, sorted((root / "images").rglob("*.png")), "mean")
    embed(root / "images", encoder, tmp_path / "out", to=to, tokens="mean", dtype=dtype)
    features = contents(tmp_path / "out").features
    assert features.dtype.name == dtype
    bound = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(np.float32(features), exact, rtol=1.01 * bound, atol=1e-6)


@pytest.mark.parametrize("to", ["npy", "parquet"])
def test_formats_without_bfloat16(root, encoder, tmp_path, to):
    with pytest.raises(UserError) as caught:
        embed(root / "images", encoder, tmp_path / "out", to=to, dtype="bfloat16")
    assert "--dtype=bfloat16" in str(caught.value) and not (tmp_path / "out").exists()


SOURCES = {
    "folder": (image_forms.write_folder, ()),
    "zip": (lambda path, x: image_forms.write_zip(path.with_suffix(".zip"), x), ()),
    "parquet": (lambda path, x: image_forms.write_parquet(path, x, 2, rows=3), ("caption",)),
    "webdataset": (image_forms.write_shards, ("caption",)),
    "tfrecord": (image_forms.write_tfrecord, ("caption",)),
}


@pytest.mark.parametrize("form", SOURCES)
def test_sources_give_the_same_rows(encoder, tmp_path, form):
    """A source, and the dataset that is imported from it; both continued from a second shard."""
    samples = image_forms.samples(11)
    write, keep = SOURCES[form]
    src, columns = write(tmp_path / "src", samples), Columns(keep=keep)
    importer.import_images(src, tmp_path / "imported", columns=columns, say=lambda _: None)
    embed(src, encoder, tmp_path / "a", to="store", columns=columns)
    embed(tmp_path / "imported", encoder, tmp_path / "b", to="npy")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert (a.ids, a.labels, a.texts) == (b.ids, b.labels, b.texts)
    np.testing.assert_array_equal(a.features, b.features)
    by_key = {x.key: x for x in samples}
    rows = [by_key[i.rpartition("/")[2].removesuffix(".png")] for i in a.ids]
    assert len(rows) == len(samples)
    assert [image_forms.CLASSES[i] for i in a.labels] == [
        image_forms.CLASSES[x.label] for x in rows
    ]
    assert a.texts == ({"caption": [x.caption for x in rows]} if keep else {})
    crops = np.stack([image_ops.resize(image_ops.decode_image(x.png), 16, 16) for x in rows])
    np.testing.assert_allclose(a.features, encoder.features(crops), rtol=0, atol=1e-5)


def test_all_splits_or_one(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Encoder", FakeEncoder)
    for split, seed in (("train", 0), ("val", 1)):
        data.write_folder(tmp_path / "src", 3, split=split, seed=seed)
    importer.import_images(tmp_path / "src", tmp_path / "imported", say=lambda _: None)
    for src in (tmp_path / "src", tmp_path / "imported"):
        every, one = tmp_path / f"{src.name}-all", tmp_path / f"{src.name}-val"
        assert [*embed(src, encoder, every).splits] == ["train", "val"]
        assert [*embed(src, encoder, one, split="val").splits] == ["val"]
        np.testing.assert_array_equal(contents(every, "val")[2], contents(one, "val")[2])
        with pytest.raises(UserError) as caught:
            embed(src, encoder, tmp_path / "x", split="test")
        assert "test" in str(caught.value) and "train, val" in str(caught.value)
    embed(tmp_path / "imported", encoder, tmp_path / "slice", split="train[2:4]")
    np.testing.assert_array_equal(
        contents(tmp_path / "slice")[2], contents(tmp_path / "imported-all")[2][2:4]
    )


def test_crops_of_a_token_store(tmp_path):
    """Stored crops are used as they are, or resized to another encoder's input."""
    dataset = data.image_dataset(tmp_path, per_class=3)
    store = data.token_store(tmp_path, dataset, data.random_teacher(tmp_path / "teacher"))
    crops = [image_ops.decode_image(x["image"]) for x in tfds_dataset.Split(store, "view000")]
    for size in (16, 24):
        path = embeddings.encoder_file(tmp_path / f"{size}.safetensors", image_size=size)
        encoder = api.load_encoder(path)
        info = embed(store, encoder, tmp_path / f"out{size}", to="store")
        assert info.preprocessing["mode"] == "stored crop" and info.classes == ("a", "b")
        resized = np.stack([image_ops.resize(crop, size, size) for crop in crops])
        features = contents(tmp_path / f"out{size}", "view000").features
        np.testing.assert_allclose(features, encoder.features(resized), rtol=0, atol=1e-5)


def test_a_resized_and_cropped_view(tmp_path):
    """Of an encoder with crop_pct 0.875 and mode center."""
    preprocess = Preprocess(crop_pct=0.8, interpolation="bilinear")
    path = embeddings.encoder_file(tmp_path / "e.safetensors", preprocess=preprocess)
    encoder, lines = api.load_encoder(path), []
    src = embeddings.real_images(tmp_path / "images", tiles=2, digits=1)
    info = run.embed(src, encoder, tmp_path / "out", say=lines.append)
    files = sorted(src.rglob("*.png"))
    crops = [
        image_ops.center_crop(image_ops.decode_image(p.read_bytes()), 20, 16, squash=False)
        for p in files
    ]
    features = contents(tmp_path / "out").features
    np.testing.assert_allclose(features, encoder.features(np.stack(crops)), rtol=0, atol=1e-5)
    assert (info.preprocessing["resize"], info.preprocessing["mode"]) == (20, "center")
    assert any("bilinear" in line for line in lines)


def test_batches_change_only_rounding(root, encoder, tmp_path):
    for size in (3, 64):
        embed(root / "images", encoder, tmp_path / f"{size}", batch_size=size)
    a, b = (contents(tmp_path / name).features for name in ("3", "64"))
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(a).max())


def embed_for_devices(root: str, out: str):
    embed(f"{root}/images", api.load_encoder(f"{root}/encoder.safetensors"), out, tokens="all")


def test_eight_devices_give_the_same_features(root, encoder, tmp_path):
    embed(root / "images", encoder, tmp_path / "one", tokens="all")
    on_devices(8, embed_for_devices, str(root), str(tmp_path / "eight"))
    np.testing.assert_array_equal(
        contents(tmp_path / "one").features, contents(tmp_path / "eight").features
    )


def test_unreadable_user_images_are_left_out(encoder, tmp_path):
    src = embeddings.real_images(tmp_path / "images", tiles=5, digits=3)
    (src / "china/002.png").write_bytes(b"no image")
    (src / "flower/001.png").write_bytes((src / "flower/001.png").read_bytes()[:200])
    info = embed(src, encoder, tmp_path / "out")
    bad = {"china/002.png", "flower/001.png"}
    unreadable = info.splits["train"]["unreadable"]
    assert {line.partition(": ")[0] for line in unreadable} == bad
    files = [p for p in sorted(src.rglob("*.png")) if f"{p.parent.name}/{p.name}" not in bad]
    ids, _, features, _ = contents(tmp_path / "out")
    assert ids == [f"{p.parent.name}/{p.name}" for p in files]
    expected = embeddings.expected(encoder, files, "cls")
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
    for path in src.rglob("*.png"):
        path.write_bytes(b"none")
    with pytest.raises(UserError) as caught:
        embed(src, encoder, tmp_path / "none")
    assert "none of 13 images" in str(caught.value) and not (tmp_path / "none").exists()


@pytest.mark.parametrize("to", ["npy", "store"])
def test_unreadable_images_of_a_dataset_have_a_limit(encoder, tmp_path, monkeypatch, to):
    monkeypatch.setattr(run, "Encoder", FakeEncoder)
    features = tfds_dataset.image_features(None)
    serialize = tfds_dataset.serializer(features)
    png = image_forms.samples(1)[0].png
    examples = [{"id": f"{i}", "image": b"bad" if i == 3 else png} for i in range(10)]
    path = tfds_dataset.shard_path(tmp_path / "in", "train", 0, 1)
    path.parent.mkdir()
    shard = array_record_shards.write(path, map(serialize, examples))
    tfds_dataset.write_metadata(tmp_path / "in", features, {"train": [shard]})
    with pytest.raises(UserError) as caught:
        embed(tmp_path / "in", encoder, tmp_path / "out", to=to)
    assert "--max_bad_fraction=0.001" in str(caught.value) and "3:" in str(caught.value)
    info = embed(tmp_path / "in", encoder, tmp_path / "out", to=to, max_bad_fraction=0.1)
    assert info.splits["train"]["rows"] == 9 and len(info.splits["train"]["unreadable"]) == 1
    assert contents(tmp_path / "out").ids == [f"{i}" for i in range(10) if i != 3]


def test_features_that_are_not_finite(root, tmp_path):
    """Broken weights, and an overflow in float16 alone."""
    path = embeddings.encoder_file(tmp_path / "e.safetensors")
    encoder = api.load_encoder(path)
    encoder.params["norm"]["scale"] = encoder.params["norm"]["scale"] * 1e6
    with pytest.raises(UserError) as caught:
        embed(root / "images", encoder, tmp_path / "half", dtype="float16")
    assert "--dtype=float16" in str(caught.value)
    embed(root / "images", encoder, tmp_path / "single")
    encoder = api.load_encoder(path)
    encoder.params["norm"]["bias"] = encoder.params["norm"]["bias"] * np.nan
    with pytest.raises(UserError) as caught:
        embed(root / "images", encoder, tmp_path / "nan")
    assert "not finite" in str(caught.value)


def test_an_image_whose_features_are_not_finite(root, encoder, tmp_path, monkeypatch):
    """Named, although those of a black image are finite."""

    class Broken(FakeEncoder):
        def start(self, images):
            features, finite = super().start(images)
            finite[1] = False
            return features, finite

    monkeypatch.setattr(run, "Encoder", Broken)
    with pytest.raises(UserError) as caught:
        embed(root / "images", encoder, tmp_path / "out")
    assert "china/001.png" in str(caught.value)


def test_tfds_opens_a_store(root, encoder, tmp_path):
    embed(root / "images", encoder, tmp_path / "out", to="store")
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert builder.info.splits["train"].num_examples == 30
    source = builder.as_data_source("train")
    features = np.stack([source[i]["features"] for i in range(len(source))])
    np.testing.assert_array_equal(features, contents(tmp_path / "out").features)
