"""Token stores written directly, without images or a teacher."""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax.config.data import FIRST
from dgpt_jax.data import (
    further_teachers,
    image_ops,
    teacher_info,
    token_codec,
    token_store,
)
from dgpt_jax.data.further_teachers import FurtherTeacher
from dgpt_jax.storage import array_record_shards, tfds_dataset


def store_info(
    codec="int8", *, grid=(2, 2), cls=True, width=4, image_size=16
) -> token_store.StoreInfo:
    return token_store.StoreInfo(
        name="store",
        image=token_store.StoredImages(image_size, image_size, "jpeg95"),
        teacher=teacher_info.TeacherInfo(
            name=FIRST,
            weights={"width": width},
            codec=codec,
            grid=grid,
            cls=cls,
            width=width,
            channel_scale=() if codec == "float16" else (1.0,) * width,
            cosine=(1.0, 1.0),
            variance=1.0,
        ),
        example_bytes=100.0,
        source={},
        views={},
        command="python tools/build_tokens.py --out=HERE",
        code_version="test",
    )


def serialized(info: token_store.StoreInfo, names, seed: int = 0):
    """Yields a record per name with random tokens and a random image, reproducible by position."""
    features = token_store.features(info, None)
    shape = info.teacher.feature().shape
    size = info.image.height
    for number, name in enumerate(names):
        rng = np.random.default_rng((seed, number))
        coarse = rng.integers(0, 256, (size // 8 or 1, size // 8 or 1, 3), np.uint8)
        tokens = rng.integers(0, 100, shape).astype(token_codec.CODECS[info.teacher.codec])
        yield features.serialize_example(
            {
                "id": name,
                "image": image_ops.encode_image(
                    image_ops.resize(coarse, size, size), info.image.encoding
                ),
                "tokens": tokens,
                "box": np.zeros(4, np.int32),
                "flip": np.int32(0),
            }
        )


def write(directory, lengths, *, views: int = 1, info=None) -> Path:
    """Writes a store of small records named "view/index", in shards of `lengths` records."""
    info = info or store_info()
    epath.Path(directory).mkdir(parents=True, exist_ok=True)
    info.save(directory)
    splits: dict[str, list[array_record_shards.ShardInfo]] = {}
    manifest = {}
    for view in range(views):
        split, start = token_store.view_split(view), 0
        splits[split] = []
        for shard, length in enumerate(lengths):
            path = tfds_dataset.shard_path(directory, split, shard, len(lengths))
            names = [f"{view}/{i}" for i in range(start, start + length)]
            shard_info = array_record_shards.write(
                path, serialized(info, names, seed=start + 1000 * view)
            )
            manifest[path.name] = shard_info
            splits[split].append(shard_info)
            start += length
    tfds_dataset.write_metadata(directory, token_store.features(info, None), splits)
    array_record_shards.write_manifest(directory, manifest)
    return directory


def write_teacher(store, name: str, *, width: int = 6) -> Path:
    """Writes random tokens of a further teacher for a store of `write`."""
    directory = further_teachers.path_of(store, name)
    directory.mkdir(parents=True)
    opened = tfds_dataset.Opened(store)
    views = [tfds_dataset.Split(store, view, opened) for view in opened.builder.info.splits]
    teacher = dataclasses.replace(store_info(width=width).teacher, name=name)
    info = FurtherTeacher(teacher, tuple(v.digest for v in views), 100.0, "build it", "test")
    info.save(directory)
    features = further_teachers.features(info)
    splits: dict[str, list[array_record_shards.ShardInfo]] = {}
    manifest = {}
    for view in views:
        ids, splits[view.split] = iter([example["id"] for example in view]), []
        for i, shard in enumerate(view.shards):
            path = tfds_dataset.shard_path(directory, view.split, i, len(view.shards), name)
            records = [
                features.serialize_example({"id": key, "tokens": _tokens(teacher, name + key)})
                for key in itertools.islice(ids, shard.take)
            ]
            manifest[path.name] = array_record_shards.write(path, records)
            splits[view.split].append(manifest[path.name])
    tfds_dataset.write_metadata(directory, features, splits, name)
    array_record_shards.write_manifest(directory, manifest)
    return Path(directory)


def _tokens(teacher: teacher_info.TeacherInfo, seed: str) -> np.ndarray:
    rng = np.random.default_rng(list(seed.encode()))
    shape: Any = teacher.feature().shape
    return rng.integers(0, 100, shape).astype(np.int8)


def write_linked(directory, *, examples: int, shard_size: int, views: int) -> Path:
    """Writes a store of many examples; all shards of one length are links to one file."""
    directory.mkdir()
    info = store_info(grid=(1, 1), cls=False, image_size=8)
    info.save(directory)
    lengths = [shard_size] * (examples // shard_size)
    if examples % shard_size:
        lengths.append(examples % shard_size)
    kinds = {}
    for length in set(lengths):
        (record,) = serialized(info, ["x"])
        path = directory / f"length{length}"
        kinds[length] = path, array_record_shards.write(path, (record for _ in range(length)))
    manifest, splits = {}, {}
    for view in range(views):
        split = token_store.view_split(view)
        for shard, length in enumerate(lengths):
            path = tfds_dataset.shard_path(directory, split, shard, len(lengths))
            os.link(kinds[length][0], path)
            manifest[path.name] = kinds[length][1]
        splits[split] = [kinds[length][1] for length in lengths]
    for path, _ in kinds.values():
        path.unlink()
        array_record_shards.invalidate(path)
    tfds_dataset.write_metadata(directory, token_store.features(info, None), splits)
    array_record_shards.write_manifest(directory, manifest)
    return directory


def names(batches, directory, *, views: int = 1) -> list[list[str]]:
    """Names "view/index" of all examples in batches from a store of `write`."""
    ids = {}
    for view in range(views):
        for example in tfds_dataset.Split(directory, token_store.view_split(view)):
            ids[example["tokens"].tobytes()] = example["id"]
    return [[ids[tokens.tobytes()] for tokens in batch["tokens"]] for batch in batches]


def write_ids(directory, ids, *, views=2, shard_size=4, classes=("a", "b"), info=None) -> Path:
    """Writes a store with these ids in every view, and labels that repeat 0, 1, … (without classes:
    none)."""
    directory = Path(directory)
    info = info or store_info()
    label = tfds.features.ClassLabel(names=list(classes)) if classes else None
    views_info = {"seed": 0, "crop_scale": [0.2, 1.0], "crop_ratio": [0.75, 1.25], "flip": True}
    source = {"name": "images", "version": "1.0.0", "split": "train", "digest": "0", "examples": 1}
    info = dataclasses.replace(
        info, name=directory.name, views=views_info | {"shard_size": shard_size}, source=source
    )
    directory.mkdir(parents=True)
    info.save(directory)
    features = token_store.features(info, label)
    serialize = tfds_dataset.serializer(features)
    shape = info.teacher.feature().shape
    encoded = image_ops.encode_image(np.zeros((info.image.height,) * 2 + (3,), np.uint8), "jpeg95")

    def record(view: int, i: int) -> bytes:
        rng = np.random.default_rng((view, *ids[i].encode()))
        tokens = rng.integers(0, 100, shape).astype(token_codec.CODECS[info.teacher.codec])
        box = np.array([view, i, 8, 8], np.int32)
        example = {"id": ids[i], "image": encoded, "tokens": tokens, "box": box, "flip": 0}
        return serialize(example | ({"label": i % len(classes)} if classes else {}))

    splits, manifest = {}, {}
    starts = range(0, len(ids), shard_size)
    for view in range(views):
        split = token_store.view_split(view)
        for shard, start in enumerate(starts):
            path = tfds_dataset.shard_path(directory, split, shard, len(starts), info.name)
            rows = range(start, min(start + shard_size, len(ids)))
            manifest[path.name] = array_record_shards.write(path, (record(view, i) for i in rows))
            splits.setdefault(split, []).append(manifest[path.name])
    tfds_dataset.write_metadata(directory, features, splits, info.name)
    array_record_shards.write_manifest(directory, manifest)
    return directory
