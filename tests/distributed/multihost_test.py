"""Multi-process runs: joining, missing processes, launchers, ending together."""

import importlib.util
import json
import os
import signal
import socket
import time

import pytest

from dgpt_jax.distributed import launchers
from dgpt_jax.errors import UserError
from tests.support.data import image_dataset, random_teacher, token_store
from tests.support.processes import outputs_of, start

KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
JOIN = """
import json, os, sys, time
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from dgpt_jax import cli
from dgpt_jax.config import roots as config
from dgpt_jax.distributed import launchers, multihost, sharding

def main():
    workdir, platform, flags = sys.argv[1:]
    if "TPU_WORKER_HOSTNAMES" in os.environ:  # these CPUs count as TPUs until they have joined
        launchers.local_accelerator = iter(["a TPU"] + 9 * [""]).__next__
    multihost.start(config.HostsConfig(**json.loads(flags)), platform)
    try:
        print(*multihost.preflight(workdir, sharding.make_mesh(config.MeshConfig())), sep="\\n")
    finally:
        time.sleep(float(os.environ.get("SLOWER_BY", 0)))
    print("GPUs", CUDA_VISIBLE_DEVICES.value)

cli.run(main)
"""


def free_address(first: int = 0, last: int = 0) -> str:
    """An address of this machine with a free port, in first..last (0: any)."""
    for port in range(first, last + 1):
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return f"127.0.0.1:{server.getsockname()[1]}"
    raise OSError(f"no free port in {first}..{last}")


def join(workdir, *, platform: str = "cpu", devices: int = 1, environment=None, **flags):
    """A process that joins others with the values `flags` of config.hosts and prints the table."""
    words = ["-c", JOIN, workdir, platform, json.dumps(flags)]
    return start(words, devices=devices, **(environment or {}))


def test_missing_processes_are_counted(tmp_path):
    address = free_address()
    flags = {"coordinator": address, "num_processes": 3, "timeout": 15}
    processes = [join(tmp_path, process_id=process, **flags) for process in (0, 2)]
    outputs = outputs_of(processes, 90)
    assert [process.returncode for process in processes] == [1, 1]
    assert outputs[0].startswith("error: 2 of 3 processes ")
    for output in outputs:
        for text in (address, "within 15 s (config.hosts.timeout)", "JAX_COORDINATOR_PORT"):
            assert text in output


def test_the_work_directory_must_be_shared(tmp_path):
    flags = {"coordinator": free_address(), "num_processes": 2}
    directories = [tmp_path / "0", tmp_path / "1"]
    both = [
        # Process 1 is slower, and prints its error all the same.
        join(directory, devices=2, environment={"SLOWER_BY": str(2 * i)}, process_id=i, **flags)
        for i, directory in enumerate(directories)
    ]
    for output, directory in zip(outputs_of(both, 90), directories, strict=True):
        assert f" {directory}: --workdir " in output
        assert "Traceback" not in output
    assert all(process.returncode for process in both)


def slurm(process: int, port: int) -> dict[str, str]:
    """Environment of two tasks of srun on one node; JAX derives the port from the job id."""
    return {
        "SLURM_JOB_ID": str(4096 * 7 + port - 61440), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process),
    }  # fmt: skip


