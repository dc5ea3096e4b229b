"""Images that encode the answers of a fake classifier, for tests of ImageNet's test sets."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dgpt_jax.config import EvaluateConfig, schema
from dgpt_jax.data.ingest import labels
from dgpt_jax.evals import robustness
from dgpt_jax.storage import array_record_shards, tfds_dataset
from tests.support.data import tiny_model

WNIDS = labels.imagenet("labels.txt")


def picture(first: int, second: int, size=(20, 24)) -> bytes:
    """A PNG of one color that encodes the best and the second class of the fake classifier."""
    color = (first // 32 * 8, first % 32 * 8, second % 32 * 8)
    image = np.full((*size, 3), color, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Fake:
    """Ranks the class in red and green of the center first, then that in blue (below 32), then the
    others in ascending order."""

    model = tiny_model()
    params: object = ()
    source = "fake"
    num_classes = 1000
    classes = ()

    def logits(self, images):
        color = (images[:, 8, 8] // 8).astype(jnp.int32)
        best, second = color[:, 0] * 32 + color[:, 1], color[:, 2]
        scores = -jnp.arange(1000.0)[None].repeat(len(images), 0) / 1000
        rows = jnp.arange(len(images))
        return scores.at[rows, second].set(1.0).at[rows, best].set(2.0)


def write(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def measured(root, say=lambda line: None) -> dict[str, dict]:
    settings = schema.parse(
        EvaluateConfig,
        dict(data=str(root), protocol="robustness", resize=18, batch_size=4),
    )
    results = robustness.evaluate(settings, Fake(), {}, say)
    return {row["data"]: row for rows in results for row in rows}


def counts(row) -> tuple[int, int]:
    return row["correct"], row["test"]


def stored(directory, split: str, fields: dict, examples: list[dict]):
    """Writes a TFDS directory as `tfds build` does."""
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "file_name": tfds.features.Text()}
        | fields
    )
    serialize = tfds_dataset.serializer(features)
    directory.mkdir(parents=True)
    path = tfds_dataset.shard_path(directory, split, 0, 1)
    shard = array_record_shards.write(path, (serialize(example) for example in examples), [])
    tfds_dataset.write_metadata(directory, features, {split: [shard]})
