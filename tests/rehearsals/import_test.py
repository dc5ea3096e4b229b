"""An import of very many tiny files, and of a tar of as many: memory, files, and its resumption.

REHEARSAL_FILES=300000 rehearses it at full size: 1.3 GB of disk, ten minutes on two cores.
"""

import io
import json
import os
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import records, shards
from tests import processes

FILES = int(os.environ.get("REHEARSAL_FILES", 20_000))
FEW = 2_000
CLASSES = 100
MEMORY = 10e6, 300  # bytes beyond an import of FEW, and as many for each file

# Imports SRC to OUT in shards of SIZE; prints what it takes as JSON. The memory is noted whenever a
# shard is finished.
IMPORT = """
import json, sys
from dgpt_jax import images
from tests import watch
src, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
resident = []
with watch.Usage() as usage:
    report = images.import_images(
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
    """Hard links to a few files: a file system takes 65,000 of each."""
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
@pytest.mark.parametrize("form,write", [("files", write_files), ("tar", write_tar)])
def test_an_import(form, write, tmp_path):
    """At once, and stopped by kill -9 in the middle and continued."""
    some, src = write(tmp_path / f"few.{form}", FEW), write(tmp_path / f"src.{form}", FILES)
    out, stopped = tmp_path / "a/out", tmp_path / "b/out"
    few = figures(start(some, tmp_path / "few", FEW, tmp_path / "scratch"))
    found = figures(start(src, out, FILES, tmp_path / "scratch"))
    # What is killed leaves its temporary files.
    process = start(src, stopped, FILES, tmp_path / "killed")
    while len(list(stopped.glob(".*.receipt"))) < 10 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in stopped.glob("[!.]*array_record*")}
    again = figures(start(src, stopped, FILES, tmp_path / "scratch"))

    half, last = found["resident"][len(found["resident"]) // 2], found["resident"][-1]
    for name, run in (("few", few), ("all", found), ("continued", again)):
        print(
            f"{form} {name}: peak {run['peak'] / 1e6:.0f} MB, {run['seconds']:.0f} s, "
            f"{run['files']} open files"
        )
    more = found["peak"] - few["peak"]
    print(f"{more / (FILES - FEW):.0f} bytes a file; second half {(last - half) / 1e6:+.1f} MB")
    for run in (found, again):
        assert run["peak"] - few["peak"] < MEMORY[0] + MEMORY[1] * FILES
        assert run["files"] < 64
    assert last - half < MEMORY[0]
    assert not list((tmp_path / "scratch").iterdir())
    assert not [path for path in stopped.iterdir() if path.name.startswith(".")]
    assert sum(path.stat().st_mtime_ns == then for path, then in kept.items()) >= len(kept) - 1 >= 9
    assert len(records.Split(out, "train")) == FILES
    assert shards.manifest(stopped) == shards.manifest(out)
