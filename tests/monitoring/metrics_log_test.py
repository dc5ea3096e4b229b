"""Logs that are being written, truncated or resumed; differences between two logs."""

import json
import math
import operator
from pathlib import Path

import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import metrics, metrics_log, run_diff


def write(run, lines, end="\n"):
    """Writes metrics.jsonl from dicts or strings."""
    run.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (run / metrics_log.FILE).write_text("\n".join(texts) + end)
    return run


def curves(log) -> dict[str, dict[int, float]]:
    return {name: curve.as_dict() for name, curve in log.curves.items()}


def test_the_output_of_the_writer_is_read(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.scalars(1, {"loss": 2.5, "next": math.nan})
    writer.scalars(2, {"loss": math.inf})
    writer.scalars(2, {"heldout/next": 0.5})
    writer.close()
    log = metrics_log.read(tmp_path)
    loss, next, heldout = (log.curves[name].as_dict() for name in ("loss", "next", "heldout/next"))
    assert loss == {1: 2.5, 2: math.inf} and math.isnan(next[1]) and heldout == {2: 0.5}
    assert log.damaged == 0
    steps, values = log.arrays("absent")
    assert len(steps) == len(values) == 0


def test_the_last_line_may_be_truncated_anywhere(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    text = "\n".join(map(json.dumps, lines))
    first = len(json.dumps(lines[0]))
    for cut in range(len(text) + 1):
        (tmp_path / metrics_log.FILE).write_text(text[:cut])
        log = metrics_log.read(tmp_path)
        expected = {1: 3.0} if cut >= first else {}
        expected |= {2: 2.0} if cut == len(text) else {}
        assert curves(log).get("loss", {}) == expected and log.damaged == 0, text[:cut]


def test_a_line_that_follows_a_truncated_one(tmp_path):
    cut = '{"step": 3, "lo' + json.dumps({"step": 3, "loss": 1.0})
    log = metrics_log.read(
        write(tmp_path, [{"step": 2, "loss": 2.0}, cut, "{rubbish", "[1]", '"x"'])
    )
    assert curves(log) == {"loss": {2: 2.0, 3: 1.0}}
    assert log.damaged == 3


def test_lines_after_the_resumed_checkpoint_are_dropped(tmp_path):
    before = [{"step": s, "loss": float(s)} for s in (10, 20, 25, 30)] + [{"step": 30, "knn": 5.0}]
    before.insert(2, {"step": 20, "knn": 4.0})  # dropped too, though not logged again
    after = [{"step": 20, "loss": -20.0}, {"step": 28, "loss": -28.0}]
    log = metrics_log.read(write(tmp_path, before + after))
    assert curves(log) == {"loss": {10: 10.0, 20: -20.0, 28: -28.0}}
    again = [{"step": 30, "loss": 1.0}, {"step": 30, "loss": 2.0}, {"step": 30, "knn": 6.0}]
    log = metrics_log.read(write(tmp_path, again))
    assert curves(log) == {"loss": {30: 2.0}, "knn": {30: 6.0}}


class Counted(int):
    """A step that counts comparisons with it."""

    comparisons = 0

    def _compare(self, other, operation):
        Counted.comparisons += 1
        return operation(int(self), int(other) if isinstance(other, int) else other)

    def __lt__(self, other):
        return self._compare(other, operator.lt)

    def __gt__(self, other):
        return self._compare(other, operator.gt)


def test_many_restarts_take_linear_time(tmp_path, monkeypatch):
    """Steps are not compared again at each of 300 restarts."""
    lines, step = [], 0
    for restart in range(300):
        for _ in range(100):
            lines.append({"step": (step := step + 1), "loss": float(restart), "next": 0.0})
        step -= 5
    run, parse = write(tmp_path, lines), metrics_log._parse_line

    def counted(line):
        entry = parse(line)
        return entry and (Counted(entry[0]), entry[1])

    monkeypatch.setattr(metrics_log, "_parse_line", counted)
    loss = curves(metrics_log.read(run))["loss"]
    assert loss == {s: min((s - 1) // 95, 299.0) for s in range(1, 300 * 95 + 6)}
    assert Counted.comparisons < 3 * len(lines)


def test_columns_agree_with_a_dict_per_line(tmp_path):
    """Random logs: lines with several sets of metrics, repeated and decreasing steps."""
    rng, kinds = np.random.default_rng(0), (("a", "b"), ("b", "a"), ("b",), ("c", "a"), ())
    for _ in range(50):
        lines = [
            {"step": int(rng.integers(0, 9) + i // 4)}
            | {name: float(rng.random()) for name in kinds[rng.integers(len(kinds))]}
            for i in range(int(rng.integers(1, 40)))
        ]
        expected, last_step = {}, -1
        for line in lines:
            step = line["step"]
            if step < last_step:
                expected = {
                    name: {s: value for s, value in curve.items() if s < step}
                    for name, curve in expected.items()
                }
            last_step = step
            for name in line.keys() - {"step"}:
                expected.setdefault(name, {})[step] = line[name]
        log = metrics_log.read(write(tmp_path, lines))
        assert curves(log) == {name: curve for name, curve in expected.items() if curve}
        assert all(np.all(np.diff(curve.steps) > 0) for curve in log.curves.values())


def test_numbers_out_of_range_are_skipped(tmp_path):
    lines = ['{"step": 1e999, "loss": 1}', f'{{"step": {2**63}, "loss": 1}}',
             f'{{"step": {2**63 - 1}, "loss": 2, "next": 1{"0" * 400}}}']  # fmt: skip
    log = metrics_log.read(write(tmp_path, lines))
    assert curves(log) == {"loss": {2**63 - 1: 2.0}} and log.damaged == 2


def test_selected_metrics(tmp_path):
    line = {"step": 1, "learning_rate": 1.0, "skipped": 0, "bad_records": 0, "eta_seconds": 9.0}
    line |= {"odd": 1.0, "next": 1.0, "loss": 1.0}
    log = metrics_log.read(
        write(tmp_path, [line, {"step": 2, "bad_records": 1, "heldout/next": 3}])
    )
    assert metrics_log.select_metrics([log], None) == [
        "loss", "next", "heldout/next", "odd", "learning_rate", "bad_records",
    ]  # fmt: skip
    assert metrics_log.select_metrics([log], "skipped, odd") == ["skipped", "odd"]
    with pytest.raises(UserError, match=r"\blos; .*bad_records, .*odd"):
        metrics_log.select_metrics([log], "los,odd")
    with pytest.raises(UserError, match="new/metrics.jsonl has no metrics"):
        metrics_log.select_metrics([metrics_log.read(write(tmp_path / "new", [], end=""))], None)


def log_of(**curves) -> metrics_log.Log:
    by_name = {
        name: metrics_log.Curve(np.arange(len(values)), np.array(values, float))
        for name, values in curves.items()
    }
    return metrics_log.Log(Path("run"), by_name)


def test_differences_of_two_runs():
    nan, inf = math.nan, math.inf
    same = log_of(loss=[3.0, nan, inf, -1.0])
    (difference,) = run_diff.compare(same, log_of(loss=[3.0, nan, inf, -1.0]), ["loss"])
    assert difference.same and difference.line().startswith("loss: the same at 4 ")
    (difference,) = run_diff.compare(same, log_of(loss=[3.0, 1.0, -inf, -1.0]), ["loss"])
    assert not difference.same and difference.first[0] == 1 and "by inf" in difference.line()

    a, b = log_of(loss=[3.0, 2.0, 1.0, 0.0]), log_of(loss=[3.0, 2.5, 4.0, 0.0, 9.0])
    (difference,) = run_diff.compare(a, b, ["loss"])
    assert difference.first == (1, 2.0, 2.5) and difference.largest == (2, 1.0, 4.0)
    assert (difference.common, difference.only) == (4, (0, 1))
    for text in ("step 1 ", "2 and 2.5, by 0.5;", "step 2, by 3;", "4 common", "1 only in the sec"):
        assert text in difference.line()
    (difference,) = run_diff.compare(a, b, ["loss"], tolerance=0.25)  # 0.5 of 2.5 is 0.2
    assert difference.first == (2, 1.0, 4.0)
    for bad in (nan, inf, -inf):  # no tolerance covers non-finite values
        logs = log_of(loss=[bad]), log_of(loss=[1.0])
        (difference,) = run_diff.compare(*logs, ["loss"], tolerance=0.5)
        assert difference.first is not None and not difference.same


def test_a_run_with_more_steps_is_not_the_same():
    short, long = log_of(loss=[1.0]), log_of(loss=[1.0, 2.0], next=[1.0])
    for pair, only in (((short, long), (0, 1)), ((long, short), (1, 0))):
        loss, other = run_diff.compare(*pair, ["loss", "next"])
        assert loss.first is None and loss.only == only and not loss.same
        assert other.common == 0 and not other.same
