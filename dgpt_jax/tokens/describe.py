"""Describes a token store or an image dataset: what it holds, from whom, and if it is complete."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax.data import bad_records, further_teachers, token_codec, token_store
from dgpt_jax.data.teacher_info import TeacherInfo
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, gcs, tfds_dataset
from dgpt_jax.storage.gcs import AnyPath

SAMPLE = 64  # records of which the bytes are measured
PREPROCESSING = ("image_size", "mean", "std")  # of the teacher's tower


def describe(path: AnyPath, *, check: bool = False) -> dict[str, Any]:
    """Returns a description, as JSON, of a token store (finished or not) or an image dataset.

    check: compares the checksums of all shards. Raises UserError if the path is neither.
    """
    gcs.require(path)
    directory = epath.Path(path)
    if not directory.exists():
        raise UserError(f"no such directory: {path}")
    stored = token_store.exists(path)
    info = StoreInfo.load(path) if stored else None
    kind = "token store" if stored else "image dataset"
    result: dict[str, Any] = {"path": str(path), "kind": kind} | (_store(info) if info else {})
    if info:
        names = further_teachers.names(path)
        result["further_teachers"] = [_further(path, name) for name in names]
    if info and not (directory / "dataset_info.json").exists():
        infos = array_record_shards.shard_infos(path)
        return result | {
            "complete": False,
            "shards": len(infos),
            "examples": sum(shard.records for shard in infos.values()),
            "bytes": sum(shard.bytes for shard in infos.values()),
            "finish": info.command,
        }
    opened = tfds_dataset.Opened(path)
    result |= _state(path, opened, stored, check)
    result["splits"] = [_split(opened, name) for name in opened.builder.info.splits]
    result["shards"] = sum(split["shards"] for split in result["splits"])
    result["bytes"] = sum(split["bytes"] for split in result["splits"])
    features: Any = opened.builder.info.features
    label = features["label"] if "label" in features else None
    result["classes"] = None if label is None else label.num_classes
    if result["complete"]:
        with contextlib.suppress(UserError):  # told as `readable`
            result["record_bytes"] = record_bytes(path, opened, info)
    return result


def _store(info: StoreInfo) -> dict[str, Any]:
    return {
        **_teacher(info.teacher),
        "image": {"size": info.image.height, "encoding": info.image.encoding},
        "views": info.views,
        "source": info.source,
        "format": info.format,
        "code_version": info.code_version,
        "command": info.command,
    }


def _teacher(teacher: TeacherInfo) -> dict[str, Any]:
    weights = teacher.weights
    tower = weights.get("tower") or {}
    item = np.dtype(token_codec.CODECS[teacher.codec]).itemsize
    return {
        "teacher": {key: weights.get(key) for key in ("name", "hash", "dtype", "width")}
        | {key: tower.get(key) for key in PREPROCESSING},
        "tokens": {
            "codec": teacher.codec,
            "count": teacher.tokens,
            "cls": teacher.cls,
            "grid": list(teacher.grid),
            "width": teacher.width,
            "pca": teacher.is_reduced,
            "cosine": {"least": teacher.cosine[0], "mean": teacher.cosine[1]},
            "variance": teacher.variance,
            "bytes": teacher.tokens * token_codec.stored_width(teacher.codec, teacher.width) * item,
        },
    }


def _further(store: AnyPath, name: str) -> dict[str, Any]:
    """Description of a further teacher: as of the first, size on disk, and its state."""
    info, directory = further_teachers.load(store, name), further_teachers.path_of(store, name)
    sizes = array_record_shards.sizes(directory)
    complete = (directory / "dataset_info.json").exists()
    return {
        "name": name,
        **_teacher(info.teacher),
        "bytes": sum(size for file, size in sizes.items() if "array_record" in file),
        "complete": complete,
        "command": info.command,
    }


def _state(path: AnyPath, opened: tfds_dataset.Opened, stored: bool, check: bool) -> dict[str, Any]:
    """complete: every shard has the size and count of the metadata. checksums: True or False if
    they were compared. readable: an example of each split is decoded; None for remote ones.
    problem: the first fault."""
    state: dict[str, Any] = {"complete": True, "checksums": None, "readable": None}
    try:
        if stored:
            token_store.check_features(path, opened.builder.info.features)
            StoreInfo.load(path).teacher.load_codec(path)
        for name in opened.builder.info.splits:
            opened.check(name)
    except UserError as e:
        return state | {"complete": False, "problem": str(e)}
    if check:
        with ThreadPoolExecutor(8) as pool:
            damaged = array_record_shards.damaged(path, opened.manifest, pool, check=True)
        state["checksums"] = not damaged if opened.manifest else None
        if damaged:
            state["problem"] = f"the checksum of {damaged[0]} differs"
    if opened.cache is None:
        state["readable"] = True
        try:
            for name in opened.builder.info.splits:
                sample(path, name, 1, opened)
        except UserError as e:
            state |= {"readable": False, "problem": str(e)}
    return state


def _split(opened: tfds_dataset.Opened, name: str) -> dict[str, Any]:
    info = opened.builder.info.splits[name]
    size = sum(opened.sizes.get(path.name, 0) for path in info.filepaths)
    return {"name": name, "examples": info.num_examples, "shards": info.num_shards, "bytes": size}


def sample(
    path: AnyPath, split: str, count: int, opened: tfds_dataset.Opened | None = None
) -> tuple[list[str], list[np.ndarray]]:
    """Returns (ids, decoded images) of `count` evenly spaced examples of a split; of a remote one,
    from its first shard. Raises UserError."""
    examples = tfds_dataset.Split(path, split, opened)
    names, images = [], []
    for index in _rows(examples, count):
        record = examples[index]
        images.append(bad_records.decode_image(examples, index, record))
        names.append(record["id"])
    examples.close()
    return names, images


def _rows(examples: tfds_dataset.Split, count: int) -> Sequence[int]:
    total = len(examples) if examples.cache is None else examples.shards[0].take
    count = min(count, total)
    return [i * total // count for i in range(count)]


def record_bytes(
    path: AnyPath, opened: tfds_dataset.Opened, info: StoreInfo | None
) -> dict[str, float | None]:
    """Mean bytes of a record of the first split: image, tokens, rest (id, box, label) and in total.

    Measured on a sample; of remote data, the total is that of the files, and image and rest are
    None. Raises UserError.
    """
    split = _split(opened, next(iter(opened.builder.info.splits)))
    tokens = _store(info)["tokens"]["bytes"] if info else 0
    if opened.cache is not None:
        total = split["bytes"] / max(split["examples"], 1)
        return {"total": total, "image": None, "tokens": tokens, "rest": None}
    examples = tfds_dataset.Split(path, split["name"], opened)
    records = [(len(examples.raw(i)), len(examples[i]["image"])) for i in _rows(examples, SAMPLE)]
    examples.close()
    total, image = np.mean(records, axis=0).tolist()
    return {"total": total, "image": image, "tokens": tokens, "rest": total - tokens - image}
