"""Lock of a work directory: exclusion, heartbeat, takeover of stale locks."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from dgpt_jax import train
from dgpt_jax.distributed import multihost, run_lock
from dgpt_jax.errors import UserError
from tests.support import classifying, data


@pytest.fixture(autouse=True)
def short_heartbeat(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def sleeper():
    """A running process of this host."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def write_lock(path, **changes):
    """Writes the lock of a running process on this host, with changes."""
    lock = {
        "owner": "other", "host": run_lock.socket.gethostname(), "pid": os.getpid(),
        "started": run_lock._process_identity(os.getpid()), "beats": 0,
    }  # fmt: skip
    lock |= changes
    (path / "new").write_text(json.dumps(lock))
    (path / "new").replace(path / run_lock.FILE)


def owner(path) -> str:
    return json.loads((path / run_lock.FILE).read_text())["owner"]


def test_a_lock_excludes_others_and_is_removed_at_the_end(tmp_path):
    workdir = tmp_path / "run"
    with run_lock.hold(workdir, print):
        first = json.loads((workdir / run_lock.FILE).read_text())
        assert first["pid"] == os.getpid()
        time.sleep(0.5)
        assert json.loads((workdir / run_lock.FILE).read_text())["beats"] > first["beats"]
        with (
            pytest.raises(UserError, match=f"{workdir}: process {os.getpid()} on .*--workdir"),
            run_lock.hold(workdir, print),
        ):
            pass
        assert owner(workdir) == first["owner"]
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    "stale",
    ["killed", "reused pid", "another host", "truncated", "not a lock", "copied directory"],
)
def test_a_stale_lock_is_taken_over(tmp_path, sleeper, stale):
    sleeper.kill()
    sleeper.wait()
    if stale == "killed":
        write_lock(tmp_path, pid=sleeper.pid)
    elif stale == "reused pid":
        write_lock(tmp_path, started="an earlier one")
    elif stale == "another host":
        write_lock(tmp_path, host="elsewhere")
    elif stale == "copied directory":
        write_lock(tmp_path, directory=str(tmp_path / "original"))
    else:
        text = '{"owner": "x", "ho' if stale == "truncated" else "[]"
        (tmp_path / run_lock.FILE).write_text(text)
    messages = []
    with run_lock.hold(tmp_path, messages.append):
        assert owner(tmp_path) != "other"
    if stale == "another host":
        assert "process" in messages[0] and "elsewhere" in messages[0]
    else:
        assert not messages


def test_a_lock_of_a_live_process_on_another_host_is_respected(tmp_path):
    ended = threading.Event()

    def beat():
        for beats in range(1000):
            write_lock(tmp_path, host="elsewhere", pid=7, beats=beats)
            if ended.wait(0.1):
                return

    write_lock(tmp_path, host="elsewhere", pid=7)
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with (
            pytest.raises(UserError, match="process 7 on elsewhere"),
            run_lock.hold(tmp_path, print),
        ):
            pass
    finally:
        ended.set()
        beating.join()
    assert owner(tmp_path) == "other"


def test_a_lock_that_another_host_removes_is_free(tmp_path):
    write_lock(tmp_path, host="elsewhere")
    threading.Timer(0.1, (tmp_path / run_lock.FILE).unlink).start()
    with run_lock.hold(tmp_path, print):
        assert owner(tmp_path) != "other"


def test_a_run_whose_lock_was_taken_over_exits(tmp_path, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(multihost, "abort", codes.append)
    with run_lock.hold(tmp_path, print):
        write_lock(tmp_path)
        time.sleep(0.5)
    assert codes == [1] and owner(tmp_path) == "other"
    assert f"error: another training has taken over {tmp_path}" in capsys.readouterr().err


def test_a_directory_that_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file/run cannot be written: Not a directory"),
        run_lock.hold(tmp_path / "file/run", print),
    ):
        pass


def test_a_second_training_is_refused(tmp_path):
    """Before it reads or writes anything in the work directory."""
    dataset = data.image_dataset(tmp_path, per_class=8)
    config = classifying.settings(dataset, evals={"heldout": ""}, checkpoint={"best": ""})
    lock = run_lock.hold(tmp_path / "run", print)
    with lock, pytest.raises(UserError, match=f"{tmp_path}/run: process {os.getpid()} "):
        train.train(config, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
