"""Which checkpoints are kept, what becomes of saves that fail, and who may continue a run."""

import math
import os
import re
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

from dgpt_jax import checkpoint, loop, optim, saving, sharding, state, train
from dgpt_jax.config import Optim, Train
from dgpt_jax.schema import UserError, parse
from tests import data, processes


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    dataset = data.image_dataset(root, per_class=6)
    return data.token_store(root, dataset, data.random_teacher(root / "teacher"))


def make_state(step: int) -> state.TrainState:
    mesh = sharding.make_mesh(parse(Train, {"data": {"path": "x"}}).mesh, jax.devices()[:1])
    tx = optim.optimizer(Optim(), 1e-3)
    made = state.create(lambda key: {"w": jax.random.normal(key, (64, 64))}, tx, mesh, seed=step)
    return state.TrainState(made.step + step, made.params, made.opt_state)


def steps_in(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_newest_best_and_every_so_many_are_kept(tmp_path, monkeypatch):
    """NaN is worse than every number."""
    monkeypatch.chdir(tmp_path)
    losses = {2: math.nan, 4: 0.3, 6: 0.8, 8: math.nan}
    with saving.Checkpoints(tmp_path, keep=2, keep_every=5, best="heldout/next") as kept:
        for step in range(1, 13):
            metrics = {"heldout/next": losses[step]} if step in losses else None
            kept.save(make_state(step), {"config": {}}, metrics)
    assert steps_in(tmp_path) == [4, 5, 10, 11, 12]
    with saving.Checkpoints("knn", keep=1, best="knn/cls") as kept:  # Orbax refuses such paths
        for step, accuracy in enumerate((10.0, 70.0, math.nan, 50.0), 1):
            kept.save(make_state(step), {"config": {}}, {"knn/cls": accuracy})
    assert steps_in(tmp_path / "knn") == [2, 4]


@pytest.fixture
def breaks(monkeypatch):
    """A list: saves end in the background as it says, from its end: in that error, or well."""
    plan = []
    finish = saving.ocp.AsyncCheckpointer._save_step_metadata

    def finish_or_fail(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread() and plan and plan.pop():
            raise RuntimeError("connection lost")
        return finish(*args, **kwargs)

    monkeypatch.setattr(saving.ocp.AsyncCheckpointer, "_save_step_metadata", finish_or_fail)
    return plan


def test_a_save_that_failed_in_the_background_is_told_without_waiting(tmp_path, breaks):
    with saving.Checkpoints(tmp_path, keep=2) as kept:
        kept.save(make_state(1), {"config": {}})
        assert not kept.failed(wait=True) and not kept.failed()
        breaks.append(True)
        kept.save(make_state(2), {"config": {}})
        deadline = time.monotonic() + 30
        while not (failed := kept.failed()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert failed and not kept.failed() and kept.latest() == 1
        kept.save(make_state(2), {"config": {}})  # the same step, as at a run's end
    assert steps_in(tmp_path) == [1, 2]


def test_the_next_save_takes_the_place_of_one_that_failed_and_the_third_is_fatal(tmp_path, breaks):
    breaks.extend([True, True, True, False, True, True])
    fatal = pytest.raises(RuntimeError, match="connection lost")
    with fatal, saving.Checkpoints(tmp_path, keep=9) as kept:
        for step in range(1, 9):  # nobody asks in between
            kept.save(make_state(step), {"config": {}})
    assert step == 7 and steps_in(tmp_path) == [3]


def test_a_save_that_orbax_declines_is_made_again(tmp_path, monkeypatch):
    with saving.Checkpoints(tmp_path, keep=2) as kept:
        save, declined = kept._manager.save, [True]
        monkeypatch.setattr(
            kept._manager,
            "save",
            lambda *a, **k: not (declined and declined.pop()) and save(*a, **k),
        )
        kept.save(make_state(1), {"config": {}})
        kept.save(make_state(2), {"config": {}})
    assert steps_in(tmp_path) == [1, 2] and not declined
    older = pytest.raises(RuntimeError, match="step 1 was not saved: .* holds step 2")
    with saving.Checkpoints(tmp_path, keep=2) as kept, older:
        kept.save(make_state(1), {"config": {}})


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_run_waits_for_the_save_in_flight(tmp_path, monkeypatch, error):
    closed, finalize = [], saving.ocp.CheckpointManager._finalize
    close = saving.ocp.CheckpointManager.close

    def slowly(*args):
        time.sleep(0.3)
        finalize(*args)

    monkeypatch.setattr(saving.ocp.CheckpointManager, "_finalize", slowly)
    monkeypatch.setattr(
        saving.ocp.CheckpointManager, "close", lambda self: (closed.append(True), close(self))
    )
    with pytest.raises(error), saving.Checkpoints(tmp_path, keep=2) as kept:
        kept.save(make_state(1), {"config": {}})
        raise error
    assert closed and not kept._manager.is_saving_in_progress() and steps_in(tmp_path) == [1]


def test_the_loop_saves_again_what_failed(store, tmp_path, breaks, monkeypatch, capfd):
    """One that is noticed in the middle of the run, one of the last step, with what it measured."""
    saved, save, failed = [], saving.Checkpoints.save, saving.Checkpoints.failed

    def counted(self, train_state, metadata, metrics=None):
        saved.append((int(train_state.step), metrics))
        save(self, train_state, metadata, metrics)

    monkeypatch.setattr(saving.Checkpoints, "save", counted)
    monkeypatch.setattr(saving.Checkpoints, "failed", lambda self, **_: failed(self, wait=True))
    breaks.extend([False, True, False, True])
    evaluators = [lambda _: {"heldout/next": 0.5}]
    monkeypatch.setattr(loop.pretraining, "periodic", lambda *_: evaluators)
    monkeypatch.setattr(loop.pretraining, "measured", lambda _: ["heldout/next"])
    run = settings(
        store, checkpoint={"every": "2 steps", "best": "heldout/next"}, log_every=1,
        total="4 steps", evals={"every": "4 steps"},
    )  # fmt: skip
    assert train.train(run, tmp_path / "run") == 0
    assert [step for step, _ in saved] == [2, 3, 4, 4]
    assert [bool(metrics) for _, metrics in saved] == [False, False, True, True]
    assert steps_in(tmp_path / "run") == [3, 4] and not breaks
    said = capfd.readouterr().err
    assert "a checkpoint could not be written: once more" in said
    assert "the last checkpoint could not be written: once more" in said


def test_a_due_save_after_one_that_failed_is_made_once(store, tmp_path, breaks, monkeypatch):
    """That of step 2 fails, which is noticed at step 4, where one is due."""
    saved, save = [], saving.Checkpoints.save
    monkeypatch.setattr(
        saving.Checkpoints,
        "save",
        lambda self, made, *rest: (saved.append(int(made.step)), save(self, made, *rest))[0],
    )
    breaks.extend([False, True])
    run = settings(store, checkpoint={"every": "2 steps"}, log_every=4, total="4 steps")
    assert train.train(run, tmp_path / "run") == 0
    assert saved == [2, 4] and steps_in(tmp_path / "run") == [4]


def fail_once():
    """In a process of its own: a save whose directory cannot be made, and the next."""
    plan, create = [True], atomicity.AtomicRenameTemporaryPath.create

    async def create_or_fail(self, *args, **kwargs):
        if plan:
            plan.pop()
            raise RuntimeError("connection lost")
        return await create(self, *args, **kwargs)

    atomicity.AtomicRenameTemporaryPath.create = create_or_fail
    with tempfile.TemporaryDirectory() as scratch, saving.Checkpoints(scratch, keep=2) as kept:
        kept.save(make_state(1), {"config": {}})
        assert kept.failed(wait=True)
        kept.save(make_state(2), {"config": {}})
    print("saved at", time.time())


def test_a_process_ends_after_a_save_that_failed(capfd):
    """And does not wait for Orbax's threads, which wait 300 s."""
    processes.on_devices(1, fail_once)
    ended = time.time()
    assert ended - float(re.search(r"saved at ([\d.]+)", capfd.readouterr().out)[1]) < 60


def settings(store, **changes) -> Train:
    return parse(Train, {
        "total": "2 steps", "batch_size": 4, "dtype": "float32", "log_every": 2,
        "model": data.TINY, "data": {"path": str(store), "threads": 2},
        "optim": {"warmup": "1 steps"}, "checkpoint": {"every": "2 steps"},
    } | changes)  # fmt: skip


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """The work directory of a finished run."""
    workdir = tmp_path_factory.mktemp("run")
    assert train.train(settings(store), workdir) == 0
    return workdir


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"total": "4 steps"}, "config.total is '4 steps', in the checkpoint of step 2 '2 steps'"),
        ({"seed": 1}, "config.seed is 1"),
        ({"batch_size": 8}, "config.batch_size is 8"),
        ({"optim": {"warmup": "1 steps", "blr": 0.1}}, "config.optim.blr is 0.1"),
        (
            {"data": {"order": "raster"}, "loss": {"next": 2.0}},
            "config.data.order is 'raster'.*and 1 more",
        ),
    ],
)
def test_another_run_is_refused(store, run, changes, named):
    changes["data"] = {"path": str(store), "threads": 2} | changes.get("data", {})
    with pytest.raises(UserError, match=f"{named}.*--allow_config_change"):
        train.train(settings(store, **changes), run)
    assert steps_in(run) == [2]


