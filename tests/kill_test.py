"""Runs that are killed outright, again and again, end as if nothing had been (`pytest -m slow`)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dgpt_jax import checkpoint
from tests.data import image_dataset, random_teacher, token_store

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", "20"))
STEPS = 60


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    dataset = image_dataset(tmp_path, per_class=10)
    store = token_store(tmp_path, dataset, random_teacher(tmp_path / "teacher"), views=2)
    words = [
        sys.executable, "-m", "dgpt_jax.train", f"--config={ROOT / 'configs/quickstart.py'}",
        f"--config.data.path={store}", "--config.model.image_size=16", "--config.model.width=24",
        "--config.model.depth=2", "--config.model.heads=2", f"--config.total={STEPS} steps",
        "--config.batch_size=8", "--config.log_every=1", "--config.checkpoint.every=4 steps",
    ]  # fmt: skip

    def start(name: str) -> subprocess.Popen:
        with (tmp_path / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [*words, f"--workdir={tmp_path / name}"], cwd=ROOT, stdout=log, stderr=log
            )

    def losses(name: str) -> dict:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in lines]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    began = time.monotonic()
    assert start("whole").wait() == 0
    duration = time.monotonic() - began
    whole, _ = checkpoint.load_params(tmp_path / "whole")
    expected = losses("whole")
    rng = np.random.default_rng(0)
    killed = rounds = in_a_save = 0
    while killed < KILLS:
        name, rounds = f"killed{rounds}", rounds + 1
        while True:  # until the run comes to its end
            process = start(name)
            try:
                process.wait(timeout=rng.uniform(0.5, 1) * duration if killed < KILLS else None)
                break
            except subprocess.TimeoutExpired:
                if killed % 2:  # every other one in the middle of a save
                    saving = tmp_path / name / "checkpoints"
                    while process.poll() is None and not list(
                        saving.glob("*orbax-checkpoint-tmp*")
                    ):
                        time.sleep(0.0005)
                    in_a_save += process.poll() is None
                process.kill()
                process.wait()
                killed += 1
        assert process.returncode == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
        params, metadata = checkpoint.load_params(tmp_path / name)
        assert metadata["step"] == STEPS
        jax.tree.map(np.testing.assert_array_equal, whole, params)
        assert losses(name) == expected
    assert in_a_save or KILLS < 4
    print(f"{killed} kills in {rounds} runs, {in_a_save} in the middle of a save")
