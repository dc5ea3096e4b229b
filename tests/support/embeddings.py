"""Real images to embed, small encoders, and embeddings read back from any format."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy
from PIL import Image
from sklearn import datasets

from dgpt_jax.data import image_ops
from dgpt_jax.evals.embedding import feature_store
from dgpt_jax.weights import api, export, registry
from tests.support.conversions import random_weights

SIZE = 16  # pixels of the encoder's input; random_weights


def real_images(root: Path, tiles: int = 12, digits: int = 6) -> Path:
    """Class folders of PNG files: tiles of scikit-learn's two photographs, and digits."""
    photographs = datasets.load_sample_images().images
    images = {
        name: [p[60 * (i // 6) :, 100 * (i % 6) :][:60, :90] for i in range(tiles)]
        for name, p in zip(("china", "flower"), photographs)
    }
    images["digits"] = [
        np.repeat(np.uint8(16 * x.clip(max=15))[..., None], 3, axis=2).repeat(4, 0).repeat(3, 1)
        for x in datasets.load_digits().images[:digits]
    ]
    for name, arrays in images.items():
        (root / name).mkdir(parents=True)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(root / name / f"{i:03d}.png")
    return root


def encoder_file(path: Path, **changes) -> Path:
    """Writes an encoder with random weights to a file."""
    weights = random_weights(**changes)
    export.write(weights, registry.LAYOUTS["safetensors"], path)
    return path


def expected(encoder: api.PretrainedEncoder, files: list[Path], tokens: str) -> np.ndarray:
    """Features of image files by load_encoder alone; the encoder's crop_pct is 1, squashed."""
    images = [
        image_ops.center_crop(np.asarray(Image.open(f)), SIZE, SIZE, squash=True) for f in files
    ]
    if tokens == "all":
        return np.asarray(encoder.tokens(np.stack(images)))
    return np.asarray(encoder.features(np.stack(images), tokens))


class FakeEncoder:
    """In place of feature_batches.Encoder: the mean of an image's rows, compiled by nobody."""

    def __init__(self, encoder, tokens: str, dtype: str, batch_size: int):
        self.batch_size, self.size, self.shape = batch_size, SIZE, (3 * SIZE,)
        self._dtype = dtype

    def check(self):
        pass

    def start(self, images):
        features = np.stack(images).mean(axis=1).reshape(len(images), -1).astype(self._dtype)
        return features, np.ones(len(images), bool)


class Contents(NamedTuple):
    """Rows of a split in any format; labels [] and texts {} if there are none."""

    ids: list[str]
    labels: list[int]
    features: np.ndarray
    texts: dict[str, list[str]]


def contents(out: Path, split: str = "train") -> Contents:
    """Reads a split without the code that wrote it, except stores."""
    info = feature_store.FeatureInfo.load(out)
    assert info is not None
    if info.to == "store":
        rows = list(feature_store.open(out)[split])
        features = np.stack([row["features"] for row in rows])
    elif info.to == "parquet":
        tables = [pq.read_table(path) for path in sorted(out.glob(f"{split}-*.parquet"))]
        rows = [row for table in tables for row in table.drop_columns(["features"]).to_pylist()]
        lists = [values for table in tables for values in table["features"].to_pylist()]
        features = np.array(lists, np.dtype(info.dtype))
    else:
        rows = [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        if info.to == "npy":
            features = np.load(out / f"{split}.npy", mmap_mode="r")
            labels = np.load(out / f"{split}.labels.npy") if info.classes else None
        else:
            arrays = safetensors.numpy.load_file(out / f"{split}.safetensors")
            features, labels = arrays["features"], arrays.get("labels")
        if info.classes:
            assert labels.tolist() == [row["label"] for row in rows]
    texts = {name: [row[name] for row in rows] for name in info.texts}
    labels = [row["label"] for row in rows] if info.classes else []
    return Contents([row["id"] for row in rows], labels, features, texts)


def digests(out: Path) -> dict[str, str]:
    """{file: digest} of all files below a directory, hidden ones too."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
