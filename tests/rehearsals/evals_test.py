"""Evaluation at the size of ImageNet-1K: one copy of the features in memory for all protocols, and
every image counted once on any number of devices and processes.

REHEARSAL_ROWS=1281167 is the full number of features (float32, width 768: 3.9 GB) and
REHEARSAL_IMAGES=50001 that of images; the defaults are smaller. Prints time and memory of every
stage; only memory and counts are asserted.
"""

import io
import json
import os
import resource
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dgpt_jax.config import roots, schema
from dgpt_jax.data import bad_records
from dgpt_jax.data.ingest import importer
from dgpt_jax.distributed import sharding
from dgpt_jax.evals import classification, feature_bank, features, fewshot, knn, pretraining, probe
from dgpt_jax.storage import tfds_dataset
from tests.support import watch
from tests.support.banks import in_processes, mesh_of
from tests.support.processes import on_devices

ROWS = int(os.environ.get("REHEARSAL_ROWS", 200_000))
QUERIES, WIDTH, CLASSES = 500, 768, 1000
ITERATIONS = 20 if ROWS > 1e6 else 2
BANK = ROWS * WIDTH * 4
# Memory of a stage beyond the features: compiled programs, 50 arrays of weights for L-BFGS, some
# chunks of logits and of float64 rows.
OVERHEAD = 400e6 + 0.05 * BANK


class Numbered:
    """Images whose first pixels are the bytes of their index."""

    classes = None

    def __init__(self, length: int, first: int = 0):
        self.length, self.first = length, first

    def __len__(self):
        return self.length

    def read(self, index):
        image = np.zeros((2, 2, 3), np.uint8)
        image[0].flat[:4] = np.frombuffer(np.uint32(self.first + index).tobytes(), np.uint8)
        return image, np.int32(index % CLASSES)


def encode(centers, images):
    """Clusters by class with noise that depends only on the index."""
    index = (images[:, 0].reshape(-1, 6)[:, :4].astype(jnp.uint32) << (8 * jnp.arange(4))).sum(1)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(index)
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    return {"cls": 0.3 * centers[index % CLASSES] + noise}


def stage(name: str, work, allowed: float):
    """Result of work(); prints its resources as JSON. Fails if memory grows by more than `allowed`
    bytes."""
    watch.reset_peak()
    start, wall_start, cpu_start = watch.memory(), time.monotonic(), cpu_seconds()
    result = work()
    numbers = {
        "stage": name,
        "rows": ROWS,
        "seconds": time.monotonic() - wall_start,
        "cpu_seconds": cpu_seconds() - cpu_start,
        "bank_bytes": BANK,
        "peak_bytes": watch.memory(),
        "growth_bytes": watch.memory() - start,
    }
    print(json.dumps(numbers), flush=True)
    assert numbers["growth_bytes"] < allowed, numbers
    return result


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rehearsal():
    extract = features.Extractor(encode, mesh_of(1), batch_size=256)
    centers = jax.random.normal(jax.random.key(1), (CLASSES, WIDTH))
    sources = Numbered(ROWS), Numbered(QUERIES, first=ROWS - ROWS % CLASSES + CLASSES)

    def banks():
        return [extract(centers, source, lambda image: image)["cls"] for source in sources]

    train, test = stage("extract", banks, BANK + OVERHEAD)
    protocols = {
        "knn": lambda: knn.correct(train, test)[20],
        "fewshot": lambda: fewshot.correct(train, test),
        "linear": lambda: (
            probe.linear_probe(train, test, l2_grid=(1e-3,), iterations=ITERATIONS).correct
        ),
    }
    hits = {name: stage(name, work, OVERHEAD) for name, work in protocols.items()}
    print(json.dumps({"correct": hits, "of": QUERIES}), flush=True)
    assert min(hits.values()) > 0.5 * QUERIES  # chance is 0.001


@pytest.mark.slow
def test_features_are_in_memory_once():
    on_devices(1, rehearsal, XLA_FLAGS="")  # compiled as for users


