"""Figures of tools/plot.py, and --diff with its exit code."""

import re
import sys
import xml.etree.ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dgpt_jax import cli
from dgpt_jax.commands import plot
from tests.monitoring.metrics_log_test import write


@pytest.fixture
def runs(tmp_path):
    """Three runs: the second differs from the first at step 3, the third has other metrics."""
    values = [3.0, 2.0, 1.5, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7]
    first = [{"step": i, "loss": v, "data_wait": 0.1 * i} for i, v in enumerate(values)]
    second = [line | ({"loss": "nan"} if i == 3 else {}) for i, line in enumerate(first)]
    second = [line | {"data_wait": 0.9} for line in second]
    third = [{"step": 5, "odd": 1.0}]
    return [
        write(tmp_path / name, lines)
        for name, lines in (("a", first), ("b", second), ("c/a", third))
    ]


def run(monkeypatch, *words):
    """Exit code of plot.main, or its error message."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, words)])
    try:
        cli.run(plot.main)
    except SystemExit as ended:
        return ended.code
    return 0


def plotted_lines(monkeypatch, *args, **kwargs):
    """{panel: [(label, x, y, alpha)]} of the figure of plot.curves."""
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.curves(*args, **kwargs)
    panels = {
        axis.get_title(): [
            (x.get_label(), list(x.get_xdata()), list(x.get_ydata()), x.get_alpha())
            for x in axis.lines
        ]
        for axis in figures[0].axes
    }
    monkeypatch.undo()
    plt.close("all")
    return panels


def test_one_line_per_run_with_the_metric(monkeypatch, tmp_path, runs):
    panels = plotted_lines(monkeypatch, runs, ["loss", "odd"], tmp_path / "x.png")
    labels = [label for label, *_ in panels["loss"]]
    # two directories are named "a", so labels are paths
    assert labels == [str(runs[0]), str(runs[1]), f"{runs[1]}: not finite"]
    _, steps, values, _ = panels["loss"][1]
    assert steps == list(range(9)) and np.isnan(values[3]) and values[8] == 0.7
    assert panels["loss"][2][1] == [3]
    assert [(label, x, y) for label, x, y, _ in panels["odd"]] == [(str(runs[2]), [5], [1.0])]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_keeps_the_raw_line(monkeypatch, tmp_path, runs):
    panels = plotted_lines(monkeypatch, runs[:1], ["loss"], tmp_path / "x.svg", smooth=2)
    raw, smooth = panels["loss"]
    assert raw[2][:3] == [3.0, 2.0, 1.5] and 0.1 < raw[3] < 0.5
    assert smooth[0] == "a, mean of 2" and smooth[2][0] == pytest.approx(2.5)
    panels = plotted_lines(monkeypatch, runs[:1], ["loss"], tmp_path / "x.svg", smooth=3)
    assert len(panels["loss"]) == 1  # too few points for means of 3
    assert xml.etree.ElementTree.parse(tmp_path / "x.svg").getroot().tag.endswith("svg")


def test_diff_exits_with_1_if_runs_differ(monkeypatch, tmp_path, runs, capsys):
    a, b, other = runs
    assert run(monkeypatch, "--diff", a, b) == 1
    out = capsys.readouterr().out
    assert re.search("^loss: .*step 3 .*1.2 and nan, by inf", out, re.MULTILINE)
    assert re.search("step 3 .*loss$", out, re.MULTILINE)
    assert "data_wait" not in out and "next: " in out
    assert run(monkeypatch, "--diff", a, a) == 0
    assert "differ" not in capsys.readouterr().out
    assert run(monkeypatch, "--diff", a, b, "--metrics=data_wait") == 1
    assert re.search("^data_wait: .*step 0 ", capsys.readouterr().out, re.MULTILINE)
    assert run(monkeypatch, "--diff", a, other) == 1
    assert "loss: no common steps" in capsys.readouterr().out


def test_bad_arguments(monkeypatch, tmp_path, runs):
    assert "--out=FILE.png" in run(monkeypatch, runs[0])
    assert re.search("--diff .* 3 ", run(monkeypatch, "--diff", *runs))
    assert re.search("^error: x.pdf: .*[.]png or [.]svg", run(monkeypatch, runs[0], "--out=x.pdf"))
    message = run(monkeypatch, runs[0], "--metrics=odd", f"--out={tmp_path / 'x.png'}")
    assert re.search("odd.*data_wait, loss$", message)


def test_damaged_lines_are_counted(monkeypatch, tmp_path, capsys):
    log = write(tmp_path / "r", [{"step": 1, "loss": 2.0}, "x", '{"step": 2, "lo'], end="")
    assert run(monkeypatch, log, f"--out={tmp_path / 'x.png'}") == 0
    assert "1 damaged lines" in capsys.readouterr().err
