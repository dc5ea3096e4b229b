"""Which checkpoints are checkpoints, failed saves, and which configs may resume a run."""

import math
import os
import shutil
import subprocess
import tempfile
import threading
import time

import jax
import numpy as np
import psutil
import pytest
from orbax.checkpoint._src.path import atomicity

from dgpt_jax import train
from dgpt_jax.config import OptimConfig, TrainConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.storage import checkpoint_metadata, orbax_checkpoint
from dgpt_jax.training import checkpointing, loop, optimizer, train_step
from tests.support import data, processes


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    dataset = data.image_dataset(root, per_class=6)
    return data.token_store(root, dataset, data.random_teacher(root / "teacher"))


def make_state(step: int) -> train_step.TrainState:
    mesh = sharding.make_mesh(parse(TrainConfig, {"data": {"path": "x"}}).mesh, jax.devices()[:1])
    tx = optimizer.optimizer(OptimConfig(), 1e-3)
    state = train_step.init_state(
        lambda key: {"w": jax.random.normal(key, (64, 64))}, tx, mesh, seed=step
    )
    return train_step.TrainState(state.step + step, state.params, state.opt_state)


def steps_in(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_newest_best_and_every_n_are_kept(tmp_path, monkeypatch):
    """NaN is worse than any number."""
    monkeypatch.chdir(tmp_path)
    losses = {2: math.nan, 4: 0.3, 6: 0.8, 8: math.nan}
    with checkpointing.Checkpoints(
        tmp_path, keep=2, keep_every=5, best="heldout/next"
    ) as checkpoints:
        for step in range(1, 13):
            metrics = {"heldout/next": losses[step]} if step in losses else None
            checkpoints.save(make_state(step), {"config": {}}, metrics)
    assert steps_in(tmp_path) == [4, 5, 10, 11, 12]
    with checkpointing.Checkpoints("knn", keep=1, best="knn/cls") as checkpoints:  # relative path
        for step, accuracy in enumerate((10.0, 70.0, math.nan, 50.0), 1):
            checkpoints.save(make_state(step), {"config": {}}, {"knn/cls": accuracy})
    assert steps_in(tmp_path / "knn") == [2, 4]


@pytest.fixture
def failures(monkeypatch):
    """A list of which saves fail in the background, in reverse order."""
    plan = []
    finish = checkpointing.ocp.AsyncCheckpointer._save_step_metadata

    def finish_or_fail(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread() and plan and plan.pop():
            raise RuntimeError("connection lost")
        return finish(*args, **kwargs)

    monkeypatch.setattr(checkpointing.ocp.AsyncCheckpointer, "_save_step_metadata", finish_or_fail)
    return plan


def test_a_failed_save_is_reported_without_waiting(tmp_path, failures):
    with checkpointing.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(make_state(1), {"config": {}})
        assert not checkpoints.last_save_failed(wait=True) and not checkpoints.last_save_failed()
        failures.append(True)
        checkpoints.save(make_state(2), {"config": {}})
        deadline = time.monotonic() + 30
        while not (failed := checkpoints.last_save_failed()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert failed and not checkpoints.last_save_failed() and checkpoints.latest() == 1
        checkpoints.save(make_state(2), {"config": {}})  # the same step, as at the end of a run
    assert steps_in(tmp_path) == [1, 2]


def test_failed_saves_are_retried_and_the_third_in_a_row_is_fatal(tmp_path, failures):
    failures.extend([True, True, True, False, True, True])
    fatal = pytest.raises(RuntimeError, match="connection lost")
    with fatal, checkpointing.Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 9):  # without calls of last_save_failed
            checkpoints.save(make_state(step), {"config": {}})
    assert step == 7 and steps_in(tmp_path) == [3]


def test_a_save_that_orbax_declines_is_retried(tmp_path, monkeypatch):
    with checkpointing.Checkpoints(tmp_path, keep=2) as checkpoints:
        save, declined = checkpoints._manager.save, [True]
        monkeypatch.setattr(
            checkpoints._manager,
            "save",
            lambda *a, **k: not (declined and declined.pop()) and save(*a, **k),
        )
        checkpoints.save(make_state(1), {"config": {}})
        checkpoints.save(make_state(2), {"config": {}})
    assert steps_in(tmp_path) == [1, 2] and not declined
    older = pytest.raises(RuntimeError, match="step 1 .*step 2")
    with checkpointing.Checkpoints(tmp_path, keep=2) as checkpoints, older:
        checkpoints.save(make_state(1), {"config": {}})


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_errors_wait_for_the_save_in_flight(tmp_path, monkeypatch, error):
    closed, finalize = [], checkpointing.ocp.CheckpointManager._finalize
    close = checkpointing.ocp.CheckpointManager.close

    def slowly(*args):
        time.sleep(0.3)
        finalize(*args)

    monkeypatch.setattr(checkpointing.ocp.CheckpointManager, "_finalize", slowly)
    monkeypatch.setattr(
        checkpointing.ocp.CheckpointManager,
        "close",
        lambda self: (closed.append(True), close(self)),
    )
    with pytest.raises(error), checkpointing.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(make_state(1), {"config": {}})
        raise error
    assert closed and not checkpoints._manager.is_saving_in_progress() and steps_in(tmp_path) == [1]


@pytest.mark.slow
def test_the_loop_retries_failed_saves(store, tmp_path, failures, monkeypatch, capfd):
    """One during the run, and that of the last step, with its evaluation results."""
    saved, save = [], checkpointing.Checkpoints.save
    last_save_failed = checkpointing.Checkpoints.last_save_failed

    def counted(self, train_state, metadata, metrics=None):
        saved.append((int(train_state.step), metrics))
        save(self, train_state, metadata, metrics)

    monkeypatch.setattr(checkpointing.Checkpoints, "save", counted)
    monkeypatch.setattr(
        checkpointing.Checkpoints,
        "last_save_failed",
        lambda self, **_: last_save_failed(self, wait=True),
    )
    failures.extend([False, True, False, True])
    evaluators = [lambda _: {"heldout/next": 0.5}]
    monkeypatch.setattr(loop.pretraining, "make_evaluators", lambda *_: evaluators)
    monkeypatch.setattr(loop.pretraining, "metric_names", lambda _: ["heldout/next"])
    run = settings(
        store, checkpoint={"every": "2 steps", "best": "heldout/next"}, log_every=1,
        total="4 steps", evals={"every": "4 steps"},
    )  # fmt: skip
    assert train.train(run, tmp_path / "run") == 0
    assert [step for step, _ in saved] == [2, 3, 4, 4]
    assert [bool(metrics) for _, metrics in saved] == [False, False, True, True]
    assert steps_in(tmp_path / "run") == [3, 4] and not failures
    log = capfd.readouterr().err
    assert "a checkpoint could not be written" in log
    assert "the last checkpoint could not be written" in log


@pytest.mark.slow
def test_a_retry_at_a_due_step_saves_once(store, tmp_path, failures, monkeypatch):
    """The save of step 2 fails, which is detected at step 4, where one is due."""
    saved, save = [], checkpointing.Checkpoints.save
    monkeypatch.setattr(
        checkpointing.Checkpoints,
        "save",
        lambda self, state, *rest: (saved.append(int(state.step)), save(self, state, *rest))[0],
    )
    failures.extend([False, True])
    run = settings(store, checkpoint={"every": "2 steps"}, log_every=4, total="4 steps")
    assert train.train(run, tmp_path / "run") == 0
    assert saved == [2, 4] and steps_in(tmp_path / "run") == [4]


def fail_once():
    """In a separate process: a save whose directory cannot be created, and the next one."""
    plan, create = [True], atomicity.AtomicRenameTemporaryPath.create

    async def create_or_fail(self, *args, **kwargs):
        if plan:
            plan.pop()
            raise RuntimeError("connection lost")
        return await create(self, *args, **kwargs)

    atomicity.AtomicRenameTemporaryPath.create = create_or_fail
    with (
        tempfile.TemporaryDirectory() as scratch,
        checkpointing.Checkpoints(scratch, keep=2) as checkpoints,
    ):
        checkpoints.save(make_state(1), {"config": {}})
        assert checkpoints.last_save_failed(wait=True)
        checkpoints.save(make_state(2), {"config": {}})


def test_a_process_exits_after_a_failed_save():
    """Without waiting for Orbax's threads, which wait 300 s."""
    processes.on_devices(1, fail_once, timeout=240)


def settings(store, **changes) -> TrainConfig:
    return parse(TrainConfig, {
        "total": "2 steps", "batch_size": 4, "dtype": "float32", "log_every": 2,
        "model": data.TINY, "data": {"path": str(store), "threads": 2},
        "optim": {"warmup": "1 steps"}, "checkpoint": {"every": "2 steps"},
    } | changes)  # fmt: skip


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """Work directory of a finished run."""
    workdir = tmp_path_factory.mktemp("run")
    assert train.train(settings(store), workdir) == 0
    return workdir


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"total": "4 steps"}, "config.total is '4 steps', .* step 2 '2 steps'"),
        ({"seed": 1}, "config.seed is 1"),
        ({"batch_size": 8}, "config.batch_size is 8"),
        ({"optim": {"warmup": "1 steps", "blr": 0.1}}, "config.optim.blr is 0.1"),
        (
            {"data": {"order": "raster"}, "loss": {"next": 2.0}},
            "config.data.order is 'raster'.* 1 more",
        ),
    ],
)
def test_a_changed_config_is_refused(store, run, changes, message):
    changes["data"] = {"path": str(store), "threads": 2} | changes.get("data", {})
    with pytest.raises(UserError, match=f"{message}.*--allow_config_change"):
        train.train(settings(store, **changes), run)
    assert steps_in(run) == [2]


