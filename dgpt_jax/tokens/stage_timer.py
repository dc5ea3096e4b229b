"""Progress of a token build, and which stage it waits for."""

import math
import time
from collections.abc import Callable
from typing import Any

from dgpt_jax.monitoring import progress

SAY_EVERY = 10  # seconds


class StageTimer:
    """Progress of this process, and the time it waits for each stage after the first batch."""

    def __init__(self, total: int, example_bytes: float, say: Callable[[str], None]):
        self._total, self._bytes = total, example_bytes
        self._done = self._first = 0
        self._start = time.monotonic()
        self._progress = progress.Progress("examples", SAY_EVERY, say=say)
        self._waited = {"images": 0.0, "teacher": 0.0, "disk": 0.0}

    def timed(self, stage: str, function: Callable, *args) -> Any:
        """Returns function(*args); adds its time to a stage."""
        start = time.monotonic()
        result = function(*args)
        self._waited[stage] += time.monotonic() - start
        return result

    def done(self, examples: int):
        """Counts examples; logs the progress every SAY_EVERY seconds."""
        self._done += examples
        if not self._first:  # the time so far was the compile
            self._first, self._start = examples, time.monotonic()
            self._waited = dict.fromkeys(self._waited, 0.0)
        if self._done == self._total or self._progress.is_due():
            shares = self.summary()
            rate = shares.pop("images_per_second")
            remaining = (self._total - self._done) / rate if rate else math.inf
            self._progress.show(
                self._done,
                self._total,
                f"({self._done / self._total:.1%}), "
                f"{self._done * self._bytes / 1e9:.2f} GB, {rate:.0f} img/s, waiting for "
                f"{', '.join(f'{stage} {share:.0%}' for stage, share in shares.items())}, "
                f"eta {progress.duration(remaining)}",
            )
        if self._done == self._total:
            self._progress.close()

    def summary(self) -> dict[str, float]:
        """Returns images_per_second and the fraction of time waited for each stage."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        shares = {stage: seconds / elapsed for stage, seconds in self._waited.items()}
        return {"images_per_second": (self._done - self._first) / elapsed} | shares
