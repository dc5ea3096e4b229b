"""One training at a time in a work directory, on a local disk, a network file system or gs://.

Process 0 writes `.lock.json` (host, pid, a number that a heartbeat counts up) and removes it at the
end. The lock of a process of this host that is gone is taken over at once; that of another host
when its heartbeat has stood still for three beats, as seen from here: clocks are not compared.
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

from dgpt_jax import hosts
from dgpt_jax.schema import UserError

FILE = ".lock.json"
BEAT_SECONDS = 30.0
MISSED = 3  # beats after which a lock is nobody's
SETTLE_SECONDS = 0.3  # in which another process that has found no lock either writes its own


@contextlib.contextmanager
def held(workdir, say: Callable[[str], None]) -> Iterator[None]:
    """A context in which this program alone trains in `workdir`; the processes enter it together.

    Raises UserError where another program trains there, or nothing can be written. A program whose
    lock was taken over, because it stood still for long, ends itself.
    """
    if jax.process_index():
        hosts.barrier("work directory locked")
        yield
        return
    lock = _Lock(epath.Path(workdir))
    lock.acquire(say)
    ended = threading.Event()
    beating = threading.Thread(target=lock.beat, args=(ended,), daemon=True)
    beating.start()
    try:
        hosts.barrier("work directory locked")
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
            "started": _started(os.getpid()), "beats": 0, "directory": _place(workdir),
        }  # fmt: skip

    def acquire(self, say: Callable[[str], None]):
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            while (found := self._read()) is None or self._is_left(found, say):
                self._write()
                time.sleep(SETTLE_SECONDS)
                if self._is_mine():
                    return
        except OSError as e:
            raise UserError(f"{self._workdir} cannot be written: {e.strerror or e}") from e
        raise UserError(
            f"another training works in {self._workdir}: process {found['pid']} on "
            f"{found['host']}. Wait for its end, or choose another --workdir"
        )

    def beat(self, ended: threading.Event):
        """Counts up until the event, or until the lock is another's: then it ends the program."""
        while not ended.wait(BEAT_SECONDS):
            try:
                if not self._is_mine():
                    print(
                        f"error: another training has taken over {self._workdir}: this one stood "
                        f"still for more than {MISSED * BEAT_SECONDS:.0f} s",
                        file=sys.stderr,
                    )
                    hosts.end(1)
                    return
                self._mine["beats"] += 1
                self._write()
            except OSError:  # a full disk or a lost connection: the next beat may come through
                continue

    def release(self):
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._path.unlink()

    def _is_left(self, found: dict, say: Callable[[str], None]) -> bool:
        """Whether nobody is behind a lock that was found; waits for its heartbeat if need be."""
        if found["host"] == self._mine["host"]:
            if found.get("directory", self._mine["directory"]) != self._mine["directory"]:
                return True  # it was copied with the directory of another training
            return _started(found["pid"]) != found["started"]
        silence = MISSED * BEAT_SECONDS
        say(
            f"{self._workdir} was locked by process {found['pid']} on {found['host']}: waiting up "
            f"to {silence:.0f} s for a sign of it"
        )
        began = time.monotonic()
        while time.monotonic() - began < silence:
            time.sleep(BEAT_SECONDS / 10)
            if self._read() != found:
                return self._read() is None
        return True

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and found["owner"] == self._mine["owner"]

    def _read(self) -> dict | None:
        """The lock that is there. One that cannot be read, of whatever wrote it, is none."""
        try:
            found = json.loads(self._path.read_text())
            needed = self._mine.keys() - {"directory"}  # which earlier versions did not write
            return found if needed <= found.keys() else None
        except (FileNotFoundError, ValueError, AttributeError):
            return None

    def _write(self):
        text = json.dumps(self._mine)
        if "://" in os.fspath(self._path):  # an object appears whole
            self._path.write_text(text)
            return
        half = self._path.with_name(f"{FILE}.{self._mine['owner']}")
        half.write_text(text)
        half.replace(self._path)


def _place(workdir: epath.Path) -> str:
    """The path of a directory by which one host knows it."""
    path = os.fspath(workdir)
    return path if "://" in path else os.path.realpath(path)


def _started(pid: int) -> str:
    """What tells a process from a later one of the same number: "" where it is gone."""
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
