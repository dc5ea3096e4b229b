"""Small real images, a teacher, token stores, and the accuracy of frozen features.

Shared by tools/studies/quickstart.py and tools/studies/ablate.py.
"""

import contextlib
import shutil
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
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.tokens import build
from tools.studies import digits, glyphs

# Functions that write folder/{train,test}/CLASS/… with files of size×size pixels.
WRITERS = {"digits": digits.write_digits, "glyphs": glyphs.write_glyphs}
TEACHER_STEPS = 600
Encoder = Callable[[Any], jax.Array]  # images → features
# {split: (images, labels)}
Images = Mapping[str, tuple[np.ndarray, np.ndarray]]


def say(text: str):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def create_once(path: Path, write: Callable[[Path], None]):
    """Creates `path` atomically by `write(temporary path)`, unless it exists."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        temporary.rename(path)


def train_teacher_once(out: Path, steps: int):
    """Trains out/teacher on out/images, unless it exists."""
    if not (out / "teacher").exists():
        say("training the teacher (supervised: it sees the training labels)")
    create_once(out / "teacher", partial(digits.train_teacher, out / "images", steps=steps))


def read_splits(out: Path) -> Images:
    return {split: digits.read_images(out / "images", split) for split in ("train", "test")}


def prepare(out: Path, kind: str, base: TrainConfig, views: Mapping[str, int]) -> Images:
    """Creates the missing ones of images, teacher and stores ({name: views}) below `out`.

    Stored views are drawn as `base.data` draws live ones.
    """
    create_once(out / "pictures", partial(WRITERS[kind], size=base.model.image_size))
    if not (out / "images/dataset_info.json").exists():
        importer.import_images(out / "pictures", out / "images", say=lambda _: None)
    train_teacher_once(out, TEACHER_STEPS)
    for name, number in views.items():
        ready = (out / name / "dataset_info.json").exists()
        if not ready or len(tfds_dataset.open_builder(out / name).info.splits) < number:
            say(f"building {number} views of {name}")
            with (out / f"{name}.log").open("a") as log, contextlib.redirect_stderr(log):
                build.build(store_config(out, name, number, base), out / name)
    return read_splits(out)


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


def raw_pixels(images: np.ndarray | jax.Array) -> jax.Array:
    """Pixels of gray images, uint8 (N, size, size, 3), as features (N, size²)."""
    return jnp.asarray(images[..., 0], jnp.float32).reshape(len(images), -1) / 255


def feature_banks(encode: Encoder, images: Images) -> dict[str, FeatureBank]:
    """{split: features and labels}"""
    mesh = sharding.make_mesh(roots.MeshConfig())
    return {
        split: FeatureBank.from_arrays(np.asarray(encode(pixels)), labels, mesh)
        for split, (pixels, labels) in images.items()
    }


def accuracies(splits: Mapping[str, FeatureBank]) -> dict[tuple, list[float]]:
    """{(protocol, labels per class): accuracy on `test` in percent for each subset of labels}"""
    values: dict[tuple, list[float]] = {}
    for protocol in ("knn", "linear"):
        settings = schema.parse(
            roots.EvaluateConfig,
            dict(data="images", protocol=protocol, shots=(5, 50, 0), seeds=(0, 1, 2), k=(20,)),
        )
        for row in evaluate.measure(settings, splits["train"], splits["test"]):
            values.setdefault((protocol, row["shots"]), []).append(row["accuracy"])
    return values
