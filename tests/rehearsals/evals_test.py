"""Evaluation at the size of ImageNet-1K: features are in memory once, whatever is measured on them,
and every image counts once, however many devices and processes share them.

REHEARSAL_ROWS=1281167 takes the real length of the features (float32, width 768: 3.9 GB) and
REHEARSAL_IMAGES=50001 that of the images; the defaults are fewer. Prints time and memory of every
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

from dgpt_jax import bad_records, config, images, records, schema, sharding
from dgpt_jax.evals import classification, features, fewshot, knn, pretraining, probe
from tests import watch
from tests.banks import in_processes, mesh_of
from tests.processes import on_devices

ROWS = int(os.environ.get("REHEARSAL_ROWS", 200_000))
QUERIES, WIDTH, CLASSES = 500, 768, 1000
ITERATIONS = 20 if ROWS > 1e6 else 2
BANK = ROWS * WIDTH * 4
# What a stage may take beside the features: compiled programs, 50 arrays of weights for L-BFGS, a
# few chunks of logits and of float64 rows.
BESIDE = 400e6 + 0.05 * BANK


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


def encode(centres, images):
    """Clusters by class with noise that depends on the index alone."""
    index = (images[:, 0].reshape(-1, 6)[:, :4].astype(jnp.uint32) << (8 * jnp.arange(4))).sum(1)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(index)
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    return {"cls": 0.3 * centres[index % CLASSES] + noise}


def stage(name: str, work, allowed: float):
    """The result of work(), after a line of JSON about it. Fails where memory grows by more than
    `allowed` bytes."""
    watch.reset_peak()
    start, began, used = watch.memory(), time.monotonic(), cpu_seconds()
    result = work()
    numbers = {
        "stage": name,
        "rows": ROWS,
        "seconds": time.monotonic() - began,
        "cpu_seconds": cpu_seconds() - used,
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
    centres = jax.random.normal(jax.random.key(1), (CLASSES, WIDTH))
    sources = Numbered(ROWS), Numbered(QUERIES, first=ROWS - ROWS % CLASSES + CLASSES)

    def banks():
        return [extract(centres, source, lambda image: image)["cls"] for source in sources]

    train, test = stage("extract", banks, BANK + BESIDE)
    measured = {
        "knn": lambda: knn.correct(train, test)[20],
        "fewshot": lambda: fewshot.correct(train, test),
        "linear": lambda: (
            probe.linear_probe(train, test, l2_grid=(1e-3,), iterations=ITERATIONS).correct
        ),
    }
    hits = {name: stage(name, work, BESIDE) for name, work in measured.items()}
    print(json.dumps({"correct": hits, "of": QUERIES}), flush=True)
    assert min(hits.values()) > 0.5 * QUERIES  # chance is 0.001


@pytest.mark.slow
def test_features_are_in_memory_once():
    on_devices(1, rehearsal, XLA_FLAGS="")  # compiled as for users


IMAGES = int(os.environ.get("REHEARSAL_IMAGES", 5_001))
LABELS, GREYS = 10, 7  # image i is of class i % LABELS and shows the grey of class i % GREYS


def grey_images(directory: Path) -> Path:
    """An image dataset of IMAGES tiny pictures, hard links to GREYS files."""
    folder = directory / "folder"
    encoded = []
    for grey in range(GREYS):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (20 * grey + 10,) * 3).save(buffer, "PNG")
        encoded.append(directory / f"{grey}.png")
        encoded[-1].write_bytes(buffer.getvalue())
    for label in range(LABELS):
        (folder / f"class{label}").mkdir(parents=True)
    for i in range(IMAGES):
        os.link(encoded[i % GREYS], folder / f"class{i % LABELS}/{i:06d}.png")
    images.import_images(folder, directory / "images", say=lambda _: None)
    return directory / "images"


def shown(images):
    """The number of the class whose grey pictures (B, H, W, 3) show."""
    return (images[:, 0, 0, 0].astype(jnp.float32) - 10) / 20


def grey_task(path):
    """Stands for both tasks: logits by a picture's grey, whose nearest are the classes just above
    it, and a loss that is its number."""
    settings = schema.parse(
        config.Train,
        {
            "task": "classify",
            "data": {"path": path},
            "model": {"image_size": 8, "patch": 4},
            "classify": {"num_classes": LABELS, "resize": 8},
            "evals": {"heldout": path, "heldout_split": "train", "batch_size": 192},
        },
    )
    split = records.Split(path, "train")

    def load(index):
        return {"image": bad_records.picture(split, index, split[index])}

    return SimpleNamespace(
        config=settings, heads=(), frozen={}, weights={"grey": 1.0},
        examples=SimpleNamespace(sources=SimpleNamespace(splits=[split])),
        heldout=lambda: (load, len(split)),
        logits=lambda params, frozen, x: -abs(shown(x)[:, None] + 0.25 - jnp.arange(LABELS)),
        loss=lambda params, frozen, batch: (0, {"grey": shown(batch["image"])}),
    )  # fmt: skip


def expected() -> dict[str, float]:
    hits = Counter()
    for i in range(IMAGES):
        distance = abs(i % GREYS + 0.25 - np.arange(LABELS))
        place = int((distance <= distance[i % LABELS]).sum())
        hits |= {f"val/top{k}": hits[f"val/top{k}"] + (place <= k) for k in (1, 5)}
        hits["heldout/grey"] += i % GREYS
    hits |= {f"val/top{k}_squash": hits[f"val/top{k}"] for k in (1, 5)}
    return {name: count / IMAGES for name, count in hits.items()}


def each_image_once():
    """In one of the processes."""
    path = os.environ["REHEARSAL_GREYS"]
    task, mesh = grey_task(path), sharding.make_mesh(config.Mesh())
    found = classification.accuracy(task, mesh)({}) | pretraining.heldout_loss(task, mesh)({})
    assert found == expected(), found
    extract = features.Extractor(encode, mesh, batch_size=192)
    centres = jax.random.normal(jax.random.key(1), (CLASSES, WIDTH))
    bank = extract(centres, Numbered(IMAGES), lambda image: image)["cls"]
    indices = np.concatenate([indices for _, indices in bank.local()])
    counts = features.sum_over_processes(np.bincount(indices, minlength=IMAGES).astype(float))
    assert (counts == 1).all() and len(counts) == IMAGES
    assert (bank.labels == np.arange(IMAGES) % CLASSES).all()
    # The nearest of a row is itself.
    assert knn.correct(bank, bank, ks=(1,)) == {1: IMAGES}


@pytest.mark.slow
def test_each_image_counts_once_on_three_hosts(tmp_path, monkeypatch):
    """Three processes with eight devices each, which the images do not fill."""
    monkeypatch.setenv("REHEARSAL_GREYS", str(grey_images(tmp_path)))
    in_processes(3, 8, each_image_once)
