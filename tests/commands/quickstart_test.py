"""The quickstart's flags, settings, order of commands, and page."""

import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from dgpt_jax import cli
from dgpt_jax.commands import quickstart, quickstart_page
from dgpt_jax.errors import UserError
from dgpt_jax.examples import image_sets, measure
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    "words,code,text",
    [
        (["--help"], 0, "--steps=N"),
        (["--image=digits"], 1, "error: unknown flag or value: --image=digits (see --help)"),
        (["--images=digit"], 1, "--images=digit"),
        (["--out="], 1, "--out="),
        (["--steps=0"], 1, "--steps=0"),
        (["--steps=x"], 1, "--steps=x"),
    ],
)
def test_flags_before_the_installation(tmp_path, words, code, text):
    env = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": "/nonexistent"}
    process = subprocess.run(
        [ROOT / "tools/quickstart.sh", *words], env=env, capture_output=True, text=True
    )
    assert process.returncode == code and text in process.stdout + process.stderr
    assert not list(tmp_path.iterdir())


def test_the_script_knows_the_flags_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart", "--help"])
    with pytest.raises(SystemExit):
        cli.run(quickstart.main)
    script = (ROOT / "tools/quickstart.sh").read_text()
    flags = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert flags == {"--help", "--images", "--out", "--steps"}
    words = [*flags, *(f"--images={name}" for name in image_sets.SETS)]
    assert all(word in script for word in words)


def test_settings_of_a_directory_are_fixed(tmp_path):
    settings = {"images": "scenes", "steps": None}
    quickstart.check_settings(tmp_path / "a", settings)
    quickstart.check_settings(tmp_path / "a", settings)
    with pytest.raises(UserError, match="--images=scenes, not digits: choose another --out"):
        quickstart.check_settings(tmp_path / "a", settings | {"images": "digits"})
    (tmp_path / "b/pictures").mkdir(parents=True)
    with pytest.raises(UserError, match="earlier version"):
        quickstart.check_settings(tmp_path / "b", settings)


@pytest.mark.parametrize("images", image_sets.SETS)
def test_commands_are_in_order(tmp_path, images):
    commands = list(quickstart.all_jobs(tmp_path, images, 10))
    names = [job.name for job in commands]
    assert len(set(names)) == len(names)
    for i, job in enumerate(commands):
        assert set(job.after) <= set(names[:i]), job.name
    measured = [word for job in commands if "measure" in job.name for word in job.words]
    assert all(measured.count(name) == 1 for name in measure.ROWS)
    lines = [line for job in commands for line in quickstart_page.shown(job, tmp_path).split("\n")]
    assert any(line.startswith("dgpt tokens ") for line in lines)


def test_steps_of_the_teacher(tmp_path):
    """In proportion to those of the pretraining, which the config gives."""
    config = runpy.run_path(str(ROOT / "configs/quickstart.py"))["get_config"]()
    assert config.total == f"{quickstart.STEPS} steps"
    for images, steps, words in (
        ("scenes", None, []),
        ("scenes", 10, ["--steps=25"]),
        ("glyphs", 1200, ["--steps=1200"]),
    ):
        assert list(quickstart.train_teacher(tmp_path, images, steps).words[5:]) == words


def test_the_table(tmp_path):
    (tmp_path / "accuracy").mkdir()
    for i, name in enumerate(measure.ROWS):
        values = {"knn 5": [10.0 + i, 20.0 + i, 30.0 + i], "linear all": [50.0 + i]}
        (tmp_path / "accuracy" / f"{name}.json").write_text(json.dumps(values))
    cells = quickstart_page.cells(tmp_path)
    mean, error = cells["D-iGPT both"]["knn", "5"]
    assert mean == 25.0 and np.isclose(error, 10 / 3**0.5)
    assert cells["the teacher"]["linear", "all"] == (56.0, 0.0)
    lines = quickstart_page.text_table(tmp_path).splitlines()
    assert lines[0] == "| features | knn 5 | linear all |" and len(lines) == 2 + len(measure.ROWS)
