"""SIGTERM and Ctrl-C before the loop, and twice; train_test and hosts_test have the saving."""

import os
import signal
import sys
import time

import psutil
import pytest

from dgpt_jax import cli, hosts, signals, train
from tests import data
from tests.processes import ROOT, outputs_of, start


@pytest.fixture(autouse=True)
def handlers():
    """As in a terminal: what a shell starts in the background ignores SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: None)  # or it would end the tests
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Left(BaseException):
    """In place of os._exit, which a test would not survive."""


@pytest.fixture
def leaves(monkeypatch):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)


def test_a_second_ctrl_c_leaves_at_once(leaves):
    with signals.StopOnSignal() as stop:
        assert not stop.asked(0)
        signal.raise_signal(signal.SIGINT)
        assert stop.asked(1) and stop.exit_code == 130
        with pytest.raises(Left, match="130"):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # the scheduler's may come twice, and again
        assert stop.asked(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_leaves_at_once_what_saves_after_sigterm(leaves):
    with signals.StopOnSignal() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked(1) and stop.exit_code == signals.EXIT_PREEMPTED
        with pytest.raises(Left, match="130"):
            signal.raise_signal(signal.SIGINT)


def test_one_of_several_passes_ctrl_c_on_as_sigterm(leaves, monkeypatch):
    """To JAX, which tells all of them where to stop; a second one leaves at once here too."""
    passed, notices = [], []
    monkeypatch.setattr(hosts, "together", lambda: True)
    monkeypatch.setattr(os, "kill", lambda pid, number: passed.append((pid, number)))
    monkeypatch.setattr(
        signals.multihost_utils, "reached_preemption_sync_point", lambda step: step in notices
    )
    before = signal.getsignal(signal.SIGTERM)
    with signals.StopOnSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) is before  # JAX's
        signal.raise_signal(signal.SIGINT)
        assert passed == [(os.getpid(), signal.SIGTERM)] and not stop.asked(7)
        with pytest.raises(Left, match="130"):
            signal.raise_signal(signal.SIGINT)
        notices.append(8)
        assert stop.asked(8) and stop.exit_code == 130
    with signals.StopOnSignal() as stop:
        assert stop.asked(8) and stop.exit_code == signals.EXIT_PREEMPTED


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_before_the_loop_there_is_nothing_to_save(monkeypatch, tmp_path, number, code):
    """While it joins the others, opens data, restores: the exit code is the same."""
    monkeypatch.setattr(hosts, "start", lambda *_: signal.raise_signal(number))
    words = [f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["train", *words, "--config.data.path=x"])
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main)
    assert ended.value.code == code and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_worker_processes_too(tmp_path, number, code):
    """As Ctrl-C in a terminal and a scheduler send it: the training saves before it ends."""
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
    for one in (*workers, process):
        one.send_signal(number)
    (output,) = outputs_of([process], timeout=120)
    assert process.returncode == code and "Traceback" not in output, output[-2000:]
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert not any(one.is_running() for one in workers)