def open_mpi(process: int, port: int) -> dict[str, str]:
    """Environment of two ranks of mpirun on one host."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{4096 * (port - 61440)}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process), "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
    }  # fmt: skip


def gke(process: int, port: int) -> dict[str, str]:
    """Environment of two pods of a JobSet. Without MEGASCALE_*, JAX would query the metadata server
    for the number of slices."""
    return {
        "JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": str(port),
        "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(process),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0", **KUBERNETES, "JOB_COMPLETION_INDEX": str(process),
    }  # fmt: skip


@pytest.mark.parametrize("launcher", [slurm, open_mpi, gke])
def test_a_launcher_needs_no_flags(tmp_path, launcher):
    port = int(free_address(61440, 65535).partition(":")[2])
    settings = {"devices": 2, "platform": "" if launcher is gke else "cpu"}
    both = [join(tmp_path, **settings, environment=launcher(i, port)) for i in range(2)]
    outputs = outputs_of(both, 90)
    assert [process.returncode for process in both] == [0, 0], outputs
    assert not list(tmp_path.iterdir())  # the probe file is removed
    tables = [output[output.index("process  host") : output.index("GPUs")] for output in outputs]
    assert tables[0] == tables[1] and "mesh {'data': 4" in tables[0]
    rows = [line.split() for line in tables[0].splitlines()[1:3]]
    assert [(row[0], *row[2:]) for row in rows] == [("0", "2", "4"), ("1", "2", "4")]
    gpus = [output.partition("GPUs ")[2].strip() for output in outputs]
    assert gpus == (["all", "all"] if launcher is gke else ["0", "1"])


def test_an_unexpected_number_of_processes(tmp_path):
    port = int(free_address(61440, 65535).partition(":")[2])
    both = [join(tmp_path, num_processes=3, environment=slurm(i, port)) for i in range(2)]
    for output in outputs_of(both, 90):
        assert "error: config.hosts.num_processes is 3, JAX found 2: " in output
    assert all(process.returncode for process in both)


@pytest.mark.skipif(launchers.local_accelerator() == "a TPU", reason="there is a TPU")
def test_a_platform_that_is_unavailable_on_all_hosts(tmp_path):
    flags = {"coordinator": free_address(), "num_processes": 2}
    both = [join(tmp_path, platform="tpu", process_id=process, **flags) for process in range(2)]
    for output in outputs_of(both, 90):
        assert "error: config.platform=tpu is not available" in output
        assert "Traceback" not in output
    assert all(process.returncode for process in both)


@pytest.mark.parametrize(
    "env,accelerator,several",
    [
        ({}, "", False),
        ({}, "a GPU", False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, "", False),
        ({"SLURM_NTASKS": "8"}, "a GPU", False),  # in an sbatch script, without srun
        ({"SLURM_STEP_NUM_TASKS": "2"}, "a GPU", True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "", False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "", True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "a TPU", False),
        (KUBERNETES | {"TPU_WORKER_HOSTNAMES": "job-0.set,job-1.set"}, "a TPU", True),
        ({"TPU_WORKER_HOSTNAMES": "job-0.set", "MEGASCALE_NUM_SLICES": "2"}, "a TPU", True),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU", False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "", False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "a TPU", False),
        ({}, "a TPU", True),  # a Cloud TPU VM: JAX asks the metadata
        (KUBERNETES, "a GPU", False),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "1"}, "a GPU", True),
    ],
)
def test_launchers_are_detected(monkeypatch, env, accelerator, several):
    monkeypatch.setattr(os, "environ", dict(env))
    monkeypatch.setattr(launchers, "local_accelerator", lambda: accelerator)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert launchers.started_several("") == several
    if accelerator == "a TPU":
        assert not launchers.started_several("cpu")


def test_a_kubernetes_pod_needs_the_package(monkeypatch):
    monkeypatch.setattr(os, "environ", KUBERNETES | {"JOB_COMPLETION_INDEX": "0"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[k8s\]'.* config.hosts.coordinator"):
        launchers.started_several("gpu")


@pytest.mark.parametrize(
    "env,all_gpus",
    [
        (slurm(0, 61440), False),
        (slurm(0, 61440) | {"SLURM_STEP_NUM_NODES": "2"}, True),
        (slurm(1, 61440) | {"CUDA_VISIBLE_DEVICES": "0"}, True),
        (slurm(1, 61440) | {"CUDA_VISIBLE_DEVICES": "0,1"}, False),
        (open_mpi(0, 61440), False),
        (open_mpi(0, 61440) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        (slurm(0, 61440) | {"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "1"}, False),
        ({}, False),
    ],
)
def test_gpus_of_a_task(monkeypatch, env, all_gpus):
    monkeypatch.setattr(os, "environ", env)
    assert launchers.owns_all_gpus() == all_gpus


# A run that fails at its fourth save; a save is in flight at every step.
FAILING = """
import time
from dgpt_jax import cli, train
from dgpt_jax.training import checkpointing

save, saved = checkpointing.Checkpoints.save, []

