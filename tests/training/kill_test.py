"""Runs killed repeatedly end with the same parameters and losses (`pytest -m slow`)."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.storage import orbax_checkpoint
from tests.support.data import image_dataset, random_teacher, token_store
from tests.support.paths import ROOT

KILLS = int(os.environ.get("KILLS", "20"))
STEPS = 60


@pytest.mark.slow
def test_runs_killed_at_random_times_resume(tmp_path):
    dataset = image_dataset(tmp_path, per_class=10)
    store = token_store(tmp_path, dataset, random_teacher(tmp_path / "teacher"), views=2)
    argv = [
        sys.executable, "-m", "dgpt_jax.train", f"--config={ROOT / 'configs/quickstart.py'}",
        f"--config.data.path={store}", "--config.model.image_size=16", "--config.model.width=24",
        "--config.model.depth=2", "--config.model.heads=2", f"--config.total={STEPS} steps",
        "--config.batch_size=8", "--config.log_every=1", "--config.checkpoint.every=4 steps",
    ]  # fmt: skip

    def start(name: str) -> subprocess.Popen:
        with (tmp_path / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [*argv, f"--workdir={tmp_path / name}"], cwd=ROOT, stdout=log, stderr=log
            )

    def losses(name: str) -> dict:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in lines]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def newest_step(name: str) -> int:
        file = tmp_path / name / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        try:
            return json.loads(lines[-1])["step"] if lines else 0
        except ValueError:  # incomplete line
            return 0

    def is_saving(name: str, since: float) -> bool:
        for path in (tmp_path / name / "checkpoints").glob("*.orbax-checkpoint-tmp"):
            with contextlib.suppress(FileNotFoundError):  # renamed on completion
                if path.stat().st_mtime > since:  # else left by an earlier kill
                    return True
        return False

    assert start("full").wait() == 0
    full_params, _ = orbax_checkpoint.load_params(tmp_path / "full")
    expected = losses("full")
    rng = np.random.default_rng(0)
    killed = rounds = in_a_save = 0

    def complete(name: str) -> list[int]:
        try:
            return orbax_checkpoint.steps(tmp_path / name)
        except UserError:  # no checkpoint yet
            return []

    while killed < KILLS:
        name, rounds, newest = f"killed{rounds}", rounds + 1, []
        while True:  # until the run finishes
            process, began = start(name), time.time()
            reached = newest_step(name)
            target = reached + rng.integers(1, STEPS // 3)
            kill = killed < KILLS and target < STEPS
            while kill and process.poll() is None and newest_step(name) < target:
                time.sleep(0.001)
            if killed % 2:  # every other one during a save
                while kill and process.poll() is None and not is_saving(name, began):
                    time.sleep(0.0002)
            if not kill or process.poll() is not None:
                process.wait()
                break
            process.kill()
            process.wait()
            in_a_save += is_saving(name, began)
            killed += 1
            newest += complete(name)[-1:]
        assert process.returncode == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
        log = (tmp_path / f"{name}.log").read_text()
        assert [int(step) for step in re.findall(r"resuming from step (\d+)", log)] == newest
        params, metadata = orbax_checkpoint.load_params(tmp_path / name)
        assert metadata["step"] == STEPS
        jax.tree.map(np.testing.assert_array_equal, full_params, params)
        assert losses(name) == expected
    assert in_a_save >= KILLS // 4
    print(f"{killed} kills in {rounds} runs, {in_a_save} during a save")
