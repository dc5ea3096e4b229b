"""The TPU VM launcher with a fake gcloud that runs the commands in local directories."""

import os
import shutil
import subprocess

import pytest

from tests.support.fake_cloud import TPU, Cloud, wait_for
from tests.support.paths import ROOT


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path, workers=2)
    yield cloud
    cloud.run("delete")


def test_keep_continues_after_a_preemption(cloud):
    """No capacity at first, a preemption, a broken connection: the run still completes."""
    cloud.script(creates="capacity ok", follows="preempt drop ok")
    words = ("--type=v4-16", "--spot", "--env=COLOR=a b", "--delete_at_end", *cloud.train(30))
    code, output = cloud.run("keep", *words)
    assert code == 0, output
    assert "no capacity in us-central2-b" in output and "vit is PREEMPTED" in output
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
    assert "next: tools/launch/launch_tpu_vm.sh delete --name=vit --zone=us-central2-b" in output


def test_a_stopped_run_saves_and_is_not_restarted(cloud):
    """Setup skips ignored files; a second run is an error; `keep` attaches to the first."""
    assert cloud.run("create", "--type=v6e-8")[0] == 0
    code, output = cloud.run("run", *cloud.train(9))
    assert code == 1 and "`setup`" in output
    assert cloud.run("setup")[0] == 0
    home = cloud.fake / "home/1"
    assert (home / "dgpt_jax/train.sh").exists() and not (home / "dgpt_jax/secret").exists()
    installed = (home / "installed").read_text()
    assert "-m uv venv --quiet --seed --python 3.11" in installed
    assert "-c constraints.txt" in installed and " -e .[tpu,gcs]" in installed
    running = cloud.start("run", *cloud.train(10_000))
    wait_for((cloud.steps / "t1v-n-fake-w-1").exists)
    wait_for(lambda: cloud.calls("follow$"))
    running.kill()  # the launcher, not the run
    code, output = cloud.run("run", *cloud.train(9))
    assert code == 1 and "`attach` or `stop`" in output
    assert cloud.run("setup")[1].count("busy") == 2
    keeping = cloud.start("keep", "--type=v6e-8", *cloud.train(10_000))
    wait_for(lambda: cloud.calls("follow$")[1:])
    code, output = cloud.run("stop")
    assert code == 0 and "worker 0 ended 75 stopped" in output, output
    output = keeping.communicate(timeout=60)[0]
    assert keeping.returncode == 75 and "attaching" in output
    assert len(cloud.calls("hold|start env")) == 3  # two of them fail
    code, output = cloud.run("status")
    assert code == 0 and "vit is READY, 2 workers" in output and "worker 1 ended 75" in output


def test_keep_distinguishes_failures_from_lost_slices(cloud):
    """An unreachable worker replaces the slice; a failed run ends `keep` with its exit code."""
    cloud.script(queue="WAITING_FOR_RESOURCES ACTIVE", unreachable="1")
    words = ("--type=v5e-16", "--queued", *cloud.train(3, 7))
    code, output = cloud.run("keep", *words)
    assert code == 7, output
    assert "from worker 1 of vit (2 workers)" in output
    assert "vit is WAITING_FOR_RESOURCES" in output
    assert len(cloud.calls("queued-resources create")) == 2 and not cloud.calls("tpu-vm create")
    assert len(cloud.calls("queued-resources delete")) == 1
    create = cloud.calls("queued-resources create")[0]
    assert "--accelerator-type=v5litepod-16" in create and "--node-id=vit" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    cloud.run("delete", "--queued")


def test_two_slices_as_one_run(cloud):
    """Created as one queued resource; an unreachable worker of the second replaces both."""
    cloud.script(queue="WAITING_FOR_RESOURCES ACTIVE", unreachable="1.0")
    (cloud.fake / "states").write_text("READY\nREADY\nREADY\nPREEMPTED\n")
    words = ("--type=v5e-16", "--slices=2")
    code, output = cloud.run("keep", *words, *cloud.train(20))
    assert code == 0, output
    assert "from worker 1.0 of vit (2 workers per slice)" in output
    first, _ = creates = cloud.calls("queued-resources create")
    assert "vit is PREEMPTED" in output  # the second slice
    assert len(creates) == 2 and "--node-count=2" in first and "--node-prefix=vit" in first
    assert "--node-id" not in first and not cloud.calls("tpu-vm (create|delete)")
    for worker in ("0-w-0", "0-w-1", "1-w-0", "1-w-1"):
        assert (cloud.steps / f"t1v-n-fake{worker}").read_text() == 20 * "step\n"
    (logs,) = (cloud.tree / "tpu_logs/vit").iterdir()
    assert sorted(path.name for path in logs.iterdir()) == [
        "0.0.log", "0.1.log", "1.0.log", "1.1.log",
    ]  # fmt: skip
    assert (
        "next: tools/launch/launch_tpu_vm.sh delete --name=vit --zone=us-central2-b --slices=2"
        in output
    )
    code, output = cloud.run("status", "--slices=2")
    assert code == 0 and "vit is READY, 4 workers" in output and "worker 1.1 ended 0" in output
    cloud.run("delete", "--slices=2")