def save_and_fail(self, *args):
    if len(saved) == 3 and FAULT == "before":
        raise RuntimeError("planted")
    if len(saved) == 3:  # now writes take ten minutes, in the background
        checkpointing.ocp.CheckpointManager._finalize = lambda *args: time.sleep(600)
    saved.append(save(self, *args))
    if len(saved) == 4:
        raise RuntimeError("planted")

checkpointing.Checkpoints.save = save_and_fail
cli.run(train.main)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("hosts")
    dataset = image_dataset(root, per_class=10)
    return token_store(root, dataset, random_teacher(root / "teacher"), views=2)


def train(store, workdir, address, process, *words, code=("-m", "dgpt_jax.train")):
    return start(
        [
            *code, "--config=configs/quickstart.py", f"--workdir={workdir}",
            f"--config.data.path={store}", "--config.model.image_size=16",
            "--config.model.width=24", "--config.model.depth=2", "--config.model.heads=2",
            "--config.batch_size=8", "--config.total=100000 steps",
            f"--config.hosts.coordinator={address}", "--config.hosts.num_processes=2",
            f"--config.hosts.process_id={process}", *words,
        ],
        devices=2,
    )  # fmt: skip


def steps_of(workdir) -> list[int]:
    text = (workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [line["step"] for line in lines if "loss" in line]


def check_resume_and_sigterm_to_all(store, workdir, words):
    """The same command resumes; a scheduler's signal goes to all processes."""
    last, address = steps_of(workdir)[-1], free_address()
    both = [train(store, workdir, address, process, *words) for process in range(2)]
    while steps_of(workdir)[-1] < last + 3:
        time.sleep(0.5)
        assert all(process.poll() is None for process in both), outputs_of(both, 90)
    for process in both:
        process.send_signal(signal.SIGTERM)
    outputs = outputs_of(both, 90)
    assert [process.returncode for process in both] == [75, 75], outputs
    assert f" step {last} in {workdir}" in outputs[0]
    steps = steps_of(workdir)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number,victim",
    [(signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGINT, 1)],
)
def test_all_hosts_end_together(store, tmp_path, number, victim):
    """Preempted or interrupted: all save the same step. Killed: the other exits too."""
    address, metrics = free_address(), tmp_path / "metrics.jsonl"
    words = ("--config.checkpoint.every=2 steps", "--config.log_every=1", "--config.profile=1,3")
    both = [train(store, tmp_path, address, process, *words) for process in range(2)]
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.5)
        assert all(process.poll() is None for process in both), outputs_of(both, 90)
    both[victim].send_signal(number)
    outputs = outputs_of(both, 90)
    codes = [process.returncode for process in both]
    if number != signal.SIGKILL:
        assert codes == [75, 75 if number == signal.SIGTERM else 130], outputs
        traces = [file.name[:5] for file in tmp_path.glob("profile/*/*/step_1/*.xplane.pb")]
        assert sorted(traces) == ["0000.", "0001."]
        if number == signal.SIGTERM:
            check_resume_and_sigterm_to_all(store, tmp_path, words[:2])
    else:
        assert all(codes), codes


@pytest.mark.slow
@pytest.mark.parametrize("failing,fault", [(0, "before"), (1, "before"), (1, "while")])
def test_an_exception_ends_all_hosts(store, tmp_path, failing, fault):
    """Before a save that the other has started, or while its own slow save is in flight."""
    address = free_address()
    codes = [("-m", "dgpt_jax.train")] * 2
    codes[failing] = ("-c", f"FAULT = {fault!r}\n{FAILING}")
    words = ("--config.checkpoint.every=1 steps", "--config.log_every=1")
    both = [
        train(store, tmp_path, address, process, *words, code=code)
        for process, code in enumerate(codes)
    ]
    third = tmp_path / "checkpoints/3"
    while not third.exists() and all(process.poll() is None for process in both):
        time.sleep(0.1)
    outputs = outputs_of(both, 90)
    assert all(process.returncode for process in both)
    trace = outputs[failing].partition("Traceback (most recent call last)")[2]
    assert "in save_and_fail\nRuntimeError: planted\n" in trace
