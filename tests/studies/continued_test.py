"""The study of continued pretraining, and curves as CSV."""

import dataclasses
import math
import sys

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.config import TrainConfig, schema
from dgpt_jax.errors import UserError
from dgpt_jax.examples import image_sets
from tests.monitoring.metrics_log_test import write
from tests.support.paths import ROOT
from tools.studies import ablate, continued, curves, figures, result_tables

STEPS = np.array([10, 20, 30, 40])


def curve(*losses):
    return STEPS, np.array(losses)


@pytest.mark.parametrize(
    ("losses", "loss", "step"),
    [
        ((4.0, 3.0, 2.0, 1.0), 3.0, 20),
        ((4.0, 3.0, 2.0, 1.0), 2.25, 27.5),  # between two points
        ((4.0, 3.0, 3.5, 1.0), 3.2, 18),  # the first time, though it rises again
        ((4.0, 3.0, 2.0, 1.0), 5.0, 10),  # an upper bound
        ((4.0, 3.0, 2.0, 1.0), 0.5, math.nan),
    ],
)
def test_steps_until_a_loss(losses, loss, step):
    np.testing.assert_equal(continued.steps_to(curve(*losses), loss), step)


def test_the_table_pairs_seeds():
    """Half the steps with one seed, a quarter with another: 50 % and 75 % fewer."""
    scratch = curve(8.0, 6.0, 4.0, 2.0)
    pairs = [(scratch, curve(6.0, 2.0, 1.0, 0.5)), (scratch, curve(2.0, 1.5, 1.0, 0.5))]
    *_, last = continued.reach_table(pairs)
    assert last[0] == "100% of its steps" and last[1].startswith("2.0000")
    assert last[3].startswith("15 ±") and last[4].startswith("62.5 ±")
    # By hand: deviation 17.7 of two values; t of one degree of freedom is 12.71.
    assert float(last[4].split()[-1]) == pytest.approx(12.706 * 12.5, abs=0.1)
    pairs[1] = scratch, curve(8.0, 6.0, 4.0, 3.0)
    assert continued.reach_table(pairs)[-1][4] == "not reached in 1 of 2"


def test_curves_are_means_and_paired_differences():
    pairs = [(curve(4, 3, 2, 1), curve(3, 2, 1, 0)), (curve(6, 5, 4, 3), curve(4, 3, 2, 1))]
    head, first, *_ = continued.curve_table(pairs)
    assert head[1:3] == [f"held-out loss: {row}" for row in continued.ROWS]
    assert first[:4] == ["10", "5.0000", "3.5000", "-1.5000"]
    assert float(first[4]) == pytest.approx(12.706 * 0.5, abs=1e-3)


def base() -> TrainConfig:
    return schema.parse(TrainConfig, cli.load_config(f"{ROOT}/configs/study.py"))


def test_rows_differ_only_in_the_start(tmp_path):
    """Both have the same data, held-out data, schedule and seed; decoders are fresh."""
    scratch, started = (
        schema.flatten(schema.to_dict(continued.config_of(row, 2, base(), tmp_path)))
        for row in continued.ROWS
    )
    assert {key for key in scratch if scratch[key] != started[key]} == {"init.weights"}
    assert started["init.weights"].endswith("runs/digits/seed2") and not scratch["init.weights"]
    assert scratch["seed"] == 2 and scratch["evals.heldout"].endswith("glyphs/tokens_test")
    assert scratch["data.path"].endswith("glyphs/tokens")
    digits = continued.config_of(continued.DIGITS, 2, base(), tmp_path)
    assert digits.data.path.endswith("digits/tokens") and not digits.evals.heldout


@pytest.fixture
def stub(monkeypatch):
    """Replaces data and trainings; the keys of the executed runs, in order."""
    keys = []

    def execute(row, seed, *_):
        keys.append((row, seed))
        if len(keys) == 4:
            raise KeyboardInterrupt
        line = {"run": row, "seed": seed, "cpu_seconds": 1.0}
        if row != continued.DIGITS:
            started = row == continued.CONTINUED
            losses = np.array([4.0, 3.0, 2.0, 1.0]) - 0.5 * started - seed / 8
            accuracy = {"knn 5": 50.0 + seed, "linear all": 60.0 + seed * started}
            line |= {"steps": STEPS.tolist(), "heldout": losses.tolist(), "accuracy": accuracy}
        return line

    monkeypatch.setattr(continued, "execute", execute)
    monkeypatch.setattr(continued, "prepare", lambda *_: {})
    return keys


