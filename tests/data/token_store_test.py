"""Damaged shards, tokens and metadata of a store: one line that names what is damaged."""

import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from dgpt_jax import records, shards, token_codec
from dgpt_jax.schema import UserError
from tests import stores
from tests.bad_records_test import batches, opened


@pytest.fixture
def store(tmp_path):
    info = stores.store_info(grid=(8, 8), width=64)
    return stores.write(tmp_path / "tokens", [30, 30], views=2, info=info)


def shard_of(path, view=0, shard=0):
    return next(path.glob(f"tokens-view{view:03d}*-{shard:05d}-of-*"))


def flip(path, place: int):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_flipped_bytes_within_a_shard(store):
    """The size is the same, so that opening does not see it; every single one is found."""
    shard, found = shard_of(store, view=1), 0
    whole = shard.read_bytes()
    first = records.Split(store, "view001").raw(0)
    place = whole.index(first[100:200])
    places = [place + i * len(first) // 2 for i in range(20)]
    for flipped in places:
        shard.write_bytes(whole)
        flip(shard, flipped)
        examples = opened(store)
        for index in range(30):
            try:
                examples(0, index, epoch=1)
            except UserError as e:
                found += 1
                assert re.search(
                    rf"Split\('{store}', 'view001'\): example {index} \(.*Corrupted.*hash", str(e)
                )
    assert found == len(places) == 20
    assert opened(store)(0, 0, epoch=0)["tokens"].shape == (65, 64)


def test_a_shard_that_is_cut_off(store):
    shard = shard_of(store, shard=1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{shard} is damaged or truncated"):
        opened(store)
    shard.write_bytes(whole)
    examples = opened(store)
    shard.write_bytes(whole[: len(whole) // 2])  # after it was checked
    with pytest.raises(UserError, match=rf"Split\('{store}', 'view000'\): example \d+ "):
        for index in range(60):
            examples(0, index)


def rewrite(path, change, index=7):
    """The first shard of a store with one record's fields changed; all else knows of it."""
    split = records.Split(path, "view000")
    features = records.open_builder(path).info.features
    loose = tfds.features.FeaturesDict(
        {name: features[name] for name in features if name != "tokens"}
        | {"tokens": tfds.features.Text()}
    )
    raw = [split.raw(i) for i in range(30)]
    example = split[index]
    example["tokens"] = change(example["tokens"]).tobytes()
    raw[index] = records.serializer(loose)(example)
    shard = shard_of(path)
    receipt = shards.write(shard, raw)
    known = shards.manifest(path) | {shard.name: receipt}
    shards.seal(path, known)


def test_tokens_of_another_length(store):
    rewrite(store, lambda tokens: tokens[:-1])
    examples = opened(store)
    assert examples(0, 6)["tokens"].shape == (65, 64)
    with pytest.raises(UserError, match=r"view000'\): example 7 \(0/7\): it is not as features"):
        examples(0, 7)


@pytest.mark.parametrize("field", ["id", "image", "box"])
def test_fields_that_are_missing(store, field):
    split = records.Split(store, "view000")
    record = tf_example_pb2.Example.FromString(split.raw(7))
    del record.features.feature[field]
    split.raw = lambda _: record.SerializeToString()
    with pytest.raises(UserError, match=rf"example 7 \(.*\): it is not as .*no value of {field}"):
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
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    found = [token_codec.is_finite(every[i : i + 1]) for i in range(1 << 16)]
    np.testing.assert_array_equal(found, np.isfinite(every))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def lengths(change):
    def edited(content):
        content["splits"][0]["shardLengths"] = change(content["splits"][0]["shardLengths"])

    return edited


# File of a store, what becomes of it, what is said.
METADATA = [
    ("dataset_info.json", lengths(lambda _: ["29", "30"]), "holds 30 records, the metadata say 29"),
    ("dataset_info.json", lengths(lambda old: old + ["30"]), "00003 is missing"),
    ("dataset_info.json", "{", "dataset_info.json or features.json cannot be read"),
    ("features.json", "[]", "dataset_info.json or features.json cannot be read"),
    ("token_store.json", "{", "token_store.json is damaged: JSONDecodeError"),
    ("token_store.json", "[]", "token_store.json is damaged: TypeError"),
    ("token_store.json", lambda c: c.pop("grid"), "token_store.json is damaged: TypeError"),
    ("token_store.json", lambda c: c.update(x=1), "damaged, or newer than this code: .*json.x"),
    ("token_store.json", lambda c: c.update(codec="int2"), "codec must be one of float16"),
    ("token_store.json", lambda c: c.update(width="wide"), "width must be int, got 'wide'"),
    ("token_store.json", lambda c: c.update(width=32), r"tokens are \(65, 32\) int8, by features"),
    ("token_store.json", lambda c: c.update(grid=[7, 7]), r"tokens are \(50, 64\) int8, by featu"),
    ("token_store.json", lambda c: c.update(codec="float16"), r"float16, by features.*64\) int8"),
    ("token_store.json", lambda c: c.update(channel_scale=[1]), "1 scales for 64 channels"),
    ("token_store.json", lambda c: c.update(picture_size=9), r"image are \(9, 9, 3\) uint8"),
    ("manifest.json", "{", "manifest.json is damaged: JSONDecodeError"),
    ("manifest.json", '{"tokens": {}}', "manifest.json is damaged"),
    ("manifest.json", "[1]", "manifest.json is damaged"),
]


@pytest.mark.parametrize("name,change,said", METADATA)
def test_metadata_that_do_not_fit_the_shards(store, name, change, said):
    if isinstance(change, str):
        (store / name).write_text(change)
    else:
        edit(store / name, change)
    with pytest.raises(UserError, match=said) as caught:
        opened(store)
    assert str(store) in str(caught.value) and "\n" not in str(caught.value)


def test_token_stores_have_no_bad_records_unless_asked(store):
    rewrite(store, lambda tokens: tokens[:-1])
    with pytest.raises(UserError, match="example 7"):
        batches(opened(store), 15)
    examples = opened(store, bad_records="skip", bad_most=0.1)
    np.testing.assert_array_equal(examples(0, 7)["tokens"], examples(0, 8)["tokens"])
