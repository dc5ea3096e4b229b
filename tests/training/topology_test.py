"""A run that eight devices began goes on elsewhere, as if it had stayed (`pytest -m slow`)."""

import json
import shutil

import numpy as np
import portpicker
import pytest

from dgpt_jax import checkpoint
from dgpt_jax.convert import layout
from tests import data, numbers, processes

STEPS = 20


def command(store, workdir) -> list[str]:
    words = ["-m", "dgpt_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    words += [f"--config.data.path={store}", f"--config.total={STEPS} steps", "--config.seed=0"]
    words += ["--config.batch_size=16", "--config.log_every=1", "--config.dtype=float32"]
    words += ["--config.checkpoint.every=10 steps", "--config.checkpoint.keep=5"]
    words += ["--config.optim.warmup=2 steps", "--config.evals.heldout=", "--config.evals.knn="]
    return words + [f"--config.model.{name}={value}" for name, value in data.TINY.items()]


def finish(started):
    outputs = processes.outputs_of(started, timeout=240)
    assert all(process.returncode == 0 for process in started), outputs[0][-2000:]


def losses(workdir) -> dict:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(store, work directory of a run of 20 steps on 8 devices, parameters split over all)."""
    root = tmp_path_factory.mktemp("topology")
    dataset = data.image_dataset(root, per_class=10)
    store = data.token_store(root, dataset, data.random_teacher(root / "teacher"))
    words = [*command(store, root / "run"), "--config.mesh.fsdp=8"]
    finish([processes.start(words, devices=8)])
    return store, root / "run"


@pytest.mark.slow
@pytest.mark.parametrize("hosts,devices,mesh", [
    (1, 1, ""), (1, 2, "fsdp=2"), (1, 4, "tensor=2"), (2, 2, "fsdp=2"),
])  # fmt: skip
def test_it_goes_on_elsewhere(begun, tmp_path, hosts, devices, mesh):
    store, whole = begun
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / f"checkpoints/{STEPS}")
    (workdir / "metrics.jsonl").unlink()
    words = command(store, workdir) + ([f"--config.mesh.{mesh}"] if mesh else [])
    port = portpicker.pick_unused_port()
    together = [f"--config.hosts.coordinator=localhost:{port}", f"--config.hosts.processes={hosts}"]
    finish([
        processes.start(
            words + ([*together, f"--config.hosts.process={i}"] if hosts > 1 else []),
            devices=devices,
        )
        for i in range(hosts)
    ])  # fmt: skip
    expected, found = losses(whole), losses(workdir)
    assert list(found) == list(range(11, STEPS + 1))
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    ours, theirs = (layout.flatten(checkpoint.load_params(path)[0]) for path in (workdir, whole))
    for name in theirs:
        a, b = (numbers.without_keys(name, params[name]) for params in (ours, theirs))
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), name