def test_a_killed_study_resumes(stub, tmp_path, monkeypatch, capsys):
    argv = ["continued.py", f"--out={tmp_path}", "--seeds=2"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.run(continued.main)
    assert ended.value.code == 130 and len(ablate.read_results(tmp_path)) == 3
    cli.run(continued.main)
    assert stub[3] == stub[4] and len(set(stub)) == 6
    assert "next: " in capsys.readouterr().out.splitlines()[-1]
    rows = result_tables.read(tmp_path / "continued.csv")
    assert len(rows) == 1 + len(continued.SHARES)
    accuracies, differences, baseline = result_tables.study(tmp_path / "continued_accuracy.csv")
    assert baseline == continued.SCRATCH and accuracies[baseline]["knn 5"][0] == 50.5
    assert differences[continued.CONTINUED]["linear all"][0] == 0.5
    assert min(Image.open(tmp_path / "curve_continued.png").size) > 200
    monkeypatch.setattr(sys, "argv", [*argv, "--config.optim.blr=1.0"])
    with pytest.raises(SystemExit, match="optim.blr 0.006.*--out"):
        cli.run(continued.main)


LINES = [
    {"step": 5, "loss": 1.0},
    {"step": 10, "heldout/next": 2.0, "knn/mean": 0.5},
    {"step": 20, "heldout/next": 1.5},
    {"step": 30, "heldout/next": 1.25, "knn/mean": 0.75},
]


def test_evaluations_of_a_run_as_a_curve(tmp_path, monkeypatch):
    run, out = write(tmp_path / "run", LINES), tmp_path / "curve_x.csv"
    argv = ["curves.py", str(run), "--metrics=heldout/next,knn/mean", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", argv)
    cli.run(curves.main)
    assert result_tables.read(out) == [
        ["step", "heldout: next", "knn: mean"], ["10", "2", "0.5"], ["30", "1.25", "0.75"],
    ]  # fmt: skip
    draw, path = figures.sources(tmp_path)["curve_x.png"]
    draw(path, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 1.5 * Image.open(tmp_path / "x.png").size[1]


@pytest.mark.parametrize(("names", "key"), [(["loss", "knn/mean"], "knn/mean"), (["lose"], "lose")])
def test_curves_that_a_run_does_not_have(tmp_path, names, key):
    run = write(tmp_path / "run", LINES)
    with pytest.raises(UserError, match=key):
        curves.of_run(run, names)


def test_columns_without_a_panel(tmp_path):
    (tmp_path / "curve_x.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match="'loss'"):
        curves.draw(tmp_path / "curve_x.csv", tmp_path / "x.png")


@pytest.mark.slow
def test_a_study_of_two_steps(tmp_path, monkeypatch, capsys):
    """End to end: images, teachers, stores, the start from a run, held-out losses, probes."""
    for name in ("digits", "glyphs"):
        image_set = image_sets.SETS[name]
        recipe = dataclasses.replace(image_set.teacher, steps=5)
        monkeypatch.setitem(image_sets.SETS, name, dataclasses.replace(image_set, teacher=recipe))
    monkeypatch.setattr(continued, "DIGITS_STEPS", 2)
    words = (
        "--seeds=1", "--config.total=2 steps", "--config.data.views=1", "--config.model.depth=2",
        "--config.model.width=16", "--config.model.decoder_width=16",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["continued.py", f"--out={tmp_path}", *words])
    cli.run(continued.main)
    assert "next: look at" in capsys.readouterr().out
    results = ablate.read_results(tmp_path)
    assert set(results) == {(row, 0) for row in (continued.DIGITS, *continued.ROWS)}
    for row in continued.ROWS:
        line = results[row, 0]
        assert line["steps"] == [1, 2] and all(0 < x < 3 for x in line["heldout"])
    log = (tmp_path / "runs/from_digits/seed0/log.txt").read_text()
    assert "loaded: encoder" in log and "digits/seed0" in log