def test_what_changes_nothing_is_only_said_and_the_rest_can_be_allowed(store, run, tmp_path, capfd):
    workdir = shutil.copytree(run, tmp_path / "run")
    same = {"log_every": 1, "accum_steps": 2, "data": {"path": str(store), "threads": 1}}
    assert train.train(settings(store, **same), workdir) == 0
    assert "config.log_every is 1, in the checkpoint of step 2 2" in capfd.readouterr().err
    longer = settings(store, total="4 steps")
    assert train.train(longer, workdir, allow_config_change=True) == 0
    assert steps_in(workdir) == [2, 4]
    with pytest.raises(UserError, match="config.model.depth is 2.*choose another --workdir"):
        deeper = settings(store, model=data.TINY | {"depth": 2, "taps": (1, 2)})
        train.train(deeper, workdir, allow_config_change=True)


def test_formats_of_other_versions(store, run, tmp_path):
    for found, message in ((99, "checkpoint format 99, this code reads 3"),
                           (1, "training states of format 1, this code continues 2")):  # fmt: skip
        workdir = shutil.copytree(run, tmp_path / str(found))
        data.edit_metadata(workdir / "checkpoints/2", lambda made, n=found: made.update(format=n))
        with pytest.raises(UserError, match=message):
            train.train(settings(store), workdir)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB of its own, and a function that makes it read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=False)
    if made.returncode:
        pytest.skip("this needs the right to mount")
    try:
        yield place, lambda: subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_does_not_take_checkpoints(store, small_disk, fault):
    place, make_read_only = small_disk
    with saving.Checkpoints(place, keep=5) as kept:
        kept.save(make_state(1), {"config": {}})
        assert not kept.failed(wait=True)
        if fault == "full":
            (place / "fill").write_bytes(bytes(os.statvfs(place).f_bavail * 4096 - 20_000))
        else:
            make_read_only()
        what = "no space left for" if fault == "full" else "no permission to write"
        with pytest.raises(UserError, match=rf"{what} a checkpoint in .*step: 1\)"):
            kept.save(make_state(2), {"config": {}})
            kept.failed(wait=True)
    params, metadata = checkpoint.load_params(place)
    assert metadata["step"] == 1
    np.testing.assert_array_equal(params["w"], make_state(1).params["w"])


def soak():
    """In a process of its own: fifty saves do not grow it."""
    process, sizes = psutil.Process(), []
    big = state.TrainState(
        jax.numpy.zeros((), "int32"), {"w": jax.numpy.ones((1 << 22,))}, make_state(0).opt_state
    )  # 16 MB
    with (
        tempfile.TemporaryDirectory() as scratch,
        saving.Checkpoints(scratch, keep=2) as kept,
    ):
        for step in range(1, 51):
            saved = state.TrainState(big.step + step, big.params, big.opt_state)
            kept.save(saved, {"config": {}})
            assert not kept.failed(wait=True)
            sizes.append(process.memory_info().rss)
    grown = (np.median(sizes[-5:]) - np.median(sizes[5:10])) / 2**20
    print(f"grown by {grown:.0f} MiB from save 10 to save 50")
    assert grown < 48, sizes


@pytest.mark.slow
def test_fifty_saves_do_not_grow_the_process():
    processes.on_devices(1, soak)
