"""Runs dependent commands in parallel, each on its share of the cores, with live progress.

The output of a command goes to LOGS/NAME.txt, below its command line; what has succeeded is not run
again. Its progress is read from the lines "UNIT done/total TEXT" that `monitoring.progress` writes.
If this process is killed, its commands get SIGTERM (early_signals); a new one waits until they have
ended.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dgpt_jax.distributed import early_signals
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import progress

MAX_PARALLEL = 4
MAX_COLUMNS = 99  # of a line
LINE_SECONDS = 8.0  # between two lines about a command where stderr is not a terminal
BAR_SECONDS = 0.5
ORPHAN_SECONDS = 600.0  # in which the command of a killed process saves its work
_PROGRESS = re.compile(r"^\w+ (\d+)/(\d+) (.*)$", re.MULTILINE)

_DETAILS = re.compile(r" (wait|grad_norm|skipped|lr) \S+")  # of a training


@dataclass(frozen=True)
class Job:
    """A command `python WORDS` that creates `output`, once the jobs `after` are done.

    replace: removes an old output first, for commands that overwrite nothing.
    """

    name: str
    about: str
    output: Path
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    replace: bool = False

    @property
    def line(self) -> str:
        return shlex.join(["python", *self.words])

    def is_done(self, logs: Path) -> bool:
        """True if the same command has succeeded before and its output still exists."""
        log = logs / f"{self.name}.txt"
        exists = self.output.exists() and log.exists()
        return exists and log.read_text(errors="replace").startswith(f"{self.line}\n")


class Running:
    """A job that was started, in a process group of its own: Ctrl-C in a terminal reaches it only
    through `stop`, once."""

    def __init__(self, job: Job, logs: Path, cores: Sequence[int]):
        self.job, self.cores, self.started = job, cores, time.monotonic()
        self.log, self._done_log = logs / f"{job.name}.running.txt", logs / f"{job.name}.txt"
        with self.log.open("a") as log:
            _lock(log, self.log)  # inherited by the command, as its output
            self._done_log.unlink(missing_ok=True)
            if job.replace:
                shutil.rmtree(job.output, ignore_errors=True)
            log.truncate(0)
            log.write(f"{job.line}\n")
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, *job.words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, process_group=0,
                env=os.environ | {early_signals.PARENT: str(os.getpid())},
            )  # fmt: skip
        if cores:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(self.process.pid, cores)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def status(self) -> tuple[int, int, str]:
        """(done, total, text) of the last progress line of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            lines = _PROGRESS.findall(file.read().decode(errors="replace"))
        if not lines:
            return 0, 1, f"running, {progress.duration(self.seconds)}"
        done, total, text = lines[-1]
        return int(done), int(total), _DETAILS.sub("", text)

    def stop(self):
        """Asks the command to save and exit."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def finish(self):
        """Renames the log of an ended command. Raises UserError if it has failed."""
        if self.process.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
            raise UserError(f"{self.job.line}\nfailed, see {self.log}:\n{tail}")
        self.log.rename(self._done_log)


def _lock(log: TextIO, path: Path):
    """Locks an open log. Waits for the command of an earlier process, which still writes it. Raises
    UserError if that takes longer than ORPHAN_SECONDS."""
    start, waits = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waits:
                progress.Progress().say(f"waiting until an earlier command has saved: {path}")
                waits = True
            if time.monotonic() - start > ORPHAN_SECONDS:
                raise UserError(
                    f"another process has been writing {path} for {ORPHAN_SECONDS:.0f} s: wait "
                    f"until it has ended"
                ) from None
        time.sleep(0.1)


class Display:
    """One bar per running job in a terminal; elsewhere a line about each every few seconds."""

    def __init__(self):
        self._live = sys.stderr.isatty()
        self._bars: dict[Running, progress.Progress] = {}
        self._shown: dict[Running, float] = {}

    def say(self, text: str):
        progress.Progress().say(f"[{time.strftime('%H:%M:%S')}] {text}"[:MAX_COLUMNS])

    def update(self, running: Sequence[Running]):
        """Shows the progress of the running jobs, and removes the bars of the others."""
        for job in [job for job in self._bars if job not in running]:
            self._bars.pop(job).close()
        for job in running:
            now, interval = time.monotonic(), BAR_SECONDS if self._live else LINE_SECONDS
            if now - self._shown.setdefault(job, job.started) < interval:
                continue
            self._shown[job] = now
            done, total, text = job.status()
            if self._live:
                if job not in self._bars:
                    used = {bar.position for bar in self._bars.values()}
                    position = min(set(range(MAX_PARALLEL)) - used)
                    self._bars[job] = progress.Progress(job.job.name, position=position)
                self._bars[job].show(done, total, text)
            else:
                self.say(f"{job.job.name}: {done}/{total} {text}")

    def close(self):
        self.update([])


def core_groups() -> list[list[int]]:
    """The cores of this process in up to MAX_PARALLEL groups; empty groups where processes cannot
    be bound to cores."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(min(MAX_PARALLEL, os.cpu_count() or 1))]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::MAX_PARALLEL] for i in range(min(MAX_PARALLEL, len(cores)))]


def pending(jobs: Sequence[Job], logs: Path) -> list[Job]:
    """The jobs that are not done, or follow one that is not; `jobs` are in order."""
    names, result = set(), []
    for job in jobs:
        if not job.is_done(logs) or names.intersection(job.after):
            names.add(job.name)
            result.append(job)
    return result


def run(jobs: Sequence[Job], logs: Path, groups: Sequence[Sequence[int]] | None = None):
    """Runs the pending jobs, the first ready one on each free group of cores.

    On Ctrl-C, SIGTERM (preemption.raise_on_sigterm) or a failure the running commands save and exit
    before this raises. Raises UserError.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, display = pending(jobs, logs), Display()
    total, running = len(waiting), []
    free = list(core_groups() if groups is None else groups)
    with _stopped_at_the_end(running, display):
        while waiting or running:
            blocked = {job.name for job in waiting} | {r.job.name for r in running}
            for job in [job for job in waiting if not blocked.intersection(job.after)]:
                if free:
                    waiting.remove(job)
                    display.say(f"{job.name}: {job.about}")
                    running.append(Running(job, logs, free.pop(0)))
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.cores)
                display.update(running)
                job.finish()
                left = total - len(waiting) - len(running)
                taken = progress.duration(job.seconds)
                display.say(f"{job.job.name}: done in {taken} ({left} of {total})")
            display.update(running)
            time.sleep(0.1)


@contextlib.contextmanager
def _stopped_at_the_end(running: Sequence[Running], display: Display) -> Iterator[None]:
    """Context that ends with all commands ended; a second Ctrl-C kills them."""
    try:
        yield
    except BaseException:
        display.close()
        for job in running:
            job.stop()
        if running:
            names = ", ".join(job.job.name for job in running)
            display.say(f"stopping: {names} save their work")
        try:
            for job in running:
                job.process.wait()
        except KeyboardInterrupt:
            for job in running:
                job.process.kill()
        raise
    finally:
        display.close()
