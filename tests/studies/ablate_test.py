"""Ablation studies: configs, statistics, resuming after a kill."""

import dataclasses
import errno
import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from dgpt_jax import cli
from dgpt_jax.config import TrainConfig, schema
from dgpt_jax.evals import ablations
from dgpt_jax.examples import image_sets
from tests.support.paths import ROOT
from tools.studies import ablate, ablation_runs, result_tables

COLUMNS = ("knn 5", "linear all")


def base(size: str = "tiny") -> TrainConfig:
    return schema.parse(TrainConfig, cli.load_config(f"{ROOT}/configs/study.py:{size}"))


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_rows_are_distinct_configs(size, tmp_path):
    shared = base(size)
    for name, study in ablations.studies(shared).items():
        runs = [r for r in ablations.runs(study, shared, (0, 1)) if r.changes is not None]
        assert len({run.key for run in runs}) == 2 * len(study.rows), name
        for run in runs:
            config = ablations.config_of(run, shared, tmp_path)
            assert config.data.path.startswith(f"{tmp_path}/") and config.seed == run.seed
            flat = schema.flatten(schema.to_dict(config))
            assert all(flat[path] == value for path, value in run.changes.items() if "." in path
                       and path not in ("data.path", "teacher.weights"))  # fmt: skip


def test_equal_rows_share_a_run():
    shared = base()
    names = {
        (name, run.row): run.name
        for name, study in ablations.studies(shared).items()
        for run in ablations.runs(study, shared, (0,))
    }
    equal = [key for key, name in names.items() if name == "base"]
    assert ("views", "K = 4") in equal and ("codec", "int8") in equal and len(equal) == 9
    assert names["decoders", "next"] == names["target", "teacher's tokens, next only"]


def test_intervals_match_student_t():
    rng = np.random.default_rng(0)
    a, b = rng.normal(80, 3, 5), rng.normal(81, 3, 5)
    numbers = {"b": {i: {"knn 5": x} for i, x in enumerate(b)}}
    numbers["a"] = {i: {"knn 5": x} for i, x in enumerate(a)}
    numbers["a"][-1] = {"knn 5": 0.0}  # a seed without a pair is ignored
    mean, half = ablations.differences(numbers, "b")["a"]["knn 5"]
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose((mean - half, mean + half), (low, high))
    # By hand: 1, 2, 3 have mean 2, deviation 1; t of 2 degrees of freedom is 4.3027.
    np.testing.assert_allclose(ablations.interval([1, 2, 3]), (2, 4.3027 / 3**0.5), rtol=1e-4)
    assert ablations.interval([4])[0] == 4 and math.isnan(ablations.interval([4])[1])


def test_significant_differences_are_bold():
    cells = {"x": {"knn 5": (-2.0, 1.5), "knn all": (1.0, 1.5), "linear 5": (1.0, math.nan)}}
    lines = ablations.table(cells, "minus y", sign="+").splitlines()
    assert lines[0] == "| minus y | knn 5 | knn all | linear 5 |"
    assert lines[2] == "| x | **-2.0 ± 1.5** | +1.0 ± 1.5 | +1.0 |"


@pytest.fixture
def stub(monkeypatch):
    """Replaces trainings; a list of the keys of executed runs, in order."""
    keys = []

    def execute(run, *_):
        keys.append(run.key)
        numbers = {column: 80.0 + run.seed + len(run.name) % 7 for column in COLUMNS}
        changed = {} if run.changes is None else {"changes": dict(run.changes)}
        return {"run": run.name, "seed": run.seed, "accuracy": numbers, "seconds": 60.0,
                "date": "2026-01-01"} | changed  # fmt: skip

    monkeypatch.setattr(ablation_runs, "execute", execute)
    monkeypatch.setattr(ablate.small_images, "prepare", lambda *_: {})
    monkeypatch.setattr(ablation_runs, "short_run", lambda *_: 60.0)
    return keys


def run_study(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["tools/studies/ablate.py", f"--out={out}", *words])
    cli.run(ablate.main)


