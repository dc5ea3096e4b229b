"""Host memory, files and threads of training at a pod host's batch size with a minimal model.

Records have real size (224² images, 257 × 1024 int8 tokens). REHEARSAL_STEPS=200 is the full
rehearsal, the default a short one. Reports are appended to the file REHEARSAL_OUT.
"""

import json
import os
import re
from pathlib import Path

import pytest

from dgpt_jax.data.ingest import importer
from tests.distributed.multihost_test import free_address
from tests.support import processes
from tests.support.real_size import real_store, write_photos
from tests.support.watch import Watch

pytestmark = pytest.mark.slow
STEPS = int(os.environ.get("REHEARSAL_STEPS", 30))
# Small micro-batches keep activations small, which on a CPU are host memory.
MICROBATCH = 64
GB = 1e9
CONFIG = """
from dgpt_jax.config import TrainConfig, default_config


def get_config():
    config = default_config(TrainConfig)
    config.dtype, config.platform = "float32", "cpu"
    config.total, config.log_every = "{steps} steps", 5
    config.optim.warmup, config.checkpoint.every = "1 steps", "100 steps"
    config.model.width, config.model.depth, config.model.heads = 16, 1, 1
    config.model.decoder_width, config.model.decoder_heads = 16, 1
    config.model.decoder_depth = 1
    config.evals.figures = 0
    return config
"""
CLASSIFY = ("task=classify", "classify.num_classes=10", "evals.batch_size=256")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with a token store of two views, an image dataset and a config."""
    directory = tmp_path_factory.mktemp("rehearsal")
    real_store(directory, 20_480, views=2)
    photos = write_photos(directory / "more", 2_560)
    importer.import_images(photos, directory / "labelled", say=lambda _: None)
    (directory / "config.py").write_text(CONFIG.format(steps=STEPS))
    return directory


def train(root: Path, workdir: str, batch_size: int, *fields: str, hosts: int = 1):
    """Trains on `hosts` processes. Returns their peaks and growth, and the seconds to step 1."""
    address, scratch = free_address(), root / f"{workdir}-tmp"
    scratch.mkdir()
    words = [
        "-m", "dgpt_jax.train", f"--config={root}/config.py", f"--workdir={root}/{workdir}",
        *(f"--config.{x}" for x in (f"batch_size={batch_size}", *fields)),
    ]  # fmt: skip
    started, watches = [], []
    for process in range(hosts):
        flags = []
        if hosts > 1:
            flags = [
                f"--config.hosts.{x}"
                for x in (
                    f"coordinator={address}",
                    f"num_processes={hosts}",
                    f"process_id={process}",
                )
            ]
        started.append(processes.start([*words, *flags], TMPDIR=str(scratch), XLA_FLAGS=""))
        watches.append(Watch(started[-1].pid, limit=18 * GB / hosts))
    for watch in watches:
        watch.__enter__()
    outputs = processes.outputs_of(started)
    for watch in watches:
        watch.__exit__()
    assert [x.returncode for x in started] == [0] * hosts, outputs[0][-2000:]
    first = re.search(r"first step (\d+) s after the start", outputs[0])
    report = {
        "run": workdir, "batch_size": batch_size, "hosts": hosts, "steps": STEPS,
        "first_step_seconds": int(first[1]), "peak": [watch.peak() for watch in watches],
        "growth": [watch.growth() for watch in watches],
        "temporary_files": [path.name for path in scratch.rglob("*")],
        "disk": sum(x.stat().st_size for x in (root / workdir).rglob("*") if x.is_file()),
    }  # fmt: skip
    print(json.dumps(report))
    if out := os.environ.get("REHEARSAL_OUT"):
        with open(out, "a") as file:
            file.write(json.dumps(report) + "\n")
    return report


def assert_bounded(report: dict, memory: float):
    """Peak memory is bounded; over the last third of the run memory grows by less than two batches,
    files and threads stay constant; no temporary file remains."""
    for peak, growth in zip(report["peak"], report["growth"], strict=True):
        assert peak["memory"] < memory
        assert growth["memory"] < 0.25 * GB
        assert abs(growth["files"]) <= 4 and abs(growth["threads"]) <= 4
        assert peak["files"] < 400 and peak["threads"] < 200
    assert not report["temporary_files"]


@pytest.mark.parametrize(("batch_size", "memory"), [(256, 4 * GB), (1024, 6 * GB)])
def test_pretraining_from_a_store(root, batch_size, memory):
    accumulate = f"accum_steps={batch_size // MICROBATCH}"
    report = train(root, f"store{batch_size}", batch_size, f"data.path={root}/tokens", accumulate)
    assert_bounded(report, memory)


def test_four_hosts_share_a_batch(root):
    """4 × 256 examples."""
    fields = f"data.path={root}/tokens", f"accum_steps={1024 // 4 // MICROBATCH}"
    report = train(root, "hosts", 1024, *fields, hosts=4)
    assert_bounded(report, 4 * GB)


def test_fine_tuning_on_live_views(root):
    """With evaluations on 2,560 images."""
    fields = (
        f"data.path={root}/labelled", f"evals.heldout={root}/labelled",
        "evals.heldout_split=train", "evals.every=50 steps", f"accum_steps={256 // MICROBATCH}",
    )  # fmt: skip
    report = train(root, "tuned", 256, *CLASSIFY, *fields)
    assert_bounded(report, 4 * GB)
