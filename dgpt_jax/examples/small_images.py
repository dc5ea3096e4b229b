"""Small images, a teacher and token stores for ablations, and the accuracy of frozen features."""

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import evaluate
from dgpt_jax.config import TokensConfig, TrainConfig, roots, schema
from dgpt_jax.data.ingest import importer
from dgpt_jax.distributed import sharding
from dgpt_jax.evals import ablations
from dgpt_jax.evals.feature_bank import FeatureBank
from dgpt_jax.examples import digits, image_sets, scenes, small_teacher
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.tokens import build

Encoder = Callable[[Any], jax.Array]  # images → features
# {split: (images, labels)}
Images = Mapping[str, tuple[np.ndarray, np.ndarray]]
PROTOCOLS = ("knn", "linear")
SHOTS = (5, 50, 0)  # labels per class; 0: all
SEEDS = (0, 1, 2)  # of the subsets of labels
MAX_BATCH = 512  # images of a forward pass


def say(text: str):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def read_splits(out: Path, kind: str) -> Images:
    """Test images of out/images, and those training images whose labels are used."""
    labelled = {"train": image_sets.SETS[kind].labelled, "test": ""}
    return {
        split: digits.read_images(out / "images", split, suffix)
        for split, suffix in labelled.items()
    }


def prepare(out: Path, kind: str, base: TrainConfig, views: Mapping[str, int]) -> Images:
    """Creates the missing ones of images, teacher and stores ({name: views}) below `out`.

    Stored views are drawn as `base.data` draws live ones.
    """
    image_set = image_sets.SETS[kind]
    image_sets.create_once(out / "pictures", partial(image_set.write, size=base.model.image_size))
    if not (out / "images/dataset_info.json").exists():
        importer.import_images(out / "pictures", out / "images", say=lambda _: None)
    if not (out / "teacher").exists():
        say("training the teacher (supervised: it sees the training labels)")
    train_teacher = partial(small_teacher.train, out / "images", recipe=image_set.teacher)
    image_sets.create_once(out / "teacher", train_teacher)
    for name, number in views.items():
        ready = (out / name / "dataset_info.json").exists()
        if not ready or len(tfds_dataset.open_builder(out / name).info.splits) < number:
            say(f"building {number} views of {name}")
            with (out / f"{name}.log").open("a") as log, contextlib.redirect_stderr(log):
                build.build(store_config(out, name, number, base), out / name)
    return read_splits(out, kind)


def store_config(out: Path, name: str, views: int, base: TrainConfig) -> TokensConfig:
    """Config of a store of ablations.STORES below `out`."""
    return schema.parse(
        TokensConfig,
        {
            "source": str(out / "images"),
            "teacher": {"weights": str(out / "teacher")},
            "views": views,
            "image_encoding": "png",
            "image_size": base.model.image_size,
            "crop_scale": base.data.crop_scale,
            "crop_ratio": base.data.crop_ratio,
            "flip": base.data.flip,
            "shard_size": 512,
            "platform": base.platform,
        }
        | ablations.STORES[name],
    )


def raw_pixels(images: np.ndarray | jax.Array, block: int = 1) -> jax.Array:
    """Luma of images, uint8 (N, size, size, 3), from 0 to 1, averaged over squares of `block`
    pixels: features (N, (size / block)²)."""
    luma = jnp.asarray(images, jnp.float32) @ jnp.asarray(scenes.LUMA, jnp.float32) / 255
    count, size, _ = luma.shape
    blocks = luma.reshape(count, size // block, block, size // block, block)
    return blocks.mean((2, 4)).reshape(count, -1)


def feature_banks(encode: Encoder, images: Images) -> dict[str, FeatureBank]:
    """{split: features and labels}"""
    mesh = sharding.make_mesh(roots.MeshConfig())
    return {
        split: FeatureBank.from_arrays(_encode(encode, pixels), labels, mesh)
        for split, (pixels, labels) in images.items()
    }


def _encode(encode: Encoder, pixels: np.ndarray) -> np.ndarray:
    """Features of all images, in equal batches."""
    parts = [pixels[start : start + MAX_BATCH] for start in range(0, len(pixels), MAX_BATCH)]
    padded = np.zeros((MAX_BATCH, *pixels.shape[1:]), pixels.dtype)
    features = []
    for part in parts:
        padded[: len(part)] = part
        features.append(np.asarray(encode(padded))[: len(part)])
    return np.concatenate(features)


def accuracies(
    splits: Mapping[str, FeatureBank],
    show: Callable[[int, int, dict], None] = lambda done, total, row: None,
) -> dict[tuple, list[float]]:
    """{(protocol, labels per class): accuracy on `test` in percent for each subset of labels}

    show: is given each row, and the number of rows so far and in all.
    """
    values: dict[tuple, list[float]] = {}
    done, total = 0, len(PROTOCOLS) * (len([shots for shots in SHOTS if shots]) * len(SEEDS) + 1)
    for protocol in PROTOCOLS:
        settings = schema.parse(
            roots.EvaluateConfig,
            dict(data="images", protocol=protocol, shots=SHOTS, seeds=SEEDS, k=(20,)),
        )
        for row in evaluate.measure(settings, splits["train"], splits["test"]):
            values.setdefault((protocol, row["shots"]), []).append(row["accuracy"])
            done += 1
            show(done, total, row)
    return values
