"""What is read of a log that is being written, was cut off, or went back; where two logs part."""

import json
import math

import numpy as np
import pytest

from dgpt_jax import metrics, run_log
from dgpt_jax.schema import UserError


def write(run, lines, end="\n"):
    """metrics.jsonl of dicts or texts."""
    run.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (run / run_log.FILE).write_text("\n".join(texts) + end)
    return run


def test_what_the_writer_writes(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.scalars(1, {"loss": 2.5, "next": math.nan})
    writer.scalars(2, {"loss": math.inf})
    writer.scalars(2, {"heldout/next": 0.5})
    writer.close()
    log = run_log.read(tmp_path)
    assert log.curves["loss"] == {1: 2.5, 2: math.inf}
    assert math.isnan(log.curves["next"][1]) and log.curves["heldout/next"] == {2: 0.5}
    assert log.damaged == 0
    steps, values = log.arrays("absent")
    assert len(steps) == len(values) == 0


def test_any_cut_of_the_last_line(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    text = "\n".join(map(json.dumps, lines))
    first = len(json.dumps(lines[0]))
    for cut in range(len(text) + 1):
        (tmp_path / run_log.FILE).write_text(text[:cut])
        log = run_log.read(tmp_path)
        want = {1: 3.0} if cut >= first else {}
        want |= {2: 2.0} if cut == len(text) else {}
        assert log.curves.get("loss", {}) == want and log.damaged == 0, text[:cut]


def test_a_line_behind_one_that_a_kill_cut_off(tmp_path):
    cut = '{"step": 3, "lo' + json.dumps({"step": 3, "loss": 1.0})
    log = run_log.read(write(tmp_path, [{"step": 2, "loss": 2.0}, cut, "{rubbish", "[1]", '"x"']))
    assert log.curves == {"loss": {2: 2.0, 3: 1.0}}
    assert log.damaged == 3


def test_what_was_logged_beyond_the_checkpoint_is_forgotten(tmp_path):
    before = [{"step": s, "loss": float(s)} for s in (10, 20, 25, 30)] + [{"step": 30, "knn": 5.0}]
    before.insert(2, {"step": 20, "knn": 4.0})  # of the first time, too, though not logged again
    after = [{"step": 20, "loss": -20.0}, {"step": 28, "loss": -28.0}]
    log = run_log.read(write(tmp_path, before + after))
    assert log.curves == {"loss": {10: 10.0, 20: -20.0, 28: -28.0}}
    again = [{"step": 30, "loss": 1.0}, {"step": 30, "loss": 2.0}, {"step": 30, "knn": 6.0}]
    log = run_log.read(write(tmp_path, again))
    assert log.curves == {"loss": {30: 2.0}, "knn": {30: 6.0}}


def test_panels(tmp_path):
    line = {"step": 1, "learning_rate": 1.0, "skipped": 0, "bad_records": 0, "eta_seconds": 9.0}
    line |= {"odd": 1.0, "next": 1.0, "loss": 1.0}
    log = run_log.read(write(tmp_path, [line, {"step": 2, "bad_records": 1, "heldout/next": 3}]))
    assert run_log.chosen([log], None) == [
        "loss", "next", "heldout/next", "odd", "learning_rate", "bad_records",
    ]  # fmt: skip
    assert run_log.chosen([log], "skipped, odd") == ["skipped", "odd"]
    with pytest.raises(UserError, match=r"no run has los; known: bad_records, .*odd"):
        run_log.chosen([log], "los,odd")
    with pytest.raises(UserError, match="holds no metric yet"):
        run_log.chosen([run_log.read(write(tmp_path / "new", [], end=""))], None)


def test_running_mean_is_the_direct_one():
    values = np.random.default_rng(0).standard_normal(30)
    values[[3, 4, 5, 17]] = [np.nan, np.inf, -np.inf, np.nan]
    for points in (1, 3, 8):
        half = points // 2
        for i, mean in enumerate(run_log.running_mean(values, points)):
            near = values[max(0, i - half) : i + half + 1]
            near = near[np.isfinite(near)]
            assert mean == pytest.approx(near.mean()) if len(near) else np.isnan(mean)


def log_of(**curves) -> run_log.Log:
    return run_log.Log("run", {name: dict(enumerate(values)) for name, values in curves.items()})


def test_where_two_runs_part():
    nan, inf = math.nan, math.inf
    same = log_of(loss=[3.0, nan, inf, -1.0])
    (found,) = run_log.compare(same, log_of(loss=[3.0, nan, inf, -1.0]), ["loss"])
    assert found.same and found.line() == "loss: the same at 4 common steps"
    (found,) = run_log.compare(same, log_of(loss=[3.0, 1.0, -inf, -1.0]), ["loss"])
    assert not found.same and found.first[0] == 1 and "by inf" in found.line()

    a, b = log_of(loss=[3.0, 2.0, 1.0, 0.0]), log_of(loss=[3.0, 2.5, 4.0, 0.0, 9.0])
    (found,) = run_log.compare(a, b, ["loss"])
    assert found.first == (1, 2.0, 2.5) and found.largest == (2, 1.0, 4.0)
    assert (found.common, found.only) == (4, (0, 1))
    assert found.line() == (
        "loss: differs from step 1 on: 2 and 2.5, by 0.5; most at step 2, by 3; 4 common steps, "
        "1 only in the second run"
    )
    (found,) = run_log.compare(a, b, ["loss"], tolerance=0.25)  # 0.5 of 2.5 is a fifth
    assert found.first == (2, 1.0, 4.0)


def test_one_that_has_more_is_not_the_same():
    short, long = log_of(loss=[1.0]), log_of(loss=[1.0, 2.0], next=[1.0])
    for pair, only in (((short, long), (0, 1)), ((long, short), (1, 0))):
        loss, other = run_log.compare(*pair, ["loss", "next"])
        assert loss.first is None and loss.only == only and not loss.same
        assert other.common == 0 and not other.same
