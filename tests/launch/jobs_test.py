"""The Slurm script with a fake srun; the manifests of GKE and SkyPilot."""

import math
import os
import shlex
import shutil
import signal
import subprocess

import pytest
import yaml

from dgpt_jax import cli
from dgpt_jax.config import roots
from dgpt_jax.distributed import multihost
from dgpt_jax.distributed.preemption import EXIT_PREEMPTED
from tests.support.fake_cloud import PYTHON, executable, wait_for
from tests.support.paths import ROOT

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >$FAKE/srun
cd / && while [[ $1 = --* ]]; do shift; done
exec "$@"
"""


def slurm(tmp_path, *words, **environment) -> subprocess.Popen:
    executable(tmp_path / "bin/srun", SRUN)
    executable(tmp_path / "bin/scontrol", "#!/usr/bin/env bash\necho $* >>$FAKE/scontrol\n")
    variables = {
        "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "96", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path), "FAKE": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
    }  # fmt: skip
    return subprocess.Popen(
        [ROOT / "tools/launch/launch_slurm.sh", *words], env=variables | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("code,requeued", [(0, False), (1, False), (75, True)])
def test_slurm_requeues_after_75(tmp_path, code, requeued):
    process = slurm(tmp_path, "--per=gpu", "--", "bash", "-c", f"exit {code}")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code and "next: " in output
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    flags = (tmp_path / "srun").read_text().split()
    assert flags[:3] == ["--ntasks-per-node=8", "--cpus-per-task=12", "--kill-on-bad-exit=0"]


def test_slurm_does_not_requeue_a_cancelled_job(tmp_path):
    """scancel signals the processes and the script, which waits until they have saved."""
    wait = "touch $FAKE/on; while :; do sleep 0.05; done"
    train = f"trap 'sleep 0.3; echo saved; exit 75' TERM; {wait}"
    process = slurm(tmp_path, "--", "bash", "-c", f"echo $$ >$FAKE/pid; {train}")
    wait_for((tmp_path / "on").exists)
    flags = (tmp_path / "srun").read_text().split()
    assert flags[:2] == ["--ntasks-per-node=1", "--cpus-per-task=96"]
    process.terminate()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "saved\nnext: " in output
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(
    "words,environment,message",
    [
        (("--per=core", "--", "ls"), {}, "--per=core"),
        ((), {}, " -- "),
        (("--", "ls"), {"SLURM_JOB_ID": ""}, "sbatch"),
    ],
)
def test_wrong_flags_for_slurm(tmp_path, words, environment, message):
    process = slurm(tmp_path, *words, **environment)
    (line,) = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 1 and line.startswith("error: ") and message in line


def test_slurm_directives():
    script = (ROOT / "tools/launch/launch_slurm.sh").read_text()
    directives, _, code = script.partition("set -euo pipefail")
    assert "#SBATCH --signal=TERM@300\n" in directives  # not B:, which signals only the script
    assert "#SBATCH --requeue\n" in directives and "\n#SBATCH" not in code


def parsed_train(words: list[str]) -> roots.TrainConfig:
    """Config of a training command that runs in the repository's root."""
    assert words[:3] == ["python", "-m", "dgpt_jax.train"]
    parser = cli.parser("", roots.TrainConfig)
    parser.add_argument("--workdir", required=True)
    argv = [word.replace("--config=", f"--config={ROOT}/") for word in words[3:]]
    return cli.parse(parser, roots.TrainConfig, argv)[1]


def test_jobset():
    jobset = yaml.safe_load((ROOT / "tools/launch/launch_gke.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # One process per machine with all its chips; the topology label gives the number of chips.
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    assert job["completions"] == job["parallelism"] == chips / limits["google.com/tpu"]
    train = parsed_train(container["command"])
    assert (
        train.platform == "tpu" and train.hosts == roots.HostsConfig()
    )  # JAX discovers the others
    assert train.batch_size % (chips * train.accum_steps) == 0
    # Exit code 75 and evictions fail the job for a reason whose restarts are not counted.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    saved, evicted = job["podFailurePolicy"]["rules"]
    assert saved["action"] == evicted["action"] == "FailJob"
    exits = {"containerName": container["name"], "operator": "In", "values": [EXIT_PREEMPTED]}
    assert saved["onExitCodes"] == exits
    assert evicted["onPodConditions"][0]["type"] == "DisruptionTarget"
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert pod["terminationGracePeriodSeconds"] >= 4 * multihost.HEARTBEAT_SECONDS
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in variables.values())
    assert int(variables["JAX_COORDINATOR_PORT"]) in [
        p["containerPort"] for p in container["ports"]
    ]


def test_xpk_command():
    text = (ROOT / "tools/launch/launch_gke.yaml").read_text()
    line = text[text.index("xpk workload") : text.index("apiVersion:")].replace("\n#", "\n")
    words = shlex.split(line.replace("\\\n", " "))
    flags = dict(word.partition("=")[::2] for word in words[3:])
    assert flags["--env"] == "JAX_COORDINATOR_PORT=8476"
    assert flags["--restart-on-exit-codes"] == str(EXIT_PREEMPTED)
    assert int(flags["--max-restarts"]) > 0 and flags["--tpu-type"] == "v5litepod-16"
    exec_, *command = flags["--command"].split()
    jobset = yaml.safe_load(text)
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert exec_ == "exec"
    assert set(container["containers"][0]["command"]) - set(command) == {"--config.platform=tpu"}


@pytest.mark.parametrize("extras,hosts_flags", [("tpu,gcs", 0), ("cuda,gcs", 3)])
def test_skypilot(tmp_path, extras, hosts_flags):
    sky = yaml.safe_load((ROOT / "tools/launch/launch_sky.yaml").read_text())
    recovery = sky["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [EXIT_PREEMPTED] and sky["resources"]["use_spot"]
    assert all(isinstance(value, str) for value in sky["envs"].values())
    executable(tmp_path / "bin/python3", PYTHON)
    environment = sky["envs"] | {
        "WORKDIR": "gs://b/run", "TOKENS": "gs://b/tokens", "EXTRAS": extras, "HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }  # fmt: skip
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for script in ("setup", "run"):
        subprocess.run(
            ["bash", "-c", sky[script]], cwd=tmp_path, env=environment, check=True, timeout=60
        )
    *_, install, train = (tmp_path / "installed").read_text().splitlines()
    assert f"-e .[{extras}]" in install
    parsed = parsed_train(train.split())
    assert parsed.data.path == "gs://b/tokens"
    if hosts_flags:
        assert parsed.hosts == roots.HostsConfig("10.0.0.1:8476", 2, 1)
    else:
        assert parsed.hosts == roots.HostsConfig()
