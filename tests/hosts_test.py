"""Several processes as one program: they meet or say who is missing, and they end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data import image_dataset, random_teacher, token_store

ROOT = Path(__file__).parent.parent
MEET = """
import sys
from dgpt_jax import cli, config, hosts, sharding

def main():
    address, processes, process, timeout, workdir = sys.argv[1:]
    numbers = {"processes": int(processes), "process": int(process), "timeout": int(timeout)}
    hosts.start(config.Hosts(coordinator=address, **numbers), "cpu")
    print(*hosts.preflight(workdir, sharding.make_mesh(config.Mesh())), sep="\\n")

cli.run(main)
"""


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(words, *, devices: int = 1) -> subprocess.Popen:
    settings = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | settings,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_missing_processes_are_counted(tmp_path):
    address = free_address()
    came = [start(["-c", MEET, address, 3, process, 15, tmp_path]) for process in (0, 2)]
    outputs = [process.communicate()[0] for process in came]
    assert [process.returncode for process in came] == [1, 1]
    assert (
        outputs[0]
        == f"error: saw 2 of 3 processes at {address} within 15 s (config.hosts.timeout)\n"
    )
    assert f"error: the processes did not meet at {address}" in outputs[1]


@pytest.mark.parametrize("shared", [True, False])
def test_the_work_directory_must_be_shared(tmp_path, shared):
    address = free_address()
    directories = [tmp_path / "0", tmp_path / ("0" if shared else "1")]
    both = [
        start(["-c", MEET, address, 2, process, 60, directory], devices=2)
        for process, directory in enumerate(directories)
    ]
    outputs = [process.communicate()[0] for process in both]
    if shared:
        assert [process.returncode for process in both] == [0, 0], outputs
        assert "process  host" in outputs[0] and "mesh {'data': 4" in outputs[1]
        assert not list(directories[0].iterdir())
    else:
        assert all(process.returncode for process in both)
        assert any("must be one directory that all hosts share" in output for output in outputs)


def train(store, workdir, address, process, *words) -> subprocess.Popen:
    return start(
        [
            "-m", "dgpt_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}",
            f"--config.data.path={store}", "--config.model.image_size=16",
            "--config.model.width=24", "--config.model.depth=2", "--config.model.heads=2",
            "--config.batch_size=8",
            "--config.total=4000 steps", "--config.checkpoint.every=100 steps",
            f"--config.hosts.coordinator={address}", "--config.hosts.processes=2",
            f"--config.hosts.process={process}", *words,
        ],
        devices=2,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_all_hosts_end_together(tmp_path, number):
    """A preempted host: all save the same step. A dead or interrupted one: the other ends too."""
    dataset = image_dataset(tmp_path, per_class=10)
    store = token_store(tmp_path, dataset, random_teacher(tmp_path / "teacher"), views=2)
    address, metrics = free_address(), tmp_path / "run/metrics.jsonl"
    both = [train(store, tmp_path / "run", address, process) for process in range(2)]
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.5)
        assert all(process.poll() is None for process in both), both[0].communicate()[0][-2000:]
    began = time.monotonic()
    both[1].send_signal(number)
    outputs = [process.communicate(timeout=90)[0] for process in both]
    assert time.monotonic() - began < 60
    codes = [process.returncode for process in both]
    if number == signal.SIGTERM:
        assert codes == [75, 75] and "stopped by a signal, saved at step" in outputs[0]
    else:
        assert all(codes), codes
