"""Resources of a process and its children, sampled while it runs."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import psutil


@dataclass
class Watch:
    """A context that samples a process tree twice a second, in a thread.

    Samples: (seconds, resident bytes, open files, threads) of all its processes together. It is
    killed where it holds more than `limit` bytes, before the machine runs out of memory.
    """

    pid: int
    limit: float = 20e9
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        self._ended, self._began = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _run(self):
        while not self._ended.wait(0.5):
            sums = np.zeros(3, int)
            try:
                root = psutil.Process(self.pid)
                for process in (root, *root.children(recursive=True)):
                    sums += (process.memory_info().rss, process.num_fds(), process.num_threads())
            except psutil.Error:  # it has just ended
                continue
            self.samples.append((time.monotonic() - self._began, *map(int, sums)))
            if sums[0] > self.limit:
                root.kill()

    def peak(self) -> dict[str, int]:
        """The largest value of each resource."""
        memory, files, threads = (max(column) for column in list(zip(*self.samples))[1:])
        return {"memory": memory, "files": files, "threads": threads}

    def growth(self) -> dict[str, float]:
        """How much each resource grew from the middle third of the time to the last: differences of
        medians."""
        table = np.array(self.samples, float)
        third = len(table) // 3
        middle, last = table[third : 2 * third], table[2 * third :]
        change = np.median(last, axis=0) - np.median(middle, axis=0)
        return dict(zip(("memory", "files", "threads"), change[1:].tolist()))
