"""Commands in parallel: order, progress, failures, Ctrl-C, resuming."""

import re
import signal
import subprocess
import sys
import time

import pytest

from dgpt_jax.commands import jobs
from dgpt_jax.errors import UserError
from tests.support.paths import ROOT

TOUCH = "import pathlib, sys, time; time.sleep({}); pathlib.Path(sys.argv[1]).write_text({!r})"


def job(out, name, after=(), code=None, seconds=0.0):
    words = ("-c", code or TOUCH.format(seconds, name), str(out / name))
    return jobs.Job(name, f"makes {name}", out / name, words, after)


def started(capsys) -> list[str]:
    """Names of the started jobs, in order."""
    return re.findall(r"\] (\w+): makes", capsys.readouterr().err)


def test_order_and_resuming(tmp_path, capsys):
    a, b = job(tmp_path, "a", seconds=0.5), job(tmp_path, "b")
    c, d = job(tmp_path, "c", ("a",)), job(tmp_path, "d", ("b", "c"))
    logs = tmp_path / "logs"
    jobs.run([a, c, d, b], logs, groups=[[], []])
    assert started(capsys) == ["a", "b", "c", "d"]
    jobs.run([a, c, d, b], logs, groups=[[]])
    assert not started(capsys)
    (tmp_path / "c").unlink()  # and what follows it
    assert [x.name for x in jobs.pending([a, b, c, d], logs)] == ["c", "d"]
    changed = jobs.Job(a.name, a.about, a.output, (*a.words, "x"))
    assert [x.name for x in jobs.pending([changed, b, c, d], logs)] == ["a", "c", "d"]


def test_lines_of_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "LINE_SECONDS", 0.1)
    code = "import sys, time; print('step 3/7 loss 1.5', 'x' * 200, flush=True); time.sleep(0.6);"
    code += "open(sys.argv[1], 'w')"
    jobs.run([job(tmp_path, "train_both", code=code)], tmp_path / "logs", groups=[[]])
    lines = capsys.readouterr().err.splitlines()
    assert any("train_both: 3/7 loss 1.5" in line for line in lines)
    assert "(1 of 1)" in lines[-1] and max(map(len, lines)) < 100


def test_a_failure_stops_the_others(tmp_path):
    saving = (
        "import sys, time\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    open(sys.argv[1], 'w')"
    )
    slow = job(tmp_path, "slow", code=saving)
    bad = job(tmp_path, "bad", code="import time; time.sleep(1); raise SystemExit('it broke')")
    with pytest.raises(UserError, match=r"failed, see .*bad\.running\.txt:\n.*it broke"):
        jobs.run([slow, bad], tmp_path / "logs", groups=[[], []])
    assert (tmp_path / "slow").exists() and not slow.is_done(tmp_path / "logs")


SCRIPT = """
import sys
from pathlib import Path
from dgpt_jax import cli
from dgpt_jax.commands import jobs
out = Path({out!r})
code = '''
import sys, time
try:
    print("step 1/9 x", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[1], "w")
    sys.exit(130)
'''
job = jobs.Job("train", "trains", out / "saved", ("-c", code, str(out / "saved")))
cli.run(lambda: jobs.run([job], out / "logs", groups=[[]]))
"""


def test_ctrl_c_lets_commands_save(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(out=str(tmp_path))], cwd=ROOT, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "logs/train.running.txt"
    while not (log.exists() and "\nstep 1/9" in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130 and (tmp_path / "saved").exists()
    assert "stopping: train" in text and "Traceback" not in text
