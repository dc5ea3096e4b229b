"""The launcher of TPU VMs, against a stand-in for gcloud that runs for real what it is told to."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TPU = ("--name=vit", "--zone=us-central2-b")
# A run as training is: it counts steps in a directory that outlives the slice, SIGTERM saves.
TRAIN = """
trap 'echo saved; exit 75' TERM
file=$1/$HOSTNAME
echo "port $JAX_COORDINATOR_PORT color $COLOR begins at $(cat $file 2>/dev/null)"
while [ "$(wc -l <$file 2>/dev/null || echo 0)" -lt $2 ]; do echo step >>$file; sleep 0.05; done
exit ${3:-0}
"""
# Python of an image: installs nothing, and makes an interpreter where uv is asked for a venv.
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


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


class Cloud:
    """A working tree with the launchers, and the stand-in for Google's cloud."""

    def __init__(self, root: Path, workers: int):
        self.tree, self.fake, self.steps = root / "tree", root / "fake", root / "steps"
        self.steps.mkdir()
        (self.tree / "tools").mkdir(parents=True)
        for name in ("launch_tpu_vm.sh", "tpu_vm_slice.sh", "tpu_vm_worker.sh", "setup_venv.sh"):
            shutil.copy(ROOT / "tools" / name, self.tree / "tools")
        for name in ("setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.tree)
        (self.tree / "train.sh").write_text(TRAIN)
        (self.tree / ".gitignore").write_text("secret\n")
        (self.tree / "secret").write_text("")
        subprocess.run(["git", "init", "-q", self.tree], check=True)
        executable(self.fake / "bin/python3", PYTHON)
        executable(self.fake / "bin/gcloud", (ROOT / "tests/fake_gcloud.sh").read_text())
        self.environment = os.environ | {
            "PATH": f"{self.fake / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "WORKERS": str(workers),
        }

    def plays(self, **lines: str):
        for name, text in lines.items():
            (self.fake / name).write_text(text.replace(" ", "\n") + "\n")

    def start(self, command: str, *words) -> subprocess.Popen:
        return subprocess.Popen(
            [self.tree / "tools/launch_tpu_vm.sh", command, *TPU, "--poll=0", *map(str, words)],
            env=self.environment, cwd=self.tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, command: str, *words) -> tuple[int, str]:
        process = self.start(command, *words)
        try:
            output = process.communicate(timeout=60)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: `keep` may go on for ever
        return process.returncode, output

    def calls(self, pattern: str = "") -> list[str]:
        return [line for line in self.told().splitlines() if re.search(pattern, line)]

    def told(self) -> str:
        file = self.fake / "calls"
        return file.read_text() if file.exists() else ""

    def train(self, steps: int, code: int = 0) -> tuple:
        return ("--", "bash", "train.sh", self.steps, steps, code)


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path, workers=2)
    yield made
    made.run("delete")


def test_keep_continues_after_a_preemption(cloud):
    """No capacity at first; a preemption; a broken connection: the run comes to its end."""
    cloud.plays(creates="capacity ok", follows="preempt drop ok")
    words = ("--type=v4-16", "--spot", "--env=COLOR=a b", "--delete_at_end", *cloud.train(30))
    code, output = cloud.run("keep", *words)
    assert code == 0, output
    assert "no capacity in us-central2-b" in output and "vit is PREEMPTED: the run" in output
    creates = cloud.calls("tpu-vm create")
    assert len(creates) == 3 and len(cloud.calls("tpu-vm delete")) == 2
    assert "--accelerator-type=v4-16" in creates[0] and "--spot" in creates[0]
    assert "--version=tpu-ubuntu2204-base" in creates[0]
    for worker in range(2):
        assert (cloud.steps / f"t1v-n-fake-w-{worker}").read_text() == 30 * "step\n"
    (logs,) = (cloud.tree / "tpu_logs/vit").iterdir()
    for worker in range(2):
        log = (logs / f"{worker}.log").read_text()
        assert "port 8476 color a b begins at step" in log and "ended with 0" in log
    assert "next: tools/launch_tpu_vm.sh delete --name=vit --zone=us-central2-b" in output