IMAGES = int(os.environ.get("REHEARSAL_IMAGES", 5_001))
LABELS, GRAYS = 10, 7  # image i has label i % LABELS and gray level i % GRAYS


def gray_images(directory: Path) -> Path:
    """A dataset of IMAGES tiny images, hard links to GRAYS files."""
    folder = directory / "folder"
    encoded = []
    for gray in range(GRAYS):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (20 * gray + 10,) * 3).save(buffer, "PNG")
        encoded.append(directory / f"{gray}.png")
        encoded[-1].write_bytes(buffer.getvalue())
    for label in range(LABELS):
        (folder / f"class{label}").mkdir(parents=True)
    for i in range(IMAGES):
        os.link(encoded[i % GRAYS], folder / f"class{i % LABELS}/{i:06d}.png")
    importer.import_images(folder, directory / "images", say=lambda _: None)
    return directory / "images"


def gray_level(images):
    """Gray levels (B,) of images (B, H, W, 3)."""
    return (images[:, 0, 0, 0].astype(jnp.float32) - 10) / 20


def gray_task(path):
    """Fake of both tasks: logits peak at the class of the gray level, then at the next one;
    the loss is the gray level."""
    settings = schema.parse(
        roots.TrainConfig,
        {
            "task": "classify",
            "data": {"path": path},
            "model": {"image_size": 8, "patch": 4},
            "classify": {"num_classes": LABELS, "resize": 8},
            "evals": {"heldout": path, "heldout_split": "train", "batch_size": 192},
        },
    )
    split = tfds_dataset.Split(path, "train")

    def load(index):
        return {"image": bad_records.decode_image(split, index, split[index])}

    return SimpleNamespace(
        config=settings, heads=(), frozen={}, weights={"gray": 1.0},
        examples=SimpleNamespace(sources=SimpleNamespace(splits=[split])),
        heldout=lambda: (load, len(split)),
        logits=lambda params, frozen, x: -abs(gray_level(x)[:, None] + 0.25 - jnp.arange(LABELS)),
        loss=lambda params, frozen, batch: (0, {"gray": gray_level(batch["image"])}),
    )  # fmt: skip


def expected() -> dict[str, float]:
    hits = Counter()
    for i in range(IMAGES):
        distance = abs(i % GRAYS + 0.25 - np.arange(LABELS))
        rank = int((distance <= distance[i % LABELS]).sum())
        hits |= {f"val/top{k}": hits[f"val/top{k}"] + (rank <= k) for k in (1, 5)}
        hits["heldout/gray"] += i % GRAYS
    hits |= {f"val/top{k}_squash": hits[f"val/top{k}"] for k in (1, 5)}
    return {name: count / IMAGES for name, count in hits.items()}


def count_images():
    """Runs in each process."""
    path = os.environ["REHEARSAL_GRAYS"]
    task, mesh = gray_task(path), sharding.make_mesh(roots.MeshConfig())
    metrics = classification.accuracy(task, mesh)({}) | pretraining.heldout_loss(task, mesh)({})
    assert metrics == expected(), metrics
    extract = features.Extractor(encode, mesh, batch_size=192)
    centers = jax.random.normal(jax.random.key(1), (CLASSES, WIDTH))
    bank = extract(centers, Numbered(IMAGES), lambda image: image)["cls"]
    indices = np.concatenate([indices for _, indices in bank.local()])
    counts = feature_bank.sum_over_processes(np.bincount(indices, minlength=IMAGES).astype(float))
    assert (counts == 1).all() and len(counts) == IMAGES
    assert (bank.labels == np.arange(IMAGES) % CLASSES).all()
    # The nearest neighbor of a row is the row itself.
    assert knn.correct(bank, bank, ks=(1,)) == {1: IMAGES}


@pytest.mark.slow
def test_each_image_counts_once_on_three_hosts(tmp_path, monkeypatch):
    """Three processes with eight devices each; the last batch is incomplete."""
    monkeypatch.setenv("REHEARSAL_GRAYS", str(gray_images(tmp_path)))
    in_processes(3, 8, count_images)
