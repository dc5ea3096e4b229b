"""A run started on eight devices resumes on other meshes (`pytest -m slow`)."""

import json
import shutil

import numpy as np
import portpicker
import pytest

from dgpt_jax.storage import orbax_checkpoint
from dgpt_jax.weights import mapping
from tests.support import data, processes
from tests.support import step_numbers as numbers

STEPS = 20


def command(store, workdir) -> list[str]:
    argv = ["-m", "dgpt_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    argv += [f"--config.data.path={store}", f"--config.total={STEPS} steps", "--config.seed=0"]
    argv += ["--config.batch_size=16", "--config.log_every=1", "--config.dtype=float32"]
    argv += ["--config.checkpoint.every=10 steps", "--config.checkpoint.keep=5"]
    argv += ["--config.optim.warmup=2 steps", "--config.evals.heldout=", "--config.evals.knn="]
    return argv + [f"--config.model.{name}={value}" for name, value in data.TINY.items()]


def finish(started):
    outputs = processes.outputs_of(started, timeout=240)
    assert all(process.returncode == 0 for process in started), outputs[0][-2000:]


def losses(workdir) -> dict:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """(store, work directory of a run of 20 steps on 8 devices, with fsdp=8)."""
    root = tmp_path_factory.mktemp("topology")
    dataset = data.image_dataset(root, per_class=10)
    store = data.token_store(root, dataset, data.random_teacher(root / "teacher"))
    argv = [*command(store, root / "run"), "--config.mesh.fsdp=8"]
    finish([processes.start(argv, devices=8)])
    return store, root / "run"


@pytest.mark.slow
@pytest.mark.parametrize("hosts,devices,mesh", [
    (1, 1, ""), (1, 2, "fsdp=2"), (1, 4, "tensor=2"), (2, 2, "fsdp=2"),
])  # fmt: skip
def test_a_run_resumes_on_another_mesh(full_run, tmp_path, hosts, devices, mesh):
    store, full = full_run
    workdir = shutil.copytree(full, tmp_path / "run")
    shutil.rmtree(workdir / f"checkpoints/{STEPS}")
    (workdir / "metrics.jsonl").unlink()
    argv = command(store, workdir) + ([f"--config.mesh.{mesh}"] if mesh else [])
    port = portpicker.pick_unused_port()
    multihost = [
        f"--config.hosts.coordinator=localhost:{port}",
        f"--config.hosts.num_processes={hosts}",
    ]
    finish([
        processes.start(
            argv + ([*multihost, f"--config.hosts.process_id={i}"] if hosts > 1 else []),
            devices=devices,
        )
        for i in range(hosts)
    ])  # fmt: skip
    expected, resumed = losses(full), losses(workdir)
    assert list(resumed) == list(range(11, STEPS + 1))
    for step, loss in resumed.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    ours, theirs = (
        mapping.flatten(orbax_checkpoint.load_params(path)[0]) for path in (workdir, full)
    )
    for name in theirs:
        a, b = (numbers.without_keys(name, params[name]) for params in (ours, theirs))
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), name
