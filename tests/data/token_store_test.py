"""Damaged shards, tokens and metadata of token stores: one-line errors that name them."""

import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from dgpt_jax.data import token_codec
from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, tfds_dataset
from tests.data.bad_records_test import batches, opened
from tests.support import stores


@pytest.fixture
def store(tmp_path):
    info = stores.store_info(grid=(8, 8), width=64)
    return stores.write(tmp_path / "tokens", [30, 30], views=2, info=info)


def shard_of(path, view=0, shard=0):
    return next(path.glob(f"tokens-view{view:03d}*-{shard:05d}-of-*"))


def flip(path, offset: int):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_every_flipped_byte_in_a_shard_is_detected(store):
    """The size is the same, so that only reading can detect them."""
    shard, errors = shard_of(store, view=1), 0
    content = shard.read_bytes()
    first = tfds_dataset.Split(store, "view001").raw(0)
    offset = content.index(first[100:200])
    offsets = [offset + i * len(first) // 2 for i in range(20)]
    for flipped in offsets:
        shard.write_bytes(content)
        flip(shard, flipped)
        examples = opened(store)
        for index in range(30):
            try:
                examples(0, index, epoch=1)
            except UserError as e:
                errors += 1
                assert re.search(
                    rf"Split\('{store}', 'view001'\): example {index} \(.*Corrupted.*hash", str(e)
                )
    assert errors == len(offsets) == 20
    assert opened(store)(0, 0, epoch=0)["tokens"].shape == (65, 64)


def test_truncated_shards(store):
    shard = shard_of(store, shard=1)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{shard} is damaged or truncated"):
        opened(store)
    shard.write_bytes(content)
    examples = opened(store)
    shard.write_bytes(content[: len(content) // 2])  # after it was checked
    with pytest.raises(UserError, match=rf"Split\('{store}', 'view000'\): example \d+ "):
        for index in range(60):
            examples(0, index)


def rewrite(path, change, index=7):
    """Rewrites the first shard of a store with changed tokens, and its manifest."""
    split = tfds_dataset.Split(path, "view000")
    features = tfds_dataset.open_builder(path).info.features
    loose = tfds.features.FeaturesDict(
        {name: features[name] for name in features if name != "tokens"}
        | {"tokens": tfds.features.Text()}
    )
    raw = [split.raw(i) for i in range(30)]
    example = split[index]
    example["tokens"] = change(example["tokens"]).tobytes()
    raw[index] = tfds_dataset.serializer(loose)(example)
    shard = shard_of(path)
    receipt = array_record_shards.write(shard, raw)
    infos = array_record_shards.manifest(path) | {shard.name: receipt}
    array_record_shards.write_manifest(path, infos)


def test_tokens_of_another_length(store):
    rewrite(store, lambda tokens: tokens[:-1])
    examples = opened(store)
    assert examples(0, 6)["tokens"].shape == (65, 64)
    with pytest.raises(UserError, match=r"view000'\): example 7 \(0/7\): .*features.json"):
        examples(0, 7)


@pytest.mark.parametrize("field", ["id", "image", "box"])
def test_missing_fields(store, field):
    split = tfds_dataset.Split(store, "view000")
    record = tf_example_pb2.Example.FromString(split.raw(7))
    del record.features.feature[field]
    split.raw = lambda _: record.SerializeToString()
    with pytest.raises(UserError, match=rf"example 7 \(.*\): .*features.json.*{field}"):
        split[7]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
def test_tokens_that_are_not_finite(tmp_path, value):
    info = stores.store_info("float16", grid=(8, 8), width=64)
    store = stores.write(tmp_path / "tokens", [30], info=info)

    def spoil(tokens):
        tokens = tokens.copy()
        tokens[33, 5] = value
        return tokens

    rewrite(store, spoil)
    with pytest.raises(UserError, match=r"example 7 \(0/7\): its tokens are not finite"):
        opened(store)(0, 7)


def test_is_finite_is_exact():
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    results = [token_codec.is_finite(values[i : i + 1]) for i in range(1 << 16)]
    np.testing.assert_array_equal(results, np.isfinite(values))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def lengths(change):
    def edited(content):
        content["splits"][0]["shardLengths"] = change(content["splits"][0]["shardLengths"])

    return edited


def teacher(**changes):
    return lambda content: content["teacher"].update(changes)


# File of a store, its change, the error message.
METADATA = [
    ("dataset_info.json", lengths(lambda _: ["29", "30"]), "30 records.* 29"),
    ("dataset_info.json", lengths(lambda old: old + ["30"]), "00003 is missing"),
    ("dataset_info.json", "{", "dataset_info.json or features.json cannot be read"),
    ("features.json", "[]", "dataset_info.json or features.json cannot be read"),
    ("token_store.json", "{", "token_store.json is damaged: JSONDecodeError"),
    ("token_store.json", "[]", "token_store.json is damaged"),
    ("token_store.json", lambda c: c["teacher"].pop("grid"), "token_store.json is damaged"),
    ("token_store.json", lambda c: c.update(x=1), "token_store.json is damaged.*json.x"),
    ("token_store.json", teacher(codec="int2"), "codec.*float16"),
    ("token_store.json", teacher(width="wide"), "width.*'wide'"),
    (
        "token_store.json",
        lambda c: c["teacher"].update(width=32),
        r"tokens are \(65, 32\) int8, by features",
    ),
    (
        "token_store.json",
        lambda c: c["teacher"].update(grid=[7, 7]),
        r"tokens are \(50, 64\) int8, by featu",
    ),
    (
        "token_store.json",
        lambda c: c["teacher"].update(codec="float16"),
        r"float16, by features.*64\) int8",
    ),
    (
        "token_store.json",
        lambda c: c["teacher"].update(channel_scale=[1]),
        "1 scales for 64 channels",
    ),
    (
        "token_store.json",
        lambda c: c["image"].update(height=9, width=9),
        r"image are \(9, 9, 3\) uint8",
    ),
    ("token_store.json", lambda c: c["image"].update(height=9), "9 x .* square"),
    ("token_store.json", lambda c: c["image"].update(channels=4), "channels must be one of 3"),
    ("token_store.json", lambda c: c["image"].update(dtype="uint16"), "dtype must be one of uint8"),
    ("token_store.json", lambda c: c.update(layout="map"), "layout must be one of crop"),
    ("token_store.json", lambda c: c.update(format=4), "format 4.* reads formats 2 and 3"),
    ("manifest.json", "{", "manifest.json is damaged: JSONDecodeError"),
    ("manifest.json", '{"tokens": {}}', "manifest.json is damaged"),
    ("manifest.json", "[1]", "manifest.json is damaged"),
]


@pytest.mark.parametrize("name,change,message", METADATA)
def test_metadata_that_contradict_the_shards(store, name, change, message):
    if isinstance(change, str):
        (store / name).write_text(change)
    else:
        edit(store / name, change)
    with pytest.raises(UserError, match=message) as caught:
        opened(store)
    assert str(store) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_records_of_token_stores_are_errors_by_default(store):
    rewrite(store, lambda tokens: tokens[:-1])
    with pytest.raises(UserError, match="example 7"):
        batches(opened(store), 15)
    examples = opened(store, bad_records="skip", max_bad_fraction=0.1)
    np.testing.assert_array_equal(examples(0, 7)["tokens"], examples(0, 8)["tokens"])
