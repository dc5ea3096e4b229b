"""Token codecs, pictures, and TFDS directories."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dgpt_jax import records, token_codec, views
from dgpt_jax.schema import UserError
from tests.data import image_dataset, smooth_image


def heavy_tailed(rng, shape=(64, 17, 48)):
    """Tokens as CLIP has them: a few channels thirty times the rest."""
    tokens = rng.standard_normal(shape).astype(np.float32)
    tokens[..., :3] *= 30
    return tokens


@pytest.mark.parametrize("codec,least", [("float16", 0.999999), ("int8", 0.999)])
def test_codec_cosines(codec, least):
    tokens = heavy_tailed(np.random.default_rng(0))
    scale = token_codec.channel_scale(tokens) if codec == "int8" else np.zeros(0)
    stored = token_codec.encode(tokens, codec, scale)
    assert stored.dtype == token_codec.CODECS[codec]
    assert token_codec.cosines(token_codec.decode(stored, scale), tokens).min() >= least


def test_the_channel_scale_keeps_ordinary_channels():
    tokens = heavy_tailed(np.random.default_rng(0))
    ordinary = []
    for scale in (token_codec.channel_scale(tokens), np.ones(tokens.shape[-1], np.float32)):
        decoded = token_codec.decode(token_codec.encode(tokens, "int8", scale), scale)
        ordinary.append(token_codec.cosines(decoded[..., 3:], tokens[..., 3:]).min())
    with_scale, without = ordinary
    assert with_scale > 0.999 and without < 0.98


def test_codec_of_zeros_and_of_nan():
    zeros = np.zeros((2, 3, 4), np.float32)
    scale = token_codec.channel_scale(zeros)
    assert not token_codec.encode(zeros, "int8", scale).any()
    with pytest.raises(UserError, match="not finite"):
        token_codec.encode(zeros + np.nan, "int8", scale)


@pytest.mark.parametrize("kind", ["jpeg95", "webp-lossless", "png"])
def test_pictures_round_trip(kind):
    picture = smooth_image(np.random.default_rng(0), 32, 32)
    decoded = views.decode_picture(views.encode_picture(picture, kind))
    error = np.abs(decoded.astype(int) - picture)
    assert error.max() == 0 if kind != "jpeg95" else 0 < error.mean() < 3


def test_undecodable_bytes():
    for data in (b"", b"not an image"):
        with pytest.raises(ValueError, match="no readable image"):
            views.decode_picture(data)


def test_tfds_itself_opens_what_we_write(tmp_path):
    path = image_dataset(tmp_path, per_class=5, shard_size=4)
    builder = tfds.builder_from_directory(str(path))
    source = builder.as_data_source("train")
    assert len(source) == 10 and builder.info.splits["train"].num_shards == 3
    assert source[9]["image"].shape == (24, 32, 3) and source[9]["label"] == 1
    assert builder.info.features["label"].names == ["a", "b"]
    ours = records.Split(path, "train")
    assert ours[9]["id"] == "b/004.png"
    assert np.array_equal(views.decode_picture(ours[9]["image"]), source[9]["image"])


def test_broken_directories(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        records.Split(tmp_path / "absent", "train")
    with pytest.raises(UserError, match="dataset_info.json"):
        records.Split(tmp_path, "train")
    path = image_dataset(tmp_path, per_class=5, shard_size=4)
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        records.Split(path, "test")
    shard = next(path.glob("*-00001-of-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        records.Split(path, "train")
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        records.Split(path, "train")


def test_tfrecord_is_named_with_the_conversion(tmp_path):
    path = image_dataset(tmp_path, per_class=2)
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="convert_format"):
        records.Split(path, "train")


def test_ids():
    assert records.example_id({"id": b"x"}) == "x"
    assert records.example_id({"file_name": "n01.JPEG"}) == "n01.JPEG"
    assert records.example_id({"image": b"abc"}) == "352441c2"
