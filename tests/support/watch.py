"""Resources of a process and its children, sampled while it runs. Linux only: reads /proc."""

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from tests.support.processes import outputs_of, start

# Runs code in a process that measures its own resources.
MEASURED = """
import json, sys
from tests.support.watch import Usage
code, sys.argv = sys.argv[1], sys.argv[1:]
with Usage() as usage:
    try:
        exec(code)
    except SystemExit as e:
        assert not e.code, e.code
print(json.dumps({"peak": usage.peak, "files": usage.files, "seconds": usage.seconds}))
"""
SCRIPT = """
import os, runpy
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@dataclass
class Watch:
    """A context that samples a process tree twice per second in a thread.

    Samples: (seconds, resident bytes, open files, threads), summed over its processes. Kills the
    process above `limit` bytes, before the machine runs out of memory.
    """

    pid: int
    limit: float = 20e9
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        self._stop, self._start = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.wait(0.5):
            sums = np.zeros(3, int)
            try:
                root = psutil.Process(self.pid)
                for process in (root, *root.children(recursive=True)):
                    sums += (process.memory_info().rss, process.num_fds(), process.num_threads())
            except psutil.Error:  # it just exited
                continue
            self.samples.append((time.monotonic() - self._start, *map(int, sums)))
            if sums[0] > self.limit:
                root.kill()

    def peak(self) -> dict[str, int]:
        """Maximum of each resource."""
        memory, files, threads = (max(column) for column in list(zip(*self.samples))[1:])
        return {"memory": memory, "files": files, "threads": threads}

    def growth(self) -> dict[str, float]:
        """Growth of each resource from the middle to the last third of the samples, by medians."""
        table = np.array(self.samples, float)
        third = len(table) // 3
        middle, last = table[third : 2 * third], table[2 * third :]
        change = np.median(last, axis=0) - np.median(middle, axis=0)
        return dict(zip(("memory", "files", "threads"), change[1:].tolist()))


def memory(name: str = "VmHWM") -> int:
    """VmRSS (resident) or VmHWM (its peak) of this process, in bytes.

    Not ru_maxrss, which starts with the value of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak():
    """Resets VmHWM of this process to its current VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


class Usage:
    """A context that measures this process: peak (bytes of memory), files (maximum open at a time)
    and seconds."""

    def __enter__(self) -> "Usage":
        self.files, self._start, self._stop = 0, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.peak, self.seconds = memory(), time.monotonic() - self._start

    def _run(self):
        while not self._stop.wait(0.01):
            self.files = max(self.files, len(os.listdir("/proc/self/fd")))


def usage_of(code: str, *words, devices: int = 1) -> dict[str, float]:
    """Usage of a new process that executes `code` (SCRIPT: a file and its arguments): peak (bytes),
    maximum of open files, seconds."""
    process = start(["-c", MEASURED, code, *words], devices=devices)
    (output,) = outputs_of([process])
    assert process.returncode == 0, output[-2000:]
    return json.loads(output.splitlines()[-1])
