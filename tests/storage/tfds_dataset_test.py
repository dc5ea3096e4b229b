"""Token codecs, image encodings and TFDS directories."""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dgpt_jax.data import image_ops, token_codec
from dgpt_jax.errors import UserError
from dgpt_jax.storage import tfds_dataset
from tests.support.data import image_dataset, smooth_image


def heavy_tailed(rng, shape=(64, 17, 48)):
    """Tokens like CLIP's, with a few channels thirty times larger than the rest."""
    tokens = rng.standard_normal(shape).astype(np.float32)
    tokens[..., :3] *= 30
    return tokens


@pytest.mark.parametrize("name,least", [("float16", 0.999999), ("int8", 0.999), ("int4", 0.85)])
def test_codec_cosines(name, least):
    tokens = heavy_tailed(np.random.default_rng(0))
    codec, variance = token_codec.fit(tokens[:32], name)
    stored = codec.encode(tokens)
    assert stored.dtype == token_codec.CODECS[name] and variance == 1
    assert stored.shape[-1] == token_codec.stored_width(name, 48) == (24 if name == "int4" else 48)
    cosine = token_codec.cosines(codec.decode(stored), tokens)
    assert cosine.min() >= least and (name != "int4" or np.median(cosine) > 0.992)


@pytest.mark.parametrize("name,least,without", [("int8", 0.999, 0.98), ("int4", 0.96, 0.3)])
def test_the_channel_scale_keeps_ordinary_channels(name, least, without):
    tokens = heavy_tailed(np.random.default_rng(0))
    fitted, _ = token_codec.fit(tokens, name)
    for codec, is_expected in (
        (fitted, lambda cosine: cosine > least),
        (replace(fitted, scale=np.ones(48, np.float32)), lambda cosine: cosine < without),
    ):
        decoded = np.asarray(codec.decode(codec.encode(tokens)))
        assert is_expected(token_codec.cosines(decoded[..., 3:], tokens[..., 3:]).min())


def test_zeros_stay_zeros():
    zeros = np.zeros((2, 3, 4), np.float32)
    for name in token_codec.CODECS:
        codec, _ = token_codec.fit(zeros, name)
        assert not np.asarray(codec.decode(codec.encode(zeros))).any()


def test_pca_reports_the_explained_variance():
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((64, 17, 6)) @ rng.standard_normal((6, 48))
    tokens = (tokens + 0.01 * rng.standard_normal(tokens.shape)).astype(np.float32)
    codec, variance = token_codec.fit(tokens, "int8", pca=6)
    assert codec.basis.shape == (48, 6) and 0.999 < variance < 1
    np.testing.assert_allclose(codec.basis.T @ codec.basis, np.eye(6), atol=1e-5)
    decoded = np.asarray(codec.decode(codec.encode(tokens)))
    restored = decoded @ codec.basis.T  # in all channels
    assert token_codec.cosines(restored, tokens).min() > 0.999
    few, less = token_codec.fit(tokens, "float16", pca=3)
    assert less < variance and few.encode(tokens).shape == (64, 17, 3)
    for pca in (0, 49):
        with pytest.raises(UserError, match=f"config.pca={pca} .*48"):
            token_codec.fit(tokens, "int8", pca=pca)
    with pytest.raises(UserError, match="int4 .* 3"):
        token_codec.fit(tokens, "int4", pca=3)


@pytest.mark.parametrize("kind", ["jpeg95", "webp-lossless", "png"])
def test_images_round_trip(kind):
    image = smooth_image(np.random.default_rng(0), 32, 32)
    decoded = image_ops.decode_image(image_ops.encode_image(image, kind))
    error = np.abs(decoded.astype(int) - image)
    assert error.max() == 0 if kind != "jpeg95" else 0 < error.mean() < 3


def test_undecodable_bytes():
    for data in (b"", b"not an image"):
        with pytest.raises(ValueError, match="image"):
            image_ops.decode_image(data)


def test_tfds_opens_our_datasets(tmp_path):
    path = image_dataset(tmp_path, per_class=5, shard_size=4)
    builder = tfds.builder_from_directory(str(path))
    source = builder.as_data_source("train")
    assert len(source) == 10 and builder.info.splits["train"].num_shards == 3
    assert source[9]["image"].shape == (24, 32, 3) and source[9]["label"] == 1
    assert builder.info.features["label"].names == ["a", "b"]
    split = tfds_dataset.Split(path, "train")
    assert split[9]["id"] == "b/004.png"
    assert np.array_equal(image_ops.decode_image(split[9]["image"]), source[9]["image"])


def test_broken_directories(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        tfds_dataset.Split(tmp_path / "absent", "train")
    with pytest.raises(UserError, match="dataset_info.json"):
        tfds_dataset.Split(tmp_path, "train")
    path = image_dataset(tmp_path, per_class=5, shard_size=4)
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        tfds_dataset.Split(path, "test")
    shard = next(path.glob("*-00001-of-*"))
    original = shard.read_bytes()
    shard.write_bytes(original[: len(original) // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        tfds_dataset.Split(path, "train")
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        tfds_dataset.Split(path, "train")


def test_tfrecord_is_refused_with_the_conversion_command(tmp_path):
    path = image_dataset(tmp_path, per_class=2)
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="import_images.py"):
        tfds_dataset.Split(path, "train")
