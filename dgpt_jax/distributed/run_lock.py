"""Lock file of a work directory (local, network file system or gs://): one training at a time.

Process 0 writes `.lock.json` (host, pid, a heartbeat counter) and removes it at the end. A stale
lock of this host (its process has exited) is taken over at once; one of another host after its
counter has not changed for three heartbeats, by this host's clock.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from etils import epath

from dgpt_jax.distributed import multihost
from dgpt_jax.errors import UserError

FILE = ".lock.json"
BEAT_SECONDS = 30.0
MISSED = 3  # heartbeats after which a lock is stale
SETTLE_SECONDS = 0.3  # for another process that saw no lock either to write its own


@contextlib.contextmanager
def hold(workdir: epath.Path | Path | str, say: Callable[[str], None]) -> Iterator[None]:
    """Context that holds the lock of `workdir`; all processes of a run enter it together.

    A run whose lock was taken over, after it was suspended for long, exits. Raises UserError if
    another run holds the lock or the directory is not writable.
    """
    if jax.process_index():
        multihost.barrier("work directory locked")
        yield
        return
    lock = _Lock(epath.Path(workdir))
    lock.acquire(say)
    ended = threading.Event()
    beating = threading.Thread(target=lock.beat, args=(ended,), daemon=True)
    beating.start()
    try:
        multihost.barrier("work directory locked")
        yield
    finally:
        ended.set()
        beating.join()
        lock.release()


class _Lock:
    def __init__(self, workdir: epath.Path):
        self._workdir, self._path = workdir, workdir / FILE
        self._mine = {
            "owner": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid(),
            "started": _process_identity(os.getpid()), "beats": 0, "directory": _canonical(workdir),
        }  # fmt: skip

    def acquire(self, say: Callable[[str], None]):
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            while (lock := self._read()) is None or self._is_stale(lock, say):
                self._write()
                time.sleep(SETTLE_SECONDS)
                if self._is_mine():
                    return
        except OSError as e:
            raise UserError(f"{self._workdir} cannot be written: {e.strerror or e}") from e
        raise UserError(
            f"another training runs in {self._workdir}: process {lock['pid']} on "
            f"{lock['host']}. Wait until it ends, or choose another --workdir"
        )

    def beat(self, ended: threading.Event):
        """Counts up until the event is set; exits the program if another one has the lock."""
        while not ended.wait(BEAT_SECONDS):
            try:
                if not self._is_mine():
                    print(
                        f"error: another training has taken over {self._workdir}: this one was "
                        f"suspended for more than {MISSED * BEAT_SECONDS:.0f} s",
                        file=sys.stderr,
                    )
                    multihost.abort(1)
                    return
                self._mine["beats"] += 1
                self._write()
            except OSError:  # a full disk or a lost connection: the next heartbeat may succeed
                continue

    def release(self):
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._path.unlink()

    def _is_stale(self, lock: dict, say: Callable[[str], None]) -> bool:
        """Returns whether the lock has no living owner; of another host, waits for a heartbeat."""
        if lock["host"] == self._mine["host"]:
            if lock.get("directory", self._mine["directory"]) != self._mine["directory"]:
                return True  # copied with the work directory of another training
            return _process_identity(lock["pid"]) != lock["started"]
        silence = MISSED * BEAT_SECONDS
        say(
            f"{self._workdir} is locked by process {lock['pid']} on {lock['host']}: waiting up to "
            f"{silence:.0f} s for its heartbeat"
        )
        deadline = time.monotonic() + silence
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 10)
            if self._read() != lock:
                return self._read() is None
        return True

    def _is_mine(self) -> bool:
        lock = self._read()
        return lock is not None and lock["owner"] == self._mine["owner"]

    def _read(self) -> dict | None:
        """Returns the lock file's content; None if it is absent or not a lock."""
        try:
            lock = json.loads(self._path.read_text())
            required = self._mine.keys() - {"directory"}  # which earlier versions did not write
            return lock if required <= lock.keys() else None
        except (FileNotFoundError, ValueError, AttributeError):
            return None

    def _write(self):
        text = json.dumps(self._mine)
        if "://" in os.fspath(self._path):  # object stores write atomically
            self._path.write_text(text)
            return
        temporary = self._path.with_name(f"{FILE}.{self._mine['owner']}")
        temporary.write_text(text)
        temporary.replace(self._path)


def _canonical(workdir: epath.Path) -> str:
    """Returns a path that identifies the directory on this host."""
    path = os.fspath(workdir)
    return path if "://" in path else os.path.realpath(path)


def _process_identity(pid: int) -> str:
    """Returns boot and start time, which tell a process from a later one with its pid; "" if it has
    exited."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else f"{boot} {fields[19]}"
    except (FileNotFoundError, ProcessLookupError):
        pass
    if sys.platform == "linux":
        return ""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, 0)
        return "alive"
    return ""
