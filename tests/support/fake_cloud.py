"""A fake Google Cloud for the launchers: a working tree, gcloud and the VM image's Python."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.support.paths import ROOT

TPU = ("--name=vit", "--zone=us-central2-b")
# Stand-in for training: counts steps in a directory that outlives the slice, saves on SIGTERM.
TRAIN = """
trap 'echo saved; exit 75' TERM
file=$1/$HOSTNAME
echo "port $JAX_COORDINATOR_PORT color $COLOR begins at $(cat $file 2>/dev/null)"
while [ "$(wc -l <$file 2>/dev/null || echo 0)" -lt $2 ]; do echo step >>$file; sleep 0.05; done
exit ${3:-0}
"""
# Fake Python of the VM image: records its arguments, installs nothing, creates venvs for uv.
PYTHON = """#!/usr/bin/env bash
echo "python $*" >>$HOME/installed
if [ "$2" = uv ]; then
  directory=${@: -1}
  mkdir -p $directory/bin && cp $0 $directory/bin/python
fi
"""


def executable(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


LAUNCHER = "tools/launch/launch_tpu_vm.sh"


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


class Cloud:
    """A working tree with the launcher, and the fake Google Cloud."""

    def __init__(self, root: Path, workers: int):
        self.tree, self.fake, self.steps = root / "tree", root / "fake", root / "steps"
        self.steps.mkdir()
        launch = ("launch_tpu_vm.sh", "tpu_vm_slice.sh", "tpu_vm_worker.sh")
        files = [f"tools/launch/{name}" for name in launch]
        (self.tree / LAUNCHER).parent.mkdir(parents=True)
        for name in (*files, "tools/setup_venv.sh", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.tree / name)
        (self.tree / "train.sh").write_text(TRAIN)
        (self.tree / ".gitignore").write_text("secret\n")
        (self.tree / "secret").write_text("")
        subprocess.run(["git", "init", "-q", self.tree], check=True)
        executable(self.fake / "bin/python3", PYTHON)
        executable(self.fake / "bin/gcloud", (ROOT / "tests/support/fake_gcloud.sh").read_text())
        self.environment = os.environ | {
            "PATH": f"{self.fake / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "WORKERS": str(workers),
        }

    def script(self, **lines: str):
        for name, text in lines.items():
            (self.fake / name).write_text(text.replace(" ", "\n") + "\n")

    def start(self, command: str, *words) -> subprocess.Popen:
        return subprocess.Popen(
            [self.tree / LAUNCHER, command, *TPU, "--poll=0", *map(str, words)],
            env=self.environment, cwd=self.tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, command: str, *words) -> tuple[int, str]:
        process = self.start(command, *words)
        try:
            output = process.communicate(timeout=60)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: `keep` may run forever
        return process.returncode, output

    def calls(self, pattern: str = "") -> list[str]:
        return [line for line in self._recorded().splitlines() if re.search(pattern, line)]

    def _recorded(self) -> str:
        file = self.fake / "calls"
        return file.read_text() if file.exists() else ""

    def train(self, steps: int, code: int = 0) -> tuple:
        return ("--", "bash", "train.sh", self.steps, steps, code)