def test_resumable_changes_are_logged_and_others_can_be_allowed(store, run, tmp_path, capfd):
    workdir = shutil.copytree(run, tmp_path / "run")
    same = {"log_every": 1, "accum_steps": 2, "data": {"path": str(store), "threads": 1}}
    assert train.train(settings(store, **same), workdir) == 0
    assert "config.log_every is 1" in capfd.readouterr().err
    longer = settings(store, total="4 steps")
    assert train.train(longer, workdir, allow_config_change=True) == 0
    assert steps_in(workdir) == [2, 4]
    with pytest.raises(UserError, match="config.model.depth is 2.*--workdir"):
        deeper = settings(store, model=data.TINY | {"depth": 2, "taps": (1, 2)})
        train.train(deeper, workdir, allow_config_change=True)


def test_formats_of_other_versions(store, run, tmp_path):
    supported = checkpoint_metadata.FORMAT
    for version, message in (
        (99, f"format 99.* {supported}"),
        (1, f"format 1,.* {supported}: .*--workdir"),
    ):
        workdir = shutil.copytree(run, tmp_path / str(version))
        data.edit_metadata(
            workdir / "checkpoints/2", lambda metadata, n=version: metadata.update(format=n)
        )
        with pytest.raises(UserError, match=message):
            train.train(settings(store), workdir)


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of 8 MB, and a function that makes it read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=False)
    if mount.returncode:
        pytest.skip("mounting is not permitted")
    try:
        yield disk, lambda: subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_full_or_read_only_disk_is_a_user_error(store, small_disk, fault):
    disk, make_read_only = small_disk
    with checkpointing.Checkpoints(disk, keep=5) as checkpoints:
        checkpoints.save(make_state(1), {"config": {}})
        assert not checkpoints.last_save_failed(wait=True)
        if fault == "full":
            (disk / "fill").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 20_000))
        else:
            make_read_only()
        problem = "no space left" if fault == "full" else "no permission"
        with pytest.raises(UserError, match=rf"{problem} .*{disk}.*step: 1\)"):
            checkpoints.save(make_state(2), {"config": {}})
            checkpoints.last_save_failed(wait=True)
    params, metadata = orbax_checkpoint.load_params(disk)
    assert metadata["step"] == 1
    np.testing.assert_array_equal(params["w"], make_state(1).params["w"])


def soak():
    """In a separate process: memory after fifty saves."""
    process, sizes = psutil.Process(), []
    big = train_step.TrainState(
        jax.numpy.zeros((), "int32"), {"w": jax.numpy.ones((1 << 22,))}, make_state(0).opt_state
    )  # 16 MB
    with (
        tempfile.TemporaryDirectory() as scratch,
        checkpointing.Checkpoints(scratch, keep=2) as checkpoints,
    ):
        for step in range(1, 51):
            saved = train_step.TrainState(big.step + step, big.params, big.opt_state)
            checkpoints.save(saved, {"config": {}})
            assert not checkpoints.last_save_failed(wait=True)
            sizes.append(process.memory_info().rss)
    grown = (np.median(sizes[-5:]) - np.median(sizes[5:10])) / 2**20
    print(f"grown by {grown:.0f} MiB from save 10 to save 50")
    assert grown < 48, sizes


@pytest.mark.slow
def test_fifty_saves_do_not_leak_memory():
    processes.on_devices(1, soak)
