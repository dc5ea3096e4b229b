"""tools/replay.py on a saved step."""

import sys

import pytest

from dgpt_jax import cli
from dgpt_jax.commands import replay
from dgpt_jax.errors import UserError
from tests.support.paths import GOLDEN


@pytest.mark.parametrize("text", ["0", "5:5", "7:3", "0:33", "33", "-3:5", "a", "1:2:3", "4:"])
def test_invalid_rows(text, monkeypatch):
    path = GOLDEN / "bad_step_float32"
    monkeypatch.setattr(sys, "argv", ["replay", str(path), f"--rows={text}"])
    with pytest.raises(UserError, match=r"rows.*START:STOP"):
        replay.main()


def test_command(monkeypatch, capsys):
    words = [str(GOLDEN / "bad_step_float32"), "--rows=1:3", "--layers=2"]
    monkeypatch.setattr(sys, "argv", ["replay", *words])
    cli.run(replay.main)
    lines = capsys.readouterr().out.splitlines()
    assert "rows 1:3" in lines[0] and "all 4 rows" in lines[0]
    assert lines[1].startswith("0 of 2 ") and len(lines) == 6
