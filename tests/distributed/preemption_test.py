"""SIGTERM and Ctrl-C before the loop, and repeated; loop_test and multihost_test test saving."""

import os
import signal
import sys
import time

import psutil
import pytest

from dgpt_jax import cli, train
from dgpt_jax.distributed import multihost, preemption
from tests.support import data
from tests.support.paths import ROOT
from tests.support.processes import outputs_of, start


@pytest.fixture(autouse=True)
def handlers():
    """Handlers as in a terminal: a background process of a shell ignores SIGINT."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the default would end the tests
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


class Exited(BaseException):
    """Raised by the fake os._exit."""


@pytest.fixture
def fake_exit(monkeypatch):
    def raise_exited(code):
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", raise_exited)


def test_a_second_ctrl_c_exits_at_once(fake_exit):
    with preemption.StopOnSignal() as stop:
        assert not stop.should_stop(0)
        signal.raise_signal(signal.SIGINT)
        assert stop.should_stop(1) and stop.exit_code == 130
        with pytest.raises(Exited, match="130"):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # schedulers may send it repeatedly
        assert stop.should_stop(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_exits_at_once_while_saving_after_sigterm(fake_exit):
    with preemption.StopOnSignal() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert stop.should_stop(1) and stop.exit_code == preemption.EXIT_PREEMPTED
        with pytest.raises(Exited, match="130"):
            signal.raise_signal(signal.SIGINT)


def test_multi_process_ctrl_c_becomes_sigterm(fake_exit, monkeypatch):
    """JAX then stops all processes at one step; a second Ctrl-C exits at once here too."""
    sent, sync_points = [], []
    monkeypatch.setattr(multihost, "is_multiprocess", lambda: True)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(
        preemption.multihost_utils,
        "reached_preemption_sync_point",
        lambda step: step in sync_points,
    )
    handler = signal.getsignal(signal.SIGTERM)
    with preemption.StopOnSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) is handler  # JAX's
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGTERM)] and not stop.should_stop(7)
        with pytest.raises(Exited, match="130"):
            signal.raise_signal(signal.SIGINT)
        sync_points.append(8)
        assert stop.should_stop(8) and stop.exit_code == 130
    with preemption.StopOnSignal() as stop:
        assert stop.should_stop(8) and stop.exit_code == preemption.EXIT_PREEMPTED


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_loop_has_the_same_exit_code(monkeypatch, tmp_path, number, code):
    """While joining other processes, opening data or restoring."""
    monkeypatch.setattr(multihost, "start", lambda *_: signal.raise_signal(number))
    words = [f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["train", *words, "--config.data.path=x"])
    with pytest.raises(SystemExit) as error:
        cli.run(train.main)
    assert error.value.code == code and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_that_worker_processes_get_too(tmp_path, number, code):
    """Ctrl-C in a terminal and schedulers signal all of them: the training still saves."""
    dataset = data.image_dataset(tmp_path, per_class=8)
    workdir = tmp_path / "run"
    words = [
        "-m", "dgpt_jax.train", "--config=configs/quickstart.py:pixels", f"--workdir={workdir}",
        *(f"--config.model.{name}={value}" for name, value in data.TINY.items()),
        f"--config.data.path={dataset}", "--config.evals.heldout=", "--config.data.workers=2",
        "--config.batch_size=8", "--config.total=100000 steps", "--config.log_every=1",
    ]  # fmt: skip
    process = start(words)
    log = workdir / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.1)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True)
        if "resource_tracker" not in " ".join(child.cmdline())
    ]  # fmt: skip
    assert len(workers) == 2
    for target in (*workers, process):
        target.send_signal(number)
    (output,) = outputs_of([process], timeout=120)
    assert process.returncode == code and "Traceback" not in output, output[-2000:]
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert not any(worker.is_running() for worker in workers)
