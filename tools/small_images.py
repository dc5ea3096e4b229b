"""Sets of small real images, a teacher and stores of its tokens, the accuracy of frozen features:
what tools/quickstart.py and tools/ablate.py share."""

import contextlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import digits
import glyphs
import jax.numpy as jnp
import numpy as np

from dgpt_jax import build, config, evaluate, images, records, schema, sharding, studies
from dgpt_jax.config import Tokens, Train
from dgpt_jax.evals.features import Bank

# Each writes files folder/{train,test}/CLASS/… of size×size pixels.
IMAGES = {"digits": digits.write_digits, "glyphs": glyphs.write_glyphs}
TEACHER_STEPS = 600


def once(path: Path, make: Callable[[Path], None]):
    """Makes `path` beside its place and moves it there, unless it is there: whole or not at all."""
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(path)


def prepare(out: Path, kind: str, base: Train, views: dict[str, int], say) -> dict:
    """Makes what is not there of images, teacher and stores ({name: views}) below `out`.

    Returns {split: (pictures, labels)}. Views are drawn as base.data draws live ones.
    """
    once(out / "pictures", partial(IMAGES[kind], size=base.model.image_size))
    if not (out / "images/dataset_info.json").exists():
        images.import_images(out / "pictures", out / "images", say=lambda _: None)
    if not (out / "teacher").exists():
        say("training the teacher (supervised: it sees the training labels)")
    once(out / "teacher", partial(digits.train_teacher, out / "images", steps=TEACHER_STEPS))
    for name, number in views.items():
        ready = (out / name / "dataset_info.json").exists()
        if not ready or len(records.open_builder(out / name).info.splits) < number:
            say(f"building {number} views of {name}")
            with (out / f"{name}.log").open("a") as log, contextlib.redirect_stderr(log):
                build.build(store_config(out, name, number, base), out / name)
    return {split: digits.read_pictures(out / "images", split) for split in ("train", "test")}


def store_config(out: Path, name: str, views: int, base: Train) -> Tokens:
    """The config of a store of studies.STORES, below `out`."""
    return schema.parse(
        Tokens,
        {
            "source": str(out / "images"),
            "teacher": {"weights": str(out / "teacher")},
            "views": views,
            "picture": "png",
            "picture_size": base.model.image_size,
            "crop_scale": base.data.crop_scale,
            "crop_ratio": base.data.crop_ratio,
            "flip": base.data.flip,
            "shard_size": 512,
            "platform": base.platform,
        }
        | studies.STORES[name],
    )


def raw_pixels(pictures):
    """uint8 (N, size, size, 3), grey, to their pixels as features (N, size²)."""
    return jnp.asarray(pictures[..., 0], jnp.float32).reshape(len(pictures), -1) / 255


def banks(encode: Callable, pictures: dict) -> dict[str, Bank]:
    """{split: what encode(pictures) makes of its pictures, with their labels}."""
    mesh = sharding.make_mesh(config.Mesh())
    return {
        split: Bank.of(np.asarray(encode(found)), labels, mesh)
        for split, (found, labels) in pictures.items()
    }


def accuracies(splits: dict[str, Bank]) -> dict[tuple, list[float]]:
    """{(protocol, labels a class): accuracy on `test` in percent, for each draw of the labels}."""
    found = {}
    for protocol in ("knn", "linear"):
        settings = schema.parse(
            config.Evaluate,
            dict(data="images", protocol=protocol, shots=(5, 50, 0), seeds=(0, 1, 2), k=(20,)),
        )
        for row in evaluate.measure(settings, splits["train"], splits["test"]):
            found.setdefault((protocol, row["shots"]), []).append(row["accuracy"])
    return found
