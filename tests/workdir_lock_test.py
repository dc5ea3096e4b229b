"""One training at a time in a work directory: whose lock it is, and when it is nobody's."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from dgpt_jax import hosts, train, workdir_lock
from dgpt_jax.schema import UserError
from tests import classifying, data


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(workdir_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(workdir_lock, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def sleeper():
    """A process of this host."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def lock_of(path, **changes):
    """Writes the lock of a living process on this host, with changes."""
    found = {
        "owner": "other", "host": workdir_lock.socket.gethostname(), "pid": os.getpid(),
        "started": workdir_lock._started(os.getpid()), "beats": 0,
    }  # fmt: skip
    found |= changes
    (path / "new").write_text(json.dumps(found))
    (path / "new").replace(path / workdir_lock.FILE)


def owner(path) -> str:
    return json.loads((path / workdir_lock.FILE).read_text())["owner"]


def test_the_lock_goes_with_its_program(tmp_path):
    workdir = tmp_path / "run"
    with workdir_lock.held(workdir, print):
        first = json.loads((workdir / workdir_lock.FILE).read_text())
        assert first["pid"] == os.getpid()
        time.sleep(0.5)
        assert json.loads((workdir / workdir_lock.FILE).read_text())["beats"] > first["beats"]
        with (
            pytest.raises(UserError, match=f"another training .* process {os.getpid()} on "),
            workdir_lock.held(workdir, print),
        ):
            pass
        assert owner(workdir) == first["owner"]
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    "left",
    [
        "killed",
        "another process of that number",
        "another host",
        "half a lock",
        "another file",
        "a copy of one that is in use",
    ],
)
def test_what_is_nobodys_is_taken_over(tmp_path, sleeper, left):
    sleeper.kill()
    sleeper.wait()
    if left == "killed":
        lock_of(tmp_path, pid=sleeper.pid)
    elif left == "another process of that number":
        lock_of(tmp_path, started="an earlier one")
    elif left == "another host":
        lock_of(tmp_path, host="elsewhere")
    elif left == "a copy of one that is in use":
        lock_of(tmp_path, directory=str(tmp_path / "original"))
    else:
        text = '{"owner": "x", "ho' if left == "half a lock" else "[]"
        (tmp_path / workdir_lock.FILE).write_text(text)
    said, began = [], time.monotonic()
    with workdir_lock.held(tmp_path, said.append):
        waited = time.monotonic() - began
        assert owner(tmp_path) != "other"
    if left == "another host":
        assert waited > 0.3 and "locked by process" in said[0]
    else:
        assert not said


def test_another_host_that_is_alive(tmp_path):
    ended = threading.Event()

    def beat():
        for beats in range(1000):
            lock_of(tmp_path, host="elsewhere", pid=7, beats=beats)
            if ended.wait(0.1):
                return

    lock_of(tmp_path, host="elsewhere", pid=7)
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with (
            pytest.raises(UserError, match="process 7 on elsewhere"),
            workdir_lock.held(tmp_path, print),
        ):
            pass
    finally:
        ended.set()
        beating.join()
    assert owner(tmp_path) == "other"


def test_another_host_that_ends(tmp_path):
    lock_of(tmp_path, host="elsewhere")
    threading.Timer(0.1, (tmp_path / workdir_lock.FILE).unlink).start()
    with workdir_lock.held(tmp_path, print):
        assert owner(tmp_path) != "other"


def test_a_lock_that_was_taken_over_ends_the_program(tmp_path, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(hosts, "end", codes.append)
    with workdir_lock.held(tmp_path, print):
        lock_of(tmp_path)
        time.sleep(0.5)
    assert codes == [1] and owner(tmp_path) == "other"
    assert "another training has taken over" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written: Not a directory"),
        workdir_lock.held(tmp_path / "file/run", print),
    ):
        pass


def test_a_second_training_is_refused(tmp_path):
    """Before it reads or writes anything of the run."""
    dataset = data.image_dataset(tmp_path, per_class=8)
    config = classifying.settings(dataset, evals={"heldout": ""}, checkpoint={"best": ""})
    held = workdir_lock.held(tmp_path / "run", print)
    with held, pytest.raises(UserError, match="another training works in .*run: process"):
        train.train(config, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
