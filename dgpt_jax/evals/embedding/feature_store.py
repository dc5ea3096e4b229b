"""Feature stores: TFDS directories of an encoder's features, and the metadata of all embeddings.

An example is {id, features, label if the source has classes, and the source's text columns}. The
metadata (FeatureInfo: encoder, preprocessing, layout, source) are in `feature_store.json`, or in
`metadata.json` beside features in another format; they are written before the first example and
completed after the last.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax.config.schema import parse
from dgpt_jax.errors import UserError
from dgpt_jax.storage import atomic, tfds_dataset
from dgpt_jax.storage.gcs import AnyPath

STORE_FILE, METADATA_FILE = "feature_store.json", "metadata.json"
STORE = "store"
FORMATS = ("npy", "parquet", "safetensors", STORE)
TOKENS = ("cls", "mean", "all")
DTYPES = ("float32", "float16", "bfloat16")
FORMAT = 1


@dataclass(frozen=True)
class FeatureInfo:
    """Metadata of the features of a source.

    name: prefix of a store's file names. to: one of FORMATS. tokens: one of TOKENS. shape: of one
    example's features, (D,), or (1 + patches, D) with CLS first. encoder: source, hash of its
    params, model, step of its training. preprocessing: from a decoded image to the encoder's
    input. source: path, kind, digest, images by split. command: computes the features, and resumes.
    splits: {split: {"rows", "unreadable"}}, `files`: {file: bytes}; both empty until all are
    written.
    """

    name: str
    to: str
    tokens: str
    dtype: str
    shape: tuple[int, ...]
    encoder: dict
    preprocessing: dict
    source: dict
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    batch_size: int
    shard_size: int
    command: str
    code_version: str
    splits: dict = dataclasses.field(default_factory=dict)
    files: dict = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @property
    def row_bytes(self) -> int:
        """Bytes of one example's features."""
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize

    @property
    def is_finished(self) -> bool:
        return bool(self.splits)

    def to_json(self) -> dict:
        """Returns the metadata as they are after a JSON round trip."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def save(self, directory: AnyPath) -> None:
        """Writes the JSON atomically. Raises UserError."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"
        atomic.write_text(_file(directory, self.to), text)

    @staticmethod
    def remove(directory: AnyPath) -> None:
        """Removes the JSON."""
        for path in _files(directory):
            path.unlink(missing_ok=True)

    @classmethod
    def load(cls, directory: AnyPath) -> "FeatureInfo | None":
        """Reads the JSON; None if there is none. Raises UserError if it is damaged."""
        path = next((p for p in _files(directory) if p.exists()), None)
        if path is None:
            return None
        values = atomic.read_json(path, "feature metadata")
        if (number := values.get("format")) != FORMAT:
            raise UserError(
                f"{path} has format {number}, this code reads format {FORMAT}: embed the images "
                f"again, into another --out"
            )
        try:
            return parse(cls, values, str(path))
        except UserError as e:
            raise UserError(f"{path} is damaged, or written by a newer version: {e}") from None


def _file(directory: AnyPath, to: str) -> epath.Path:
    return epath.Path(directory) / (STORE_FILE if to == STORE else METADATA_FILE)


def _files(directory: AnyPath) -> list[epath.Path]:
    return [epath.Path(directory) / name for name in (STORE_FILE, METADATA_FILE)]


def features(info: FeatureInfo) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a store."""
    schema: dict[str, Any] = {name: tfds.features.Text() for name in info.texts}
    schema["id"] = tfds.features.Text()
    schema["features"] = tfds.features.Tensor(
        shape=tuple(info.shape),
        dtype=jnp.dtype(info.dtype),
        encoding=tfds.features.Encoding.BYTES,
    )
    if info.classes:
        schema["label"] = tfds.features.ClassLabel(names=list(info.classes))
    return tfds.features.FeaturesDict(schema)


class FeatureSplit(tfds_dataset.Split):
    """Examples of one split by index: {"id": str, "features": array, "label": int if there are
    classes, and str of each text column}."""

    def parse(self, record: bytes) -> dict:
        example = super().parse(record)
        example |= {k: v.decode() for k, v in example.items() if isinstance(v, bytes)}
        if "label" in example:
            example["label"] = int(example["label"])
        return example


class FeatureStore:
    """A finished feature store. info: its metadata; `store[split]` opens a split."""

    def __init__(self, directory: AnyPath):
        """Raises UserError if it is none, unfinished, or its files contradict its metadata."""
        if not (epath.Path(directory) / STORE_FILE).exists():
            raise UserError(f"{directory} is not a feature store: {STORE_FILE} is missing")
        info = FeatureInfo.load(directory)
        assert info is not None
        if not info.is_finished:
            raise UserError(f"{directory} is unfinished; finish it with: {info.command}")
        self.info, self.directory = info, directory
        self._opened = tfds_dataset.Opened(directory)
        self._check()

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.info.splits)

    def __getitem__(self, split: str) -> FeatureSplit:
        """Raises UserError if the store lacks the split, or a shard is missing or incomplete."""
        return FeatureSplit(self.directory, split, self._opened)

    def _check(self) -> None:
        stored = self._opened.builder.info
        actual, expected = stored.features, features(self.info)
        if repr(actual) != repr(expected):
            raise UserError(
                f"{self.directory} is damaged: {STORE_FILE} and features.json differ in the "
                f"features of an example"
            )
        rows = {
            name: split.num_examples for name, split in self._opened.builder.info.splits.items()
        }
        if rows != (stated := {name: s["rows"] for name, s in self.info.splits.items()}):
            raise UserError(
                f"{self.directory} is damaged: by {STORE_FILE} it has {stated} examples, by "
                f"dataset_info.json {rows}"
            )


def open(directory: Path | str) -> FeatureStore:
    """Opens a feature store. Raises UserError."""
    return FeatureStore(directory)
