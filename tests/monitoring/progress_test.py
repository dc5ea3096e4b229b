"""Progress: throughput, plain lines, the bar in a terminal, warnings."""

import fcntl
import io
import math
import os
import pty
import re
import struct
import termios

import pytest

from dgpt_jax.distributed import multihost
from dgpt_jax.monitoring import progress

VALUES = {
    "eta_seconds": 75.0, "images_per_second": 1234.5, "data_wait": 0.04, "learning_rate": 1e-3,
    "loss": 1.5, "grad_norm": 2.0,
}  # fmt: skip
LINE = "step 50/100 eta 1m15s 1234 img/s wait 4% loss 1.5000 grad_norm 2.0000 lr 1.00e-03"


def test_the_clock_excludes_compilation(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    clock = progress.Clock(0, total=100, batch_size=8)
    now = 60.0
    clock.restart(1)  # the first step took a minute
    assert clock.read(1) == {}
    now = 65.0
    clock.add_wait(1.0)
    assert clock.read(11) == {
        "images_per_second": 16, "data_wait": 0.2, "eta_seconds": 44.5, "step_seconds": 5.0,
    }  # fmt: skip
    now = 66.0
    clock.add_wait(5.0)
    values = clock.read(13)
    assert values["images_per_second"] == 16 and values["data_wait"] == 1.0
    now = 70.0
    clock.exclude(3.0)  # an evaluation
    assert clock.read(15)["step_seconds"] == 1.0


def show_some(stream):
    line = progress.TrainingProgress(stream=stream)
    line.show_step(50, 100, VALUES)
    line.say("a line of its own")
    line.show_step(60, 100, VALUES)
    line.close()
    line.say("after the bar")


def test_plain_lines_without_a_terminal():
    output = io.StringIO()
    show_some(output)
    lines = output.getvalue().splitlines()
    assert lines == [LINE, "a line of its own", LINE.replace("50/", "60/"), "after the bar"]


@pytest.mark.parametrize("columns", [60, 120])
def test_the_bar_fits_the_terminal(columns):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(terminal, "w", encoding="utf-8") as stream:
        show_some(stream)
        data = b""
        while b"after the bar\r\n" not in data:
            data += os.read(controller, 1 << 16)
    os.close(controller)
    lines = data.decode().split("\r\n")
    assert lines[0].endswith("\ra line of its own") and lines[2:] == ["after the bar", ""]
    for state in re.split(r"[\r\n]+", data.decode()):
        assert len(state) <= columns
    *_, last = lines[1].split("\r")  # stays visible
    assert last.startswith(" 60%|") and "step 60/100 eta 1m15s 1234 img/s" in last
    assert last.endswith("lr 1.00e-03") == (columns == 120)


def test_other_processes_are_quiet(monkeypatch):
    monkeypatch.setattr(multihost, "is_main_process", lambda: False)
    output = io.StringIO()
    show_some(output)
    assert not output.getvalue()


def test_updates_at_intervals(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = []
    line = progress.Progress("images", interval=10, say=lines.append)
    assert not line.is_due()
    now = 10.0
    assert line.is_due()
    line.show(3, 5, "(60%)")
    assert not line.is_due() and lines == ["images 3/5 (60%)"]


def test_durations():
    texts = [progress.duration(x) for x in (0, 59.6, 3725, 50 * 3600, math.inf)]
    assert texts == ["0m00s", "1m00s", "1h02m", "2.1d", "?"]


def test_a_slow_input_pipeline_is_warned_about(capsys):
    """After two slow intervals in a row, and again only after a fast one in between."""
    line, warnings = progress.TrainingProgress(), []
    for wait in (0.5, 0.05, 0.11, 0.3, 0.9, 0.1, 0.2, 0.2):
        line.show_step(1, 2, {"learning_rate": 1.0, "data_wait": wait})
        warnings.append("tools.benchmarks.bench_input" in capsys.readouterr().err)
    assert warnings == [False, False, False, True, False, False, False, True]
