"""What is read of a log that is being written, was cut off, or went back; where two logs part."""

import json
import math
import operator

import numpy as np
import pytest

from dgpt_jax import metrics, run_diff, run_log
from dgpt_jax.schema import UserError


def write(run, lines, end="\n"):
    """metrics.jsonl of dicts or texts."""
    run.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (run / run_log.FILE).write_text("\n".join(texts) + end)
    return run


def curves(log) -> dict[str, dict[int, float]]:
    return {name: curve.as_dict() for name, curve in log.curves.items()}


def test_what_the_writer_writes(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.scalars(1, {"loss": 2.5, "next": math.nan})
    writer.scalars(2, {"loss": math.inf})
    writer.scalars(2, {"heldout/next": 0.5})
    writer.close()
    log = run_log.read(tmp_path)
    loss, next, heldout = (log.curves[name].as_dict() for name in ("loss", "next", "heldout/next"))
    assert loss == {1: 2.5, 2: math.inf} and math.isnan(next[1]) and heldout == {2: 0.5}
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
        assert curves(log).get("loss", {}) == want and log.damaged == 0, text[:cut]


def test_a_line_behind_one_that_a_kill_cut_off(tmp_path):
    cut = '{"step": 3, "lo' + json.dumps({"step": 3, "loss": 1.0})
    log = run_log.read(write(tmp_path, [{"step": 2, "loss": 2.0}, cut, "{rubbish", "[1]", '"x"']))
    assert curves(log) == {"loss": {2: 2.0, 3: 1.0}}
    assert log.damaged == 3


def test_what_was_logged_beyond_the_checkpoint_is_forgotten(tmp_path):
    before = [{"step": s, "loss": float(s)} for s in (10, 20, 25, 30)] + [{"step": 30, "knn": 5.0}]
    before.insert(2, {"step": 20, "knn": 4.0})  # of the first time, too, though not logged again
    after = [{"step": 20, "loss": -20.0}, {"step": 28, "loss": -28.0}]
    log = run_log.read(write(tmp_path, before + after))
    assert curves(log) == {"loss": {10: 10.0, 20: -20.0, 28: -28.0}}
    again = [{"step": 30, "loss": 1.0}, {"step": 30, "loss": 2.0}, {"step": 30, "knn": 6.0}]
    log = run_log.read(write(tmp_path, again))
    assert curves(log) == {"loss": {30: 2.0}, "knn": {30: 6.0}}


class Counted(int):
    """A step that counts how often it is compared."""

    comparisons = 0

    def _compare(self, other, how):
        Counted.comparisons += 1
        return how(int(self), int(other) if isinstance(other, int) else other)

    def __lt__(self, other):
        return self._compare(other, operator.lt)

    def __gt__(self, other):
        return self._compare(other, operator.gt)


def test_restarts_cost_no_more_than_lines(tmp_path, monkeypatch):
    """After 300 of them no step is looked at again for each restart."""
    lines, step = [], 0
    for restart in range(300):
        for _ in range(100):
            lines.append({"step": (step := step + 1), "loss": float(restart), "next": 0.0})
        step -= 5
    run, parse = write(tmp_path, lines), run_log._entry

    def counted(line):
        entry = parse(line)
        return entry and (Counted(entry[0]), entry[1])

    monkeypatch.setattr(run_log, "_entry", counted)
    loss = curves(run_log.read(run))["loss"]
    assert loss == {s: min((s - 1) // 95, 299.0) for s in range(1, 300 * 95 + 6)}
    assert Counted.comparisons < 3 * len(lines)


def test_columns_are_what_a_dict_of_each_line_is(tmp_path):
    """Random logs: lines of several kinds, repeated steps, steps that go back."""
    rng, kinds = np.random.default_rng(0), (("a", "b"), ("b", "a"), ("b",), ("c", "a"), ())
    for _ in range(50):
        lines = [
            {"step": int(rng.integers(0, 9) + i // 4)}
            | {name: float(rng.random()) for name in kinds[rng.integers(len(kinds))]}
            for i in range(int(rng.integers(1, 40)))
        ]
        expected, newest = {}, -1
        for line in lines:
            step = line["step"]
            if step < newest:
                expected = {
                    name: {at: value for at, value in curve.items() if at < step}
                    for name, curve in expected.items()
                }
            newest = step
            for name in line.keys() - {"step"}:
                expected.setdefault(name, {})[step] = line[name]
        log = run_log.read(write(tmp_path, lines))
        assert curves(log) == {name: curve for name, curve in expected.items() if curve}
        assert all(np.all(np.diff(curve.steps) > 0) for curve in log.curves.values())


def test_numbers_that_do_not_fit_are_passed_over(tmp_path):
    lines = ['{"step": 1e999, "loss": 1}', f'{{"step": {2**63}, "loss": 1}}',
             f'{{"step": {2**63 - 1}, "loss": 2, "next": 1{"0" * 400}}}']  # fmt: skip
    log = run_log.read(write(tmp_path, lines))
    assert curves(log) == {"loss": {2**63 - 1: 2.0}} and log.damaged == 2


def test_a_thinned_curve_keeps_every_extreme():
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 50, 30_000))
    values = rng.standard_normal(len(steps))
    values[[100, 20_000]] = 1e3, -1e3
    values[9_000:12_000] = np.nan
    values[::7] = np.inf
    at = run_log.thinned(steps, values, buckets=100)
    assert len(at) <= 202 and np.all(np.diff(at) > 0)
    assert {0, 100, 20_000, len(steps) - 1} <= {*at.tolist()}
    bucket = np.searchsorted(np.linspace(steps[0], steps[-1], 101), steps, side="right")
    for number in np.unique(bucket):
        whole = values[bucket == number]
        part = values[at][bucket[at] == number]
        if np.isfinite(whole).any():
            whole, part = whole[np.isfinite(whole)], part[np.isfinite(part)]
            assert (part.min(), part.max()) == (whole.min(), whole.max())
        else:
            assert len(part)  # the gap is drawn
    np.testing.assert_array_equal(run_log.thinned(steps[:200], values[:200], 100), np.arange(200))
    assert len(run_log.thinned(np.array([2**63 - 1]), np.ones(1), 0)) == 1


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
    made = {
        name: run_log.Curve(np.arange(len(values)), np.array(values, float))
        for name, values in curves.items()
    }
    return run_log.Log("run", made)


def test_where_two_runs_part():
    nan, inf = math.nan, math.inf
    same = log_of(loss=[3.0, nan, inf, -1.0])
    (found,) = run_diff.compare(same, log_of(loss=[3.0, nan, inf, -1.0]), ["loss"])
    assert found.same and found.line() == "loss: the same at 4 common steps"
    (found,) = run_diff.compare(same, log_of(loss=[3.0, 1.0, -inf, -1.0]), ["loss"])
    assert not found.same and found.first[0] == 1 and "by inf" in found.line()

    a, b = log_of(loss=[3.0, 2.0, 1.0, 0.0]), log_of(loss=[3.0, 2.5, 4.0, 0.0, 9.0])
    (found,) = run_diff.compare(a, b, ["loss"])
    assert found.first == (1, 2.0, 2.5) and found.largest == (2, 1.0, 4.0)
    assert (found.common, found.only) == (4, (0, 1))
    assert found.line() == (
        "loss: differs from step 1 on: 2 and 2.5, by 0.5; most at step 2, by 3; 4 common steps, "
        "1 only in the second run"
    )
    (found,) = run_diff.compare(a, b, ["loss"], tolerance=0.25)  # 0.5 of 2.5 is a fifth
    assert found.first == (2, 1.0, 4.0)
    for bad in (nan, inf, -inf):  # no tolerance covers what is not finite
        (found,) = run_diff.compare(log_of(loss=[bad]), log_of(loss=[1.0]), ["loss"], tolerance=0.5)
        assert found.first is not None and not found.same


def test_one_that_has_more_is_not_the_same():
    short, long = log_of(loss=[1.0]), log_of(loss=[1.0, 2.0], next=[1.0])
    for pair, only in (((short, long), (0, 1)), ((long, short), (1, 0))):
        loss, other = run_diff.compare(*pair, ["loss", "next"])
        assert loss.first is None and loss.only == only and not loss.same
        assert other.common == 0 and not other.same
