"""Studies: their configs, their statistics, and that a killed one goes on."""

import errno
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import ablate
import numpy as np
import pytest
from scipy import stats

from dgpt_jax import cli, schema, studies
from dgpt_jax.config import Train

ROOT = Path(__file__).parent.parent
COLUMNS = ("knn 5", "linear all")


def base(size: str = "tiny") -> Train:
    return schema.parse(Train, cli.load_config(f"{ROOT}/configs/study.py:{size}"))


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_every_row_is_a_config_of_its_own(size, tmp_path):
    shared = base(size)
    for name, study in studies.studies(shared).items():
        runs = [r for r in studies.runs(study, shared, (0, 1)) if r.changes is not None]
        assert len({run.key for run in runs}) == 2 * len(study.rows), name
        for run in runs:
            config = studies.config_of(run, shared, tmp_path)
            assert config.data.path.startswith(f"{tmp_path}/") and config.seed == run.seed
            flat = schema.flatten(schema.to_dict(config))
            assert all(flat[path] == value for path, value in run.changes.items() if "." in path
                       and path not in ("data.path", "teacher.weights"))  # fmt: skip


def test_rows_that_train_alike_are_one_run():
    shared = base()
    named = {
        (study, run.row): run.name
        for study, found in studies.studies(shared).items()
        for run in studies.runs(found, shared, (0,))
    }
    alike = [key for key, name in named.items() if name == "base"]
    assert ("views", "K = 4") in alike and ("codec", "int8") in alike and len(alike) == 9
    assert named["decoders", "next"] == named["target", "teacher's tokens, next only"]


def test_intervals_are_student_s():
    rng = np.random.default_rng(0)
    a, b = rng.normal(80, 3, 5), rng.normal(81, 3, 5)
    numbers = {"b": {i: {"knn 5": x} for i, x in enumerate(b)}}
    numbers["a"] = {i: {"knn 5": x} for i, x in enumerate(a)}
    numbers["a"][-1] = {"knn 5": 0.0}  # a seed without a pair counts for nothing
    mean, half = studies.differences(numbers, "b")["a"]["knn 5"]
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose((mean - half, mean + half), (low, high))
    # By hand: 1, 2, 3 have mean 2, deviation 1; t of 2 degrees of freedom is 4.3027.
    np.testing.assert_allclose(studies.interval([1, 2, 3]), (2, 4.3027 / 3**0.5), rtol=1e-4)
    assert studies.interval([4])[0] == 4 and math.isnan(studies.interval([4])[1])


def test_a_table_marks_what_differs():
    cells = {"x": {"knn 5": (-2.0, 1.5), "knn all": (1.0, 1.5), "linear 5": (1.0, math.nan)}}
    lines = studies.table(cells, "minus y", sign="+").splitlines()
    assert lines[0] == "| minus y | knn 5 | knn all | linear 5 |"
    assert lines[2] == "| x | **-2.0 ± 1.5** | +1.0 ± 1.5 | +1.0 |"


@pytest.fixture
def stub(monkeypatch):
    """Runs that take no time: a list of the keys that were carried out, in order."""
    done = []

    def carry_out(run, *_):
        done.append(run.key)
        numbers = {column: 80.0 + run.seed + len(run.name) % 7 for column in COLUMNS}
        changed = {} if run.changes is None else {"changes": dict(run.changes)}
        return {"run": run.name, "seed": run.seed, "accuracy": numbers, "seconds": 60.0,
                "date": "2026-01-01"} | changed  # fmt: skip

    monkeypatch.setattr(ablate, "carry_out", carry_out)
    monkeypatch.setattr(ablate.small_images, "prepare", lambda *_: {})
    monkeypatch.setattr(ablate, "short_run", lambda *_: 60.0)
    return done


def ablation(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["tools/ablate.py", f"--out={out}", *words])
    cli.run(ablate.main)


