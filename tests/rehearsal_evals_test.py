"""Evaluation at the size of ImageNet-1K: features are in memory once, whatever is measured on them.

REHEARSAL_ROWS=1281167 takes its real length (float32 features of width 768: 3.9 GB), the default
fewer rows. Prints time and memory of every stage; only memory is asserted.
"""

import json
import os
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax.evals import features, fewshot, knn, probe
from tests.banks import mesh_of
from tests.processes import on_devices

ROWS = int(os.environ.get("REHEARSAL_ROWS", 60_000))
QUERIES, WIDTH, CLASSES = 2000, 768, 1000
ITERATIONS = 20 if ROWS > 60_000 else 5
BANK = ROWS * WIDTH * 4
# What a stage may take beside the features: compiled programs, 50 arrays of weights for L-BFGS, a
# few chunks of logits and of float64 rows.
BESIDE = 600e6 + 0.05 * BANK


class Numbered:
    """Images whose first pixels are the bytes of their index."""

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


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def stage(name: str, work, allowed: float):
    """The result of work(), after a line of JSON about it. Fails where memory grows by more than
    `allowed` bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now
    start, began, used = memory("VmRSS"), time.monotonic(), cpu_seconds()
    result = work()
    numbers = {
        "stage": name,
        "rows": ROWS,
        "seconds": time.monotonic() - began,
        "cpu_seconds": cpu_seconds() - used,
        "bank_bytes": BANK,
        "peak_bytes": memory("VmHWM"),
        "growth_bytes": memory("VmHWM") - start,
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
    on_devices(1, rehearsal)
