"""Commands whose starter was killed save and end; the same job waits for them."""

import subprocess
import sys
import time

from tests.support.paths import ROOT

KILLED = """
import sys
from pathlib import Path
from dgpt_jax.commands import jobs
out = Path({out!r})
code = '''
import dgpt_jax.distributed.early_signals
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("step 1/9 x", flush=True)
time.sleep({seconds})
'''
job = jobs.Job("train", "trains", out / "saved", ("-c", code, str(out / "saved")))
jobs.run([job], out / "logs", groups=[[]])
"""


def test_after_a_kill_commands_save_and_are_waited_for(tmp_path):
    def start(seconds):
        script = KILLED.format(out=str(tmp_path), seconds=seconds)
        return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)

    killed, log = start(60), tmp_path / "logs/train.running.txt"
    while not (log.exists() and "\nstep 1/9" in log.read_text()):
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    again = start(0)
    assert again.wait(timeout=60) == 0
    assert (tmp_path / "saved").read_text() == "saved"  # by the first command, before the second
    assert log.with_name("train.txt").read_text().count("\nstep 1/9 x\n") == 1
