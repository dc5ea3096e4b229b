"""Contents of a directory of written formats (golden/write_formats.py) as plain numbers."""

import hashlib
from pathlib import Path

import numpy as np

from dgpt_jax.data import token_store
from dgpt_jax.evals import results
from dgpt_jax.monitoring import metrics_log
from dgpt_jax.storage import orbax_checkpoint, tfds_dataset
from dgpt_jax.weights import api

WEIGHTS = ("run", "ema", "tuned", "exports/tuned")
EXPORTS = ("exports/encoder.safetensors", "exports/timm", "exports/hf", "exports/vit.npz")
FULL = ("run", "ema", "exports/full.safetensors")
RUNS = ("run", "ema", "tuned")


def images() -> np.ndarray:
    """Fixed uint8 images (3, 16, 16, 3)."""
    return np.random.default_rng(23).integers(0, 256, (3, 16, 16, 3), np.uint8)


def digest(*arrays) -> str:
    """First 16 digits of the SHA-256 of the arrays' bytes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def summary(directory: Path) -> dict:
    """Everything in the directory that later versions must read alike, as JSON."""
    return {
        "images": dataset(directory / "images"),
        "tokens": store(directory / "tokens"),
        "features": {name: features(directory / name) for name in (*WEIGHTS, *EXPORTS)},
        "losses": {name: losses(directory / name) for name in FULL},
        "logits": logits(directory / "tuned"),
        "curves": {name: curves(directory / name) for name in RUNS},
        "steps": {name: orbax_checkpoint.steps(directory / name) for name in RUNS},
        "results": measured(directory / "run/results_step3.json"),
    }


def dataset(path: Path) -> dict:
    """Ids, labels, class names and a digest of the bytes of an image dataset."""
    split = tfds_dataset.Split(path, "train")
    examples = list(split)
    return {
        "ids": [example["id"] for example in examples],
        "labels": [int(example["label"]) for example in examples],
        "classes": list(split.label.names),
        "bytes": digest(*(np.frombuffer(example["image"], np.uint8) for example in examples)),
    }


def store(path: Path) -> dict:
    """Ids and digests of a token store's views, and its metadata."""
    info = token_store.StoreInfo.load(path)
    codec = info.teacher.load_codec(path)
    views = {}
    for name in tfds_dataset.open_builder(path).info.splits:
        examples = list(tfds_dataset.Split(path, name))
        views[name] = {
            "ids": [example["id"] for example in examples],
            "images": digest(*(np.frombuffer(x["image"], np.uint8) for x in examples)),
            "stored": digest(*(example["tokens"] for example in examples)),
        }
    teacher, first = info.teacher, codec.decode(examples[0]["tokens"][None])
    return {
        "views": views,
        "decoded": np.asarray(first, float)[0, :2, :4].tolist(),
        "codec": teacher.codec, "grid": list(teacher.grid), "width": teacher.width,
        "cls": teacher.cls,
    }  # fmt: skip


def features(path: Path) -> list:
    """An encoder's features of `images`."""
    encoder = api.load_encoder(path)
    return np.asarray(encoder.features(images(), "mean"), float).tolist()


def logits(path: Path) -> list:
    """A classifier's logits of `images`."""
    return np.asarray(api.load_classifier(path).logits(images()), float).tolist()


def losses(path: Path) -> dict[str, float]:
    """A pretraining model's losses on fixed inputs."""
    rng = np.random.default_rng(29)
    model = api.load_digpt(path, heads=2, decoder_heads=2)
    images, tokens = rng.standard_normal((2, 16, 16, 3)), rng.standard_normal((2, 17, 24))
    orders = np.array([[0, 1, 2, 3], [3, 1, 0, 2]])
    losses = model.losses(np.float32(images), np.float32(tokens), orders)
    return {name: float(x) for name, x in losses.items()}


def curves(path: Path) -> dict[str, dict[str, float]]:
    """Logged losses and accuracies of a run by metric and step."""
    names = ("loss", "next", "visible", "knn/cls", "knn/mean", "val/top1")
    logged = metrics_log.read(path).curves
    return {
        name: {str(step): value for step, value in logged[name].as_dict().items()}
        for name in names
        if name in logged
    }


def measured(path: Path) -> list:
    """[protocol, features, k, correct, test] of each row of a results file."""
    rows = results.read(path)["results"]
    return [[row.get(x) for x in ("protocol", "features", "k", "correct", "test")] for row in rows]