def test_keep_restarts_after_75(cloud):
    command = f"[ -e {cloud.steps}/$HOSTNAME ] || {{ touch {cloud.steps}/$HOSTNAME; exit 75; }}"
    (cloud.fake / "state").write_text("PREEMPTED\n")  # before `create`
    code, output = cloud.run("create", "--type=v5p-16")
    assert code == 1 and "error: vit is PREEMPTED" in output
    code, output = cloud.run("keep", "--type=v5p-16", "--", "bash", "-c", command)
    assert code == 0 and "stopped after saving" in output
    assert len(cloud.calls("start env")) == 2
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 1


def test_preemption_that_looks_like_a_failure(cloud):
    """If one machine is preempted, the others fail first; the slice's state changes later."""
    assert cloud.run("create", "--type=v4-16")[0] == 0
    cloud.script(states="READY READY PREEMPTED PREEMPTED")
    command = f"[ -e {cloud.steps}/$HOSTNAME ] || {{ touch {cloud.steps}/$HOSTNAME; exit 1; }}"
    code, output = cloud.run("keep", "--type=v4-16", "--", "bash", "-c", command)
    assert code == 0 and "vit is PREEMPTED" in output
    assert len(cloud.calls("create")) == 2 and len(cloud.calls("delete")) == 1


def test_a_slice_that_may_come_back_is_not_deleted(cloud):
    """`keep` reattaches after network errors here or repairs of the slice."""
    assert cloud.run("create", "--type=v4-16")[0] == 0
    for state, message in {"error": "`attach`", "REPAIRING": "vit is lost (REPAIRING)"}.items():
        cloud.script(follows="drop", states=f"READY {state} {state}")
        code, output = cloud.run("attach")
        assert code == 1 and message in output
    cloud.script(follows="drop", states="READY error REPAIRING error REPAIRING")
    code, output = cloud.run("keep", "--type=v4-16", *cloud.train(20))
    assert code == 0 and "attaching" in output
    assert len(cloud.calls("start env")) == 1 and not cloud.calls("delete")


def test_create_without_quota_or_capacity(cloud):
    cloud.script(creates="quota capacity")
    code, output = cloud.run("create", "--type=v4-16")
    assert code == 1 and "quota" in output and "v4-16" in output
    code, output = cloud.run("create", "--type=v4-16")
    assert code == 1 and "error: no capacity for v4-16 in us-central2-b" in output
    code, output = cloud.run("run", *cloud.train(1))
    assert code == 1 and "error: vit is ABSENT" in output and "`create`" in output


def dry_run(*words) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": "/usr/bin:/bin"}
    script = ROOT / "tools/launch/launch_tpu_vm.sh"
    return subprocess.run(
        [script, *words], env=environment, capture_output=True, text=True, timeout=60
    )


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
        ((), "missing command"),
        (("destroy",), "destroy"),
        (("run", *TPU, "--spot"), "after --"),
        (("create", *TPU), "--type "),
        (("create", *TPU, "--type=v9-8"), "--type=v9-8"),
        (("create", *TPU, "--zome=x"), "--zome=x"),
        (("status", "--name=vit"), "--zone "),
        (("create", *TPU, "--type=v4-8", "--slices=1"), "--slices "),
        (("keep", *TPU, "--poll=1s", "--", "ls"), "got 1s"),
        (("stop", *TPU, "--", "ls"), "stop "),
    ],
)
def test_wrong_flags_of_the_launcher(words, message):
    ended = dry_run(*words)
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [*ROOT.glob("tools/**/*.sh"), *ROOT.glob("tests/**/*.sh")]
    ended = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
