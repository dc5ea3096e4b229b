"""How a run used its time, over all its sessions: what a session logs, and the sums of a log.

A session is one start of the training command. Its lines in metrics.jsonl have, besides their
metrics, KEYS: seconds that belong to no step, each logged once, so that the sums over all lines,
also those that a later session repeats, are the run's.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

# time: when the interval or evaluation ended, in seconds since 1970. start_time, startup_seconds:
# of a session, in its first line; the start-up ends with the first step, which is compiled.
# evaluation_seconds, checkpoint_seconds: in which no step ran, since the line before.
KEYS = ("time", "start_time", "startup_seconds", "evaluation_seconds", "checkpoint_seconds")
MAX_CLOCK_ERROR = 1.0  # seconds that a session may seem to begin before the last line


class Session:
    """Times of a running session: `started` at seconds since 1970. exclude: is given the seconds of
    what is not a step."""

    def __init__(self, started: float, exclude: Callable[[float], None]):
        self._values: dict[str, float] = {"start_time": started}
        self._exclude = exclude

    def first_step_ended(self):
        """Ends the start-up."""
        self._values["startup_seconds"] = time.time() - self._values["start_time"]

    @contextlib.contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Context whose time is that of an "evaluation" or a "checkpoint"."""
        start, key = time.monotonic(), f"{name}_seconds"
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self._values[key] = self._values.get(key, 0.0) + seconds
            self._exclude(seconds)

    def read(self) -> dict[str, float]:
        """Returns the values of KEYS for the next line, each once."""
        values, self._values = self._values, {}
        return values | {"time": time.time()}


@dataclass(frozen=True)
class TimeUse:
    """Sums in seconds. wall: from the first start to the last line. steps: of all logged intervals,
    waiting for data included. between: from the last line of a session to the
    start of the next; steps after that line, which a kill lost, are in it. sessions: of which there
    are lines."""

    wall: float
    startup: float
    steps: float
    evaluations: float
    checkpoints: float
    between: float
    sessions: int


class Reader:
    """Sums the times of the lines of a log, in the order of the file."""

    def __init__(self):
        self._sums = dict.fromkeys(("startup", "steps", "evaluation", "checkpoint"), 0.0)
        self._first = self._last = math.nan
        self._between, self._sessions, self._complete = 0.0, 0, True

    def take(self, values: dict[str, float]):
        """Adds a line, and removes KEYS from it."""
        times = {key: values.pop(key) for key in KEYS if key in values}
        if (started := times.get("start_time")) is not None:
            self._begin(started)
        if not self._sessions or "time" not in times or not _all_finite(times, values):
            self._complete = False  # of a version that did not log them, or damaged
            return
        self._last = times["time"]
        self._sums["steps"] += values.get("step_seconds", 0.0)
        for name in ("startup", "evaluation", "checkpoint"):
            self._sums[name] += times.get(f"{name}_seconds", 0.0)

    def _begin(self, started: float):
        if self._sessions:
            gap = started - self._last
            self._complete &= gap >= -MAX_CLOCK_ERROR
            self._between += max(gap, 0.0)
        else:
            self._first = started
        self._sessions += 1

    def result(self) -> TimeUse | None:
        """Returns the sums; None if a line lacks times, or clocks of sessions contradict."""
        sums, wall = self._sums, self._last - self._first
        known = sum(sums.values()) + self._between
        if not self._complete or not self._sessions or not known <= wall + MAX_CLOCK_ERROR:
            return None
        return TimeUse(
            wall=wall,
            startup=sums["startup"],
            steps=sums["steps"],
            evaluations=sums["evaluation"],
            checkpoints=sums["checkpoint"],
            between=self._between,
            sessions=self._sessions,
        )


def _all_finite(times: Mapping[str, float], values: Mapping[str, float]) -> bool:
    numbers = (*times.values(), values.get("step_seconds", 0.0), values.get("data_wait", 0.0))
    return all(map(math.isfinite, numbers))
