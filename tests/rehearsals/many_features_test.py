"""Embeddings of many tiny images: memory, open files, time, and continuing after a kill.

REHEARSAL_FEATURES=1281167 is the full size: 1 GB of disk.
"""

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgpt_jax.evals.embedding import feature_store, journal
from dgpt_jax.storage import array_record_shards, tfds_dataset
from tests.support import processes
from tests.support.embeddings import digests, encoder_file

IMAGES = int(os.environ.get("REHEARSAL_FEATURES", 20_000))
FEW = 4_000
SHARD = 16_384
MEMORY = 50e6, 100  # bytes beyond an embedding of FEW: constant, and per image
FORMATS = os.environ.get("REHEARSAL_FORMATS", ",".join(feature_store.FORMATS)).split(",")

# Embeds SRC with ENCODER into OUT as TO; prints its resources as JSON.
EMBED = """
import json, sys
from dgpt_jax.evals.embedding import run
from dgpt_jax.weights import api
from tests.support import watch
src, encoder, out, to = sys.argv[1:]
resident = []
with watch.Usage() as usage:
    info = run.embed(src, api.load_encoder(encoder), out, to=to,
        say=lambda line: resident.append(watch.memory("VmRSS")))
print(json.dumps({
    "seconds": round(usage.seconds), "files": usage.files, "peak": usage.peak,
    "resident": resident, "rows": info.splits["train"]["rows"],
}))
"""


def dataset(path: Path, count: int) -> Path:
    """An imported dataset of `count` tiny images; 64 distinct ones."""
    rng, encoded = np.random.default_rng(0), []
    for _ in range(64):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    features = tfds_dataset.image_features(["a", "b"])
    serialize, shards, infos = tfds_dataset.serializer(features), -(-count // SHARD), []
    path.mkdir()
    for shard in range(shards):
        numbers = range(count)[shard * SHARD : (shard + 1) * SHARD]
        records = (
            serialize({"id": f"class/{i:09d}.jpg", "image": encoded[i % 64], "label": i % 2})
            for i in numbers
        )
        file = tfds_dataset.shard_path(path, "train", shard, shards)
        infos.append(array_record_shards.write(file, records))
    tfds_dataset.write_metadata(path, features, {"train": infos})
    return path


def measured(*words, kill_after: int | None = None) -> dict:
    process = processes.start(["-c", EMBED, *words])
    lines = Path(words[2]) / journal.FILE
    while kill_after is not None:
        if lines.exists() and lines.read_text().count("\n") >= kill_after:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return {}
        assert process.poll() is None
        time.sleep(0.01)
    (output,) = processes.outputs_of([process])
    assert process.returncode == 0, output[-2000:]
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Few and many images, and an encoder."""
    root = tmp_path_factory.mktemp("embeddings")
    encoder = encoder_file(root / "encoder.safetensors", depth=1)
    return dataset(root / "few", FEW), dataset(root / "many", IMAGES), encoder


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_memory_does_not_grow_with_images(inputs, tmp_path, to):
    """Also of an embedding that was killed in its middle."""
    few_images, images, encoder = inputs
    few = measured(few_images, encoder, tmp_path / "few", to)
    out = tmp_path / "out"
    measured(images, encoder, out, to, kill_after=IMAGES // 4096 // 2)
    rest = measured(images, encoder, out, to)
    resumed = digests(out)
    shutil.rmtree(out)
    many = measured(images, encoder, out, to)
    assert digests(out) == resumed
    resident = [round(x / 1e6) for x in many["resident"]]
    print(to, *(f"{k}: {few[k]}, {rest[k]}, {many[k]};" for k in ("seconds", "peak", "files")))
    print(resident)
    assert many["rows"] == rest["rows"] == IMAGES
    assert many["peak"] < few["peak"] + MEMORY[0] + MEMORY[1] * IMAGES
    assert many["files"] < few["files"] + 2 * -(-IMAGES // SHARD) + 10
