"""How a run used its time: planted logs of several sessions, and a real run."""

import pytest

from dgpt_jax.monitoring import metrics_log, run_summary, time_use
from tests.monitoring.metrics_log_test import write

# The first session starts at 1000, has a start-up of 20 s, and is killed after step 40; the second
# starts at 1200, resumes from step 20 and finishes.
SESSIONS = [
    {"step": 10, "step_seconds": 9.0, "data_wait": 0.5, "start_time": 1000.0,
     "startup_seconds": 20.0, "time": 1029.0},
    {"step": 20, "step_seconds": 10.0, "data_wait": 0.0, "time": 1039.0},
    {"step": 20, "heldout/next": 1.0, "evaluation_seconds": 5.0, "time": 1044.0},
    {"step": 30, "step_seconds": 10.0, "data_wait": 0.0, "checkpoint_seconds": 2.0,
     "time": 1056.0},
    {"step": 40, "step_seconds": 10.0, "data_wait": 0.1, "time": 1066.0},
    {"step": 30, "step_seconds": 8.0, "data_wait": 0.0, "start_time": 1200.0,
     "startup_seconds": 30.0, "time": 1238.0},
    {"step": 40, "step_seconds": 10.0, "data_wait": 0.25, "time": 1248.0},
    {"step": 40, "heldout/next": 0.5, "evaluation_seconds": 6.0, "time": 1255.0},
]  # fmt: skip
EXPECTED = {
    "steps": 37.0 - 7.0,  # 9 + 10 + 8 + 10, without waiting
    "waiting for data": 4.5 + 2.5,
    "start-up and compilation": 50.0,
    "evaluations": 11.0,
    "checkpoints": 2.0,
    "steps that were repeated": 20.0,
    "between sessions": 1200.0 - 1066.0,
    "the rest": 1.0,
}


def planted(root, lines=SESSIONS, **config):
    run = write(root / "run", [dict(line) for line in lines])
    (run / "config.json").write_text('{"total": "40 steps", "batch_size": 8}')
    return run


def test_the_parts_of_the_wall_time(tmp_path):
    run = run_summary.read(planted(tmp_path))
    assert run.log.times is not None and run.log.times.sessions == 2
    assert run.wall_seconds == sum(EXPECTED.values()) == 255
    assert run.time_use == pytest.approx(EXPECTED)
    assert run.goodput == pytest.approx(37 / 255)
    assert not set(time_use.KEYS) & set(run.log.curves)
    assert metrics_log.metrics([run.log]) == ["heldout/next", "data_wait"]


def changed(line: int, **values):
    lines = [dict(x) for x in SESSIONS]
    lines[line] |= values
    return lines


WITHOUT = [{k: v for k, v in x.items() if k not in time_use.KEYS} for x in SESSIONS]


@pytest.mark.parametrize(
    "lines",
    [
        WITHOUT,  # of an earlier version
        [*WITHOUT[:5], *SESSIONS[5:]],  # resumed by this one
        [*SESSIONS[:5], *WITHOUT[5:]],
        changed(5, start_time=1000.0),  # before the last line: another host's clock
        changed(4, time="nan"),
        changed(1, step_seconds=1e4),  # more than the wall time
    ],
)
def test_logs_whose_times_are_not_known(tmp_path, lines):
    run = run_summary.read(planted(tmp_path, lines))
    assert run.log.times is None and run.time_use == {} and run.goodput is None


def test_a_killed_line_is_no_session(tmp_path):
    """A session that was killed while it wrote its first line counts as time between sessions."""
    lines = [*SESSIONS[:5], '{"step": 30, "start_time": 1100.0, "ti']
    run = planted(tmp_path)
    text = (run / metrics_log.FILE).read_text().splitlines(keepends=True)
    (run / metrics_log.FILE).write_text("".join(text[:5]) + lines[-1] + "".join(text[5:]))
    assert run_summary.read(run).time_use == pytest.approx(EXPECTED)


def test_a_session_logs_each_second_once(monkeypatch):
    now, excluded = 100.0, []
    monkeypatch.setattr(time_use.time, "time", lambda: now)
    monkeypatch.setattr(time_use.time, "monotonic", lambda: now)
    session = time_use.Session(90.0, excluded.append)
    session.first_step_ended()
    for _ in range(2):
        with session.spent("checkpoint"):
            now += 2.0
    assert session.read() == {
        "start_time": 90.0, "startup_seconds": 10.0, "checkpoint_seconds": 4.0, "time": 104.0,
    }  # fmt: skip
    assert session.read() == {"time": 104.0} and excluded == [2.0, 2.0]
