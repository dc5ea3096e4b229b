"""Imports of many tiny files, and of archives of as many: memory, open files, resuming.

REHEARSAL_FILES=300000 is the full size: 1.3 GB of disk, ten minutes on two cores.
"""

import io
import json
import os
import sys
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dgpt_jax.storage import array_record_shards, tfds_dataset
from tests.support import image_forms, processes

FILES = int(os.environ.get("REHEARSAL_FILES", 20_000))
FEW = 2_000
CLASSES = 100
ROWS = 1 << 17  # of a parquet file
MEMORY = 10e6, 300  # bytes beyond an import of FEW: constant, and per file

# Imports SRC to OUT in shards of SIZE; prints its resources as JSON, with the memory after each
# shard.
IMPORT = """
import json, sys
from dgpt_jax.data.ingest import importer
from tests.support import watch
src, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
resident = []
with watch.Usage() as usage:
    report = importer.import_images(
        src, out, shard_size=size, say=lambda line: resident.append(watch.memory("VmRSS"))
    )
assert not report.broken
print(json.dumps({
    "seconds": usage.seconds, "files": usage.files, "peak": usage.peak, "resident": resident,
}))
"""


def tiny_jpegs(count: int = 16) -> list[bytes]:
    rng, encoded = np.random.default_rng(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    return encoded


def name_of(i: int) -> str:
    return f"class{i % CLASSES:04d}/the_name_of_an_image_{i:09d}.jpg"


def write_files(folder, count: int):
    """Hard links to a few files; file systems allow about 65,000 links to each."""
    folder.mkdir()
    originals = []
    for i, data in enumerate(tiny_jpegs()):
        originals.append(folder.parent / f"{folder.name}-{i}.jpg")
        originals[-1].write_bytes(data)
    for label in range(CLASSES):
        (folder / f"class{label:04d}").mkdir()
    for i in range(count):
        os.link(originals[i % len(originals)], folder / name_of(i))
    return folder


def write_tar(path, count: int):
    originals = tiny_jpegs()
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            data = originals[i % len(originals)]
            member = tarfile.TarInfo(name_of(i))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            tar.members.clear()
    return path


def write_parquet(folder, count: int):
    """Files of one row group each, in which few images are stored once."""
    originals = tiny_jpegs()
    folder.mkdir()
    files = -(-count // ROWS)
    for i in range(files):
        rows = range(i * ROWS, min((i + 1) * ROWS, count))
        data = [originals[j % len(originals)] for j in rows]
        image = pa.StructArray.from_arrays(
            [pa.array(data, pa.binary()), pa.array([f"{j:09d}.jpg" for j in rows])],
            ["bytes", "path"],
        )
        label = pa.array([j % CLASSES for j in rows], pa.int64())
        file = folder / f"train-{i:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.table({"image": image, "label": label}), file, row_group_size=ROWS)
    return folder


def write_shards(folder, count: int):
    """At most 2,000 WebDataset shards."""
    originals = tiny_jpegs()
    folder.mkdir()
    shards = min(2000, count // 10)
    for i in range(shards):
        members = []
        for j in range(i * count // shards, (i + 1) * count // shards):
            members += [
                (f"{j:09d}.jpg", originals[j % len(originals)]),
                (f"{j:09d}.cls", b"%d" % (j % CLASSES)),
                (f"{j:09d}.txt", b"image %d" % j),
            ]
        image_forms.write_members(folder / f"{i:05d}.tar", members)
    return folder


def start(src, out, count: int, scratch):
    scratch.mkdir(exist_ok=True)
    words = ["-c", IMPORT, src, out, max(count // 20, 500)]
    return processes.start(words, TMPDIR=str(scratch))


def figures(process) -> dict:
    (output,) = processes.outputs_of([process])
    assert process.returncode == 0, output[-2000:]
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "form,write",
    [
        ("files", write_files),
        ("tar", write_tar),
        ("parquet", write_parquet),
        ("shards", write_shards),
    ],
)
def test_an_import(form, write, tmp_path):
    """In one go, and resumed after kill -9."""
    small, src = write(tmp_path / f"few.{form}", FEW), write(tmp_path / f"src.{form}", FILES)
    out, stopped = tmp_path / "a/out", tmp_path / "b/out"
    few = figures(start(small, tmp_path / "few", FEW, tmp_path / "scratch"))
    full = figures(start(src, out, FILES, tmp_path / "scratch"))
    # A killed import leaves temporary files.
    process = start(src, stopped, FILES, tmp_path / "killed")
    while len(list(stopped.glob(".*.receipt"))) < 10 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    mtimes = {path: path.stat().st_mtime_ns for path in stopped.glob("[!.]*array_record*")}
    again = figures(start(src, stopped, FILES, tmp_path / "scratch"))

    half, last = full["resident"][len(full["resident"]) // 2], full["resident"][-1]
    for name, run in (("few", few), ("all", full), ("resumed", again)):
        print(
            f"{form} {name}: peak {run['peak'] / 1e6:.0f} MB, {run['seconds']:.0f} s, "
            f"{run['files']} open files"
        )
    growth = full["peak"] - few["peak"]
    print(f"{growth / (FILES - FEW):.0f} bytes per file; second half {(last - half) / 1e6:+.1f} MB")
    for run in (full, again):
        assert run["peak"] - few["peak"] < MEMORY[0] + MEMORY[1] * FILES
        assert run["files"] < 64
    assert last - half < MEMORY[0]
    assert not list((tmp_path / "scratch").iterdir())
    assert not [path for path in stopped.iterdir() if path.name.startswith(".")]
    unchanged = sum(path.stat().st_mtime_ns == mtime for path, mtime in mtimes.items())
    assert unchanged >= len(mtimes) - 1 >= 9
    assert len(tfds_dataset.Split(out, "train")) == FILES
    assert array_record_shards.manifest(stopped) == array_record_shards.manifest(out)
