"""Pictures that tell a fake classifier its answers, for the tests of ImageNet's test sets."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dgpt_jax import class_labels, records, schema, shards
from dgpt_jax.config import Evaluate
from dgpt_jax.evals import robustness
from tests.data import tiny_model

WNIDS = class_labels.imagenet("labels.txt")


def picture(first: int, second: int, size=(20, 24)) -> bytes:
    """A PNG of one colour, which tells the fake classifier its best and its second class."""
    colour = (first // 32 * 8, first % 32 * 8, second % 32 * 8)
    image = np.full((*size, 3), colour, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Fake:
    """The best class is in the colours of the middle; then comes the class of the third colour, a
    number below 32, then the lower numbers first."""

    model = tiny_model()
    params: object = ()
    source = "fake"
    num_classes = 1000
    classes = ()

    def logits(self, pictures):
        colour = (pictures[:, 8, 8] // 8).astype(jnp.int32)
        best, second = colour[:, 0] * 32 + colour[:, 1], colour[:, 2]
        scores = -jnp.arange(1000.0)[None].repeat(len(pictures), 0) / 1000
        rows = jnp.arange(len(pictures))
        return scores.at[rows, second].set(1.0).at[rows, best].set(2.0)


def write(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def measured(root, say=lambda line: None) -> dict[str, dict]:
    settings = schema.parse(
        Evaluate,
        dict(data=str(root), protocol="robustness", resize=18, batch_size=4),
    )
    parts = robustness.evaluate(settings, Fake(), {}, say)
    return {row["data"]: row for rows in parts for row in rows}


def counts(row) -> tuple[int, int]:
    return row["correct"], row["test"]


def stored(directory, split: str, fields: dict, examples: list[dict]):
    """A TFDS directory as `tfds build` makes it."""
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "file_name": tfds.features.Text()}
        | fields
    )
    serialize = records.serializer(features)
    directory.mkdir(parents=True)
    path = records.shard_path(directory, split, 0, 1)
    receipt = shards.write(path, (serialize(example) for example in examples), [])
    records.write_metadata(directory, features, {split: [receipt]})