def test_a_killed_study_goes_on(stub, tmp_path, monkeypatch, capsys):
    right, calls = ablate.carry_out, itertools.count()

    def killed(*args):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(ablate, "carry_out", killed)
    with pytest.raises(SystemExit) as ended:
        ablation(monkeypatch, tmp_path, "order", "--seeds=3")
    assert ended.value.code == 130 and len(stub) == 6
    assert "11 runs, 11 to do: about 6m00s" in capsys.readouterr().out
    with (tmp_path / ablate.RESULTS).open("a") as file:
        file.write('{"run": "base", "se')  # a kill in the middle of a line
    monkeypatch.setattr(ablate, "carry_out", right)
    ablation(monkeypatch, tmp_path, "order", "--seeds=3")
    assert len(stub) == len(set(stub)) == 3 * 2 + 3 + 2  # rows, untrained; pixels, teacher
    told = capsys.readouterr().out
    assert "11 runs, 5 to do: about 4m00s" in told and "next: look at" in told
    text = (tmp_path / "order.md").read_text()
    assert "| raw pixels | " in text and "| minus random |" in text and "11 of 11 runs" in text
    assert (tmp_path / "order.png").stat().st_size > 1000
    # What another study shares is not done again.
    ablation(monkeypatch, tmp_path, "taps", "--seeds=3")
    assert len(stub) == len(set(stub)) == 11 + 3


def test_runs_of_another_process_are_left_to_it(stub, tmp_path, monkeypatch, capsys):
    right = ablate.carry_out

    def meanwhile(run, *args):
        if not stub:  # while this one is at its first, another process finishes its second
            other = studies.Run("the teacher", 0, None)
            ablate.add_line(tmp_path, right(other, *args) | {"seconds": 1.0})
            stub.remove(other.key)
        return right(run, *args)

    monkeypatch.setattr(ablate, "carry_out", meanwhile)
    with ablate.claimed(tmp_path / "locks" / "base.0") as mine:
        assert mine
        ablation(monkeypatch, tmp_path, "order", "--seeds=1")
    assert len(stub) == 3 and not {("base", 0), ("the_teacher", 0)} & set(stub)
    assert "1 runs are not finished; next: the same command again" in capsys.readouterr().out
    ablation(monkeypatch, tmp_path, "order", "--seeds=1")
    assert stub[-1] == ("base", 0) and len(stub) == 4


def test_a_result_that_is_not_written_keeps_its_checkpoint(tmp_path, monkeypatch):
    def trained(_, directory):
        for name in ("checkpoints", "tensorboard"):
            (directory / name).mkdir(parents=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ablate, "trained", trained)
    monkeypatch.setattr(ablate.studies, "config_of", lambda *_: None)
    monkeypatch.setattr(ablate.run_log, "read", lambda _: SimpleNamespace(curves={}))
    monkeypatch.setattr(ablate, "features_of", lambda _: None)
    monkeypatch.setattr(ablate, "measured", lambda *_: {"knn 5": 80.0})
    monkeypatch.setattr(ablate, "add_line", full)
    with pytest.raises(OSError):
        ablate.work([studies.Run("base", 0, {})], None, tmp_path, {})
    assert (tmp_path / "runs/base/seed0/checkpoints").is_dir()


def test_other_settings_take_another_directory(stub, tmp_path, monkeypatch):
    ablation(monkeypatch, tmp_path, "order", "--seeds=1")
    for word, message in (
        ("--config.optim.blr=1.0", "has runs with optim.blr 0.006, this command has 1.0"),
        ("--images=glyphs", "has runs with images digits"),
    ):
        with pytest.raises(SystemExit, match=f"{message}.*choose another --out"):
            ablation(monkeypatch, tmp_path, "order", "--seeds=1", word)
    with pytest.raises(SystemExit, match="the study must be one of views, decoders"):
        ablation(monkeypatch, tmp_path, "ordr")


@pytest.mark.slow
def test_a_study_of_two_steps(tmp_path, monkeypatch, capsys):
    """The real thing: images, teacher, store, training, checkpoints, probes."""
    monkeypatch.setattr(ablate.small_images, "TEACHER_STEPS", 5)
    monkeypatch.setattr(studies, "FRAME", {"untrained encoder": True, "the teacher": False})
    ablation(
        monkeypatch, tmp_path, "decoders", "--seeds=1", "--config.total=2 steps",
        "--config.data.views=1", "--config.model.depth=2", "--config.model.width=16",
        "--config.model.decoder_width=16",
    )  # fmt: skip
    assert "next: look at" in capsys.readouterr().out
    lines = [json.loads(text) for text in (tmp_path / ablate.RESULTS).read_text().splitlines()]
    assert len({(line["run"], line["seed"]) for line in lines}) == len(lines) == 2 + 5
    assert "direct" in next(line for line in lines if "direct=1" in line["run"])["last"]
    for line in lines:
        assert len(line["accuracy"]) == 6 and all(5 < x < 100 for x in line["accuracy"].values())
    assert not list(tmp_path.glob("runs/*/*/checkpoints"))