def test_a_stopped_run_has_saved_and_is_not_begun_again(cloud):
    """Setup copies what git does not ignore; a second run is refused; `keep` attaches to it."""
    assert cloud.run("create", "--type=v6e-8")[0] == 0
    code, output = cloud.run("run", *cloud.train(9))
    assert code == 1 and "error: vit is not set up" in output
    assert cloud.run("setup")[0] == 0
    home = cloud.fake / "home/1"
    assert (home / "dgpt_jax/train.sh").exists() and not (home / "dgpt_jax/secret").exists()
    installed = (home / "installed").read_text()
    assert "-m uv venv --quiet --seed --python 3.11" in installed
    assert "-c constraints.txt -e .[tpu,gcs]" in installed
    running = cloud.start("run", *cloud.train(10_000))
    wait_for((cloud.steps / "t1v-n-fake-w-1").exists)
    wait_for(lambda: cloud.calls("follow$"))
    running.kill()  # the launcher, not the run
    code, output = cloud.run("run", *cloud.train(9))
    assert code == 1 and "error: a run is on in vit" in output
    assert cloud.run("setup")[1].count("busy") == 2
    keeping = cloud.start("keep", "--type=v6e-8", *cloud.train(10_000))
    wait_for(lambda: cloud.calls("follow$")[1:])
    code, output = cloud.run("stop")
    assert code == 0 and "worker 0 ended 75 stopped" in output, output
    output = keeping.communicate(timeout=60)[0]
    assert keeping.returncode == 75 and "a run is on in vit: attaching" in output
    assert len(cloud.calls("hold|start env")) == 3  # two of them refused
    code, output = cloud.run("status")
    assert code == 0 and "vit is READY, 2 workers" in output and "worker 1 ended 75" in output


def test_keep_tells_failures_from_lost_slices(cloud):
    """A worker that does not answer costs the slice; a run that fails ends `keep` with its code."""
    cloud.plays(queue="WAITING_FOR_RESOURCES ACTIVE", unreachable="1")
    words = ("--type=v5e-16", "--queued", *cloud.train(3, 7))
    code, output = cloud.run("keep", *words)
    assert code == 7, output
    assert "no answer from worker 1 of vit (2 workers)" in output
    assert "vit is WAITING_FOR_RESOURCES" in output
    assert len(cloud.calls("queued-resources create")) == 2 and not cloud.calls("tpu-vm create")
    assert len(cloud.calls("queued-resources delete")) == 1
    create = cloud.calls("queued-resources create")[0]
    assert "--accelerator-type=v5litepod-16" in create and "--node-id=vit" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    cloud.run("delete", "--queued")


def test_two_slices_as_one_run(cloud):
    """Made together by the queue; one worker of the second that is lost costs both."""
    cloud.plays(queue="WAITING_FOR_RESOURCES ACTIVE", unreachable="1.0")
    (cloud.fake / "states").write_text("READY\nREADY\nREADY\nPREEMPTED\n")
    words = ("--type=v5e-16", "--slices=2")
    code, output = cloud.run("keep", *words, *cloud.train(20))
    assert code == 0, output
    assert "no answer from worker 1.0 of vit (2 workers a slice)" in output
    first, _ = creates = cloud.calls("queued-resources create")
    assert "vit is PREEMPTED: the run" in output  # the second of them
    assert len(creates) == 2 and "--node-count=2" in first and "--node-prefix=vit" in first
    assert "--node-id" not in first and not cloud.calls("tpu-vm (create|delete)")
    for worker in ("0-w-0", "0-w-1", "1-w-0", "1-w-1"):
        assert (cloud.steps / f"t1v-n-fake{worker}").read_text() == 20 * "step\n"
    (logs,) = (cloud.tree / "tpu_logs/vit").iterdir()
    assert sorted(path.name for path in logs.iterdir()) == [
        "0.0.log", "0.1.log", "1.0.log", "1.1.log",
    ]  # fmt: skip
    assert (
        "next: tools/launch_tpu_vm.sh delete --name=vit --zone=us-central2-b --slices=2" in output
    )
    code, output = cloud.run("status", "--slices=2")
    assert code == 0 and "vit is READY, 4 workers" in output and "worker 1.1 ended 0" in output
    cloud.run("delete", "--slices=2")


def test_keep_runs_again_what_has_ended_with_75(cloud):
    command = f"[ -e {cloud.steps}/$HOSTNAME ] || {{ touch {cloud.steps}/$HOSTNAME; exit 75; }}"
    (cloud.fake / "state").write_text("PREEMPTED\n")  # while nobody looked
    code, output = cloud.run("create", "--type=v5p-16")
    assert code == 1 and "error: vit is PREEMPTED: delete it first" in output
    code, output = cloud.run("keep", "--type=v5p-16", "--", "bash", "-c", command)
    assert code == 0 and "stopped after saving: the same command continues" in output
    assert len(cloud.calls("start env")) == 2
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 1


