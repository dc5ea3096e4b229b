"""Token stores written directly, without images or a teacher."""

import os
from pathlib import Path

import numpy as np
from etils import epath

from dgpt_jax import records, shards, token_codec, token_store, views


def store_info(
    codec="int8", *, grid=(2, 2), cls=True, width=4, picture_size=16
) -> token_store.StoreInfo:
    return token_store.StoreInfo(
        name="store",
        codec=codec,
        grid=grid,
        cls=cls,
        width=width,
        channel_scale=() if codec == "float16" else (1.0,) * width,
        cosine=(1.0, 1.0),
        variance=1.0,
        example_bytes=100.0,
        picture_size=picture_size,
        picture="jpeg95",
        teacher={"width": width},
        source={},
        views={},
        command="python tools/build_tokens.py --out=HERE",
        code_version="test",
    )


def serialized(info: token_store.StoreInfo, names, seed: int = 0):
    """A stored record for each name: random tokens and a random picture, the same for a name."""
    features = token_store.features(info, None)
    shape = (info.tokens, token_codec.stored_width(info.codec, info.width))
    size = info.picture_size
    for number, name in enumerate(names):
        rng = np.random.default_rng((seed, number))
        picture = rng.integers(0, 256, (size // 8 or 1, size // 8 or 1, 3), np.uint8)
        tokens = rng.integers(0, 100, shape).astype(token_codec.CODECS[info.codec])
        yield features.serialize_example(
            {
                "id": name,
                "image": views.encode_picture(views.resize(picture, size, size), info.picture),
                "tokens": tokens,
                "box": np.zeros(4, np.int32),
                "flip": np.int32(0),
            }
        )


def write(directory, lengths, *, views: int = 1, info=None) -> Path:
    """A store of small records named "view/index", in shards of `lengths` records."""
    info = info or store_info()
    epath.Path(directory).mkdir(parents=True, exist_ok=True)
    info.save(directory)
    written: dict[str, list[shards.Receipt]] = {}
    known = {}
    for view in range(views):
        split, start = token_store.view_split(view), 0
        written[split] = []
        for shard, length in enumerate(lengths):
            path = records.shard_path(directory, split, shard, len(lengths))
            names = [f"{view}/{i}" for i in range(start, start + length)]
            receipt = shards.write(path, serialized(info, names, seed=start + 1000 * view))
            known[path.name] = receipt
            written[split].append(receipt)
            start += length
    records.write_metadata(directory, token_store.features(info, None), written)
    shards.seal(directory, known)
    return directory


def write_linked(directory, *, examples: int, shard_size: int, views: int) -> Path:
    """A store of many examples whose shards of one length are one file under many names."""
    directory.mkdir()
    info = store_info(grid=(1, 1), cls=False, picture_size=8)
    info.save(directory)
    lengths = [shard_size] * (examples // shard_size)
    if examples % shard_size:
        lengths.append(examples % shard_size)
    kinds = {}
    for length in set(lengths):
        (record,) = serialized(info, ["x"])
        path = directory / f"length{length}"
        kinds[length] = path, shards.write(path, (record for _ in range(length)))
    known, written = {}, {}
    for view in range(views):
        split = token_store.view_split(view)
        for shard, length in enumerate(lengths):
            path = records.shard_path(directory, split, shard, len(lengths))
            os.link(kinds[length][0], path)
            known[path.name] = kinds[length][1]
        written[split] = [kinds[length][1] for length in lengths]
    for path, _ in kinds.values():
        path.unlink()
        shards.forget(path)
    records.write_metadata(directory, token_store.features(info, None), written)
    shards.seal(directory, known)
    return directory


def names(batches, directory, *, views: int = 1) -> list[list[str]]:
    """The "view/index" of every example in batches from a store that `write` wrote."""
    known = {}
    for view in range(views):
        for example in records.Split(directory, token_store.view_split(view)):
            known[example["tokens"].tobytes()] = example["id"]
    return [[known[tokens.tobytes()] for tokens in batch["tokens"]] for batch in batches]
