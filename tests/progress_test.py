"""What a command says while it works: the progress line, the clock, warnings."""

import io
import math

import pytest

from dgpt_jax import progress

VALUES = {
    "eta_seconds": 75.0, "images_per_second": 1234.5, "data_wait": 0.04, "learning_rate": 1e-3,
    "loss": 1.5, "grad_norm": 2.0,
}  # fmt: skip


def test_the_clock_leaves_out_the_compile(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    clock = progress.Clock(0, total=100, batch_size=8)
    now = 60.0
    clock.restart(1)  # the first step took a minute
    assert clock.read(1) == {}
    now = 65.0
    clock.waited(1.0)
    assert clock.read(11) == {"images_per_second": 16, "data_wait": 0.2, "eta_seconds": 44.5}
    now = 66.0
    clock.waited(5.0)
    values = clock.read(13)
    assert values["images_per_second"] == 16 and values["data_wait"] == 1.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_progress_line(stream):
    output = stream()
    line = progress.Progress(output)
    line.show(50, 100, VALUES)
    line.say("a line of its own")
    line.show(60, 100, VALUES)
    line.close()
    shown = output.getvalue()
    assert (
        "step 50/100 eta 1m15s 1234 img/s wait 4% loss 1.5000 grad_norm 2.0000 lr 1.00e-03" in shown
    )
    if stream is Terminal:  # one line, drawn again, below what was said
        assert shown.count("\n") == 2 and shown.count("\r") == 3
        assert "█" * 10 + "·" * 10 in shown
    else:
        assert shown.count("\n") == 3 and "\r" not in shown and "█" not in shown


def test_durations():
    shown = [progress.duration(x) for x in (0, 59.6, 3725, 50 * 3600, math.inf)]
    assert shown == ["0m00s", "1m00s", "1h02m", "2.1d", "?"]


def test_a_warning_where_the_input_does_not_keep_up(capsys):
    """Two intervals in a row, and again only after it has kept up in between."""
    line, warnings = progress.Progress(), []
    for wait in (0.5, 0.05, 0.11, 0.3, 0.9, 0.1, 0.2, 0.2):
        line.show(1, 2, {"learning_rate": 1.0, "data_wait": wait})
        warnings.append("tools/bench_input.py" in capsys.readouterr().err)
    assert warnings == [False, False, False, True, False, False, False, True]