def test_a_failure_that_was_a_preemption(cloud):
    """The others fail when one machine is taken; the state of the slice tells it a little later."""
    assert cloud.run("create", "--type=v4-16")[0] == 0
    cloud.plays(states="READY READY PREEMPTED PREEMPTED")
    command = f"[ -e {cloud.steps}/$HOSTNAME ] || {{ touch {cloud.steps}/$HOSTNAME; exit 1; }}"
    code, output = cloud.run("keep", "--type=v4-16", "--", "bash", "-c", command)
    assert code == 0 and "vit is PREEMPTED: the run" in output
    assert len(cloud.calls("create")) == 2 and len(cloud.calls("delete")) == 1


def test_a_slice_that_may_come_back_is_not_deleted(cloud):
    """The network here fails, or the slice is away for a while: `keep` attaches again."""
    assert cloud.run("create", "--type=v4-16")[0] == 0
    lost = "error: the connection to vit is lost, its run goes on: `attach`"
    for state, message in {"error": lost, "REPAIRING": "error: vit is lost (REPAIRING)"}.items():
        cloud.plays(follows="drop", states=f"READY {state} {state}")
        code, output = cloud.run("attach")
        assert code == 1 and message in output
    cloud.plays(follows="drop", states="READY error REPAIRING error REPAIRING")
    code, output = cloud.run("keep", "--type=v4-16", *cloud.train(20))
    assert code == 0 and "a run is on in vit: attaching" in output
    assert len(cloud.calls("start env")) == 1 and not cloud.calls("delete")


def test_quota_and_capacity_end_create(cloud):
    cloud.plays(creates="quota capacity")
    code, output = cloud.run("create", "--type=v4-16")
    assert code == 1 and "error: the quota of the project does not allow v4-16" in output
    code, output = cloud.run("create", "--type=v4-16")
    assert code == 1 and "error: no capacity for v4-16 in us-central2-b now: --queued" in output
    code, output = cloud.run("run", *cloud.train(1))
    assert code == 1 and "error: vit is ABSENT, not READY: `create`" in output


def dry_run(*words) -> subprocess.CompletedProcess:
    bare = os.environ | {"PATH": "/usr/bin:/bin"}
    script = ROOT / "tools/launch_tpu_vm.sh"
    return subprocess.run([script, *words], env=bare, capture_output=True, text=True, timeout=60)


def test_a_dry_run_shows_every_command():
    ended = dry_run(
        "keep", *TPU, "--type=v6e-64", "--project=p", "--spot", "--dry_run", "--port=1234",
        "--create_arg=--network=net", "--ssh_arg=--internal-ip",
        "--", "python", "-c", "print(\n'a  b')",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("+ ")]
    assert [" ".join(line.split()[4:6]) for line in lines] == [
        "tpu-vm describe", "tpu-vm create", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh",
        "tpu-vm ssh", "tpu-vm describe", "tpu-vm ssh", "tpu-vm delete",
    ]  # fmt: skip
    assert all("vit" in line and "--zone=us-central2-b --project=p" in line for line in lines)
    assert "--version=v2-alpha-tpuv6e --spot" in lines[1] and "--network=net" in lines[1]
    assert lines[1].count("--network=net") == 1 and "--worker=all --internal-ip" in lines[3]
    start = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {lines[5]}"], capture_output=True, text=True
    ).stdout.splitlines()[-1]
    inner = start.partition("; bash tpu_vm_worker.sh start ")[2]
    assert inner.startswith("env JAX_COORDINATOR_PORT=1234 ")
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {inner}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[-4:] == ["python", "-c", "print(", "'a  b')"]


@pytest.mark.parametrize(
    "words,message",
    [
        ((), "a command is missing"),
        (("destroy",), "unknown command destroy"),
        (("run", *TPU, "--spot"), "run needs a command after --"),
        (("create", *TPU), "--type is missing"),
        (("create", *TPU, "--type=v9-8"), "no runtime version is known for --type=v9-8"),
        (("create", *TPU, "--zome=x"), "cannot read --zome=x"),
        (("status", "--name=vit"), "--zone is missing"),
        (("create", *TPU, "--type=v4-8", "--slices=1"), "--slices is for 2 or more, got 1"),
        (("keep", *TPU, "--poll=1s", "--", "ls"), "--poll takes a number, got 1s"),
        (("stop", *TPU, "--", "ls"), "stop takes no command after --"),
    ],
)
def test_wrong_flags_of_the_launcher(words, message):
    ended = dry_run(*words)
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_by_shellcheck():
    scripts = [*ROOT.glob("tools/*.sh"), *ROOT.glob("tests/*.sh")]
    ended = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