def test_a_killed_study_resumes(stub, tmp_path, monkeypatch, capsys):
    execute, calls = ablation_runs.execute, itertools.count()

    def killed(*args):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return execute(*args)

    monkeypatch.setattr(ablation_runs, "execute", killed)
    with pytest.raises(SystemExit) as ended:
        run_study(monkeypatch, tmp_path, "order", "--seeds=3")
    assert ended.value.code == 130 and len(stub) == 6
    assert "11 runs, 11 to do: about 6m00s" in capsys.readouterr().out
    with (tmp_path / ablate.RESULTS).open("a") as file:
        file.write('{"run": "base", "se')  # truncated by a kill
    monkeypatch.setattr(ablation_runs, "execute", execute)
    run_study(monkeypatch, tmp_path, "order", "--seeds=3")
    assert len(stub) == len(set(stub)) == 3 * 2 + 3 + 2  # rows, untrained; pixels, teacher
    out = capsys.readouterr().out
    assert "11 runs, 5 to do: about 4m00s" in out and f"{tmp_path / 'order'}.md" in out
    text = (tmp_path / "order.md").read_text()
    assert "| raw pixels | " in text and "| minus random |" in text and "11 of 11 runs" in text
    assert (tmp_path / "order.png").stat().st_size > 1000
    assert all(table in text for table in result_tables.tables(tmp_path / "order.csv"))
    # Runs shared with another study are not repeated.
    run_study(monkeypatch, tmp_path, "taps", "--seeds=3")
    assert len(stub) == len(set(stub)) == 11 + 3


def test_runs_of_another_process_are_skipped(stub, tmp_path, monkeypatch, capsys):
    execute = ablation_runs.execute

    def meanwhile(run, *args):
        if not stub:  # during the first run, another process finishes the second
            other = ablations.Run("the teacher", 0, None)
            ablate.append_result(tmp_path, execute(other, *args) | {"seconds": 1.0})
            stub.remove(other.key)
        return execute(run, *args)

    monkeypatch.setattr(ablation_runs, "execute", meanwhile)
    with ablate.try_lock(tmp_path / "locks" / "base.0") as locked:
        assert locked
        run_study(monkeypatch, tmp_path, "order", "--seeds=1")
    assert len(stub) == 3 and not {("base", 0), ("the_teacher", 0)} & set(stub)
    assert "1 runs are not finished" in capsys.readouterr().out
    run_study(monkeypatch, tmp_path, "order", "--seeds=1")
    assert stub[-1] == ("base", 0) and len(stub) == 4


def test_checkpoint_survives_a_failed_write_of_the_result(tmp_path, monkeypatch):
    def train_encoder(_, directory):
        for name in ("checkpoints", "tensorboard"):
            (directory / name).mkdir(parents=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ablation_runs, "train_encoder", train_encoder)
    monkeypatch.setattr(ablations, "config_of", lambda *_: None)
    monkeypatch.setattr(ablation_runs.metrics_log, "read", lambda _: SimpleNamespace(curves={}))
    monkeypatch.setattr(ablation_runs, "encoder_features", lambda _: None)
    monkeypatch.setattr(ablation_runs, "measure", lambda *_: {"knn 5": 80.0})
    monkeypatch.setattr(ablate, "append_result", full)
    with pytest.raises(OSError):
        ablate.execute_all([ablations.Run("base", 0, {})], None, tmp_path, {})
    assert (tmp_path / "runs/base/seed0/checkpoints").is_dir()


def test_other_settings_need_another_directory(stub, tmp_path, monkeypatch):
    run_study(monkeypatch, tmp_path, "order", "--seeds=1")
    for word, message in (
        ("--config.optim.blr=1.0", "optim.blr 0.006.* 1.0"),
        ("--images=glyphs", "images digits"),
    ):
        with pytest.raises(SystemExit, match=f"{message}.*--out"):
            run_study(monkeypatch, tmp_path, "order", "--seeds=1", word)
    with pytest.raises(SystemExit, match="views, decoders.*'ordr'"):
        run_study(monkeypatch, tmp_path, "ordr")


@pytest.mark.slow
def test_a_study_of_two_steps(tmp_path, monkeypatch, capsys):
    """End to end: images, teacher, store, training, checkpoints, probes."""
    digits = image_sets.SETS["digits"]
    recipe = dataclasses.replace(digits.teacher, steps=5)
    monkeypatch.setitem(image_sets.SETS, "digits", dataclasses.replace(digits, teacher=recipe))
    monkeypatch.setattr(
        ablations, "REFERENCE_ROWS", {"untrained encoder": True, "the teacher": False}
    )
    run_study(
        monkeypatch, tmp_path, "decoders", "--seeds=1", "--config.total=2 steps",
        "--config.data.views=1", "--config.model.depth=2", "--config.model.width=16",
        "--config.model.decoder_width=16",
    )  # fmt: skip
    assert "next: look at" in capsys.readouterr().out
    lines = [json.loads(text) for text in (tmp_path / ablate.RESULTS).read_text().splitlines()]
    assert len({(line["run"], line["seed"]) for line in lines}) == len(lines) == 2 + 5
    assert "direct" in next(line for line in lines if "distill=1" in line["run"])["last"]
    for line in lines:
        assert len(line["accuracy"]) == 6 and all(5 < x < 100 for x in line["accuracy"].values())
    assert not list(tmp_path.glob("runs/*/*/checkpoints"))
