"""Status and key numbers of runs in various states."""

import json
import os
import shutil

import pytest

from dgpt_jax.distributed import run_lock
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import run_summary
from tests.monitoring.metrics_log_test import write
from tests.support.paths import ROOT

NOW = 1_800_000_000
SAVED = ROOT / "tests/golden/formats/0.1/run"


def work_directory(root, lines, *, config=None, lock_age=None, bad_step=None, started=(), age=60):
    """A work directory whose last line is `age` seconds old; `started`: seconds before NOW."""
    run = write(root / "run", lines)
    defaults = {"total": "100 steps", "batch_size": 10, "log_every": 10}
    (run / "config.json").write_text(json.dumps(defaults | (config or {})))
    if lock_age is not None:
        (run / run_lock.FILE).touch()
        os.utime(run / run_lock.FILE, (NOW - lock_age,) * 2)
    if bad_step is not None:
        (run / f"bad_step_{bad_step:06d}").mkdir()
    (run / "tensorboard").mkdir()
    for seconds in started:
        (run / f"tensorboard/events.out.tfevents.{NOW - seconds}.host").touch()
        os.utime(run / "config.json", (NOW - seconds + 2,) * 2)
    os.utime(run / "metrics.jsonl", (NOW - age,) * 2)
    return run


def losses(*values, **more):
    return [{"step": 10 * i, "loss": v} | more for i, v in enumerate(values, 1)]


DONE, HALF = losses(*range(10)), losses(*range(5))


@pytest.mark.parametrize(
    ("lines", "state", "expected"),
    [
        (DONE, {}, ("finished", "finished 100 steps")),
        (losses(*range(10), skipped=3), {}, ("finished", "finished 100 steps, 3 steps skipped")),
        (HALF, {}, ("stopped", "stopped at step 50 of 100")),
        (HALF, {"lock_age": 5}, ("running", "running: step 50 of 100, last line 1m00s ago")),
        (HALF, {"lock_age": 999, "age": 999},
         ("stopped", "killed at step 50 of 100, last line 16m39s ago")),
        (HALF, {"config": {"total": "9 epochs"}}, ("stopped", "stopped at step 50")),
        (HALF, {"config": {"total": "755 examples"}}, ("stopped", "stopped at step 50 of 75")),
        (HALF, {"config": {"total": None}}, ("stopped", "stopped at step 50")),
        # Skipped from step 31: the loop notices after 10 skipped steps, at a log line.
        (HALF, {"bad_step": 31},
         ("diverged", "diverged: stopped at step 50 of 100, updates skipped from step 31 on")),
        (DONE, {"bad_step": 31}, ("finished", "finished 100 steps")),  # resumed beyond it
        (HALF, {"bad_step": 90}, ("stopped", "stopped at step 50 of 100")),  # resumed before it
        (losses(1, 1, "nan", "nan", "inf", skipped=2), {},
         ("diverged", "diverged: the loss is not finite at step 50 of 100, 2 steps skipped")),
        (losses(1, 1, 1, 1, "nan", skipped=1), {},
         ("stopped", "stopped at step 50 of 100, 1 steps skipped")),
    ],
)  # fmt: skip
def test_status(tmp_path, lines, state, expected):
    assert run_summary.read(work_directory(tmp_path, lines, **state), NOW).status == expected


def test_times(tmp_path):
    """100 steps of 10 images at 5 images/s, then 10: 100 s + 50 s of 310 s."""
    lines = [
        {"step": 10 * i, "images_per_second": 5.0 if i <= 5 else 10.0, "data_wait": 0.2 * (i > 5)}
        for i in range(1, 11)
    ]
    directory = work_directory(tmp_path, lines, started=(370, 100))
    run = run_summary.read(directory, NOW)
    assert (run.wall_seconds, run.step_seconds) == (310, 150)
    assert run.goodput == pytest.approx(150 / 310)
    assert run.data_wait == pytest.approx(0.2 * 50 / 150)
    os.utime(directory / "metrics.jsonl", (NOW - 300,) * 2)  # 70 s: not all starts are known
    assert run_summary.read(directory, NOW).goodput is None
    os.utime(directory / "config.json", (NOW, NOW))  # copied without times
    assert run_summary.read(directory, NOW).wall_seconds is None
    lines[3]["images_per_second"] = "nan"
    write(directory, lines)
    run = run_summary.read(directory, NOW)
    assert run.step_seconds is None and run.data_wait is None


def test_checkpoints_tell_epochs_parameters_and_devices(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(SAVED, run)
    file = run / "checkpoints/3/metadata/metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": {"examples": 20}}))
    summary = run_summary.read(run)
    checkpoints = summary.checkpoints
    assert summary.epochs == summary.log.last * summary.config["batch_size"] / 20 > 0
    assert checkpoints.parameters > checkpoints.encoder > 0
    assert checkpoints.mesh == {"data": 1, "fsdp": 1, "tensor": 1}
    file.write_text("{")
    damaged = run_summary.read(run).checkpoints
    assert damaged.steps == (3,) and "damaged" in damaged.error and not damaged.parameters


@pytest.mark.parametrize("text", ['{"seed"', "[1]", "3"])
def test_damaged_config(tmp_path, text):
    run = write(tmp_path / "run", DONE)
    (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        run_summary.read(run)
