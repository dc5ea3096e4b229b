"""Progress of a command on stderr: throughput, time left, time spent waiting for data."""

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

import psutil
from tqdm import tqdm

from dgpt_jax import invocation
from dgpt_jax.distributed import multihost
from dgpt_jax.monitoring import time_use

# Counters of dataset.ExampleDataset: logged, not on the progress line.
COUNTERS = ("bad_records", "fetched_bytes", "fetch_wait_seconds")
MAX_WAIT = 0.1  # share of time spent waiting for data above which to warn


class Clock:
    """Throughput and time left. Call `restart` after the first step, which includes compilation,
    and `exclude` after what is not a step."""

    def __init__(self, start_step: int, total: int, batch_size: int):
        self.total, self.batch_size = total, batch_size
        self._rate = None
        self.restart(start_step)

    def restart(self, step: int):
        """Starts a new interval: after the compilation, or a change of what is measured."""
        self._step, self._time, self._waited = step, time.monotonic(), 0.0

    def exclude(self, seconds: float):
        """Takes the last `seconds` out of the interval: an evaluation or a checkpoint."""
        self._time += seconds

    def add_wait(self, seconds: float):
        """Adds time in which the training loop waited for data."""
        self._waited += seconds

    def read(self, step: int) -> dict[str, float]:
        """Returns images/s, share of time waiting for data, seconds left and those of the interval,
        and starts a new one. Empty if there was no step since the last reading."""
        if step == self._step:
            return {}
        elapsed = max(time.monotonic() - self._time, 1e-9)
        rate = (step - self._step) / elapsed
        self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        values = {
            "images_per_second": rate * self.batch_size,
            "data_wait": min(self._waited / elapsed, 1.0),
            "eta_seconds": (self.total - step) / self._rate,
            "step_seconds": elapsed,
        }
        self.restart(step)
        return values


def seconds_since_start() -> float:
    """Returns the age of this process in seconds, imports included."""
    return time.time() - process_start()


def process_start() -> float:
    """Returns when this process was created, in seconds since 1970."""
    return psutil.Process().create_time()


def duration(seconds: float) -> str:
    """Formats seconds: 3725 as "1h02m"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.1f}d"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class _Bar(tqdm):
    monitor_interval = 0  # no thread: each update is drawn at once


class Progress:
    """Reports on stderr, in process 0 only: a live bar in a terminal, plain lines elsewhere."""

    def __init__(
        self,
        unit: str = "step",
        interval: float = 0.0,
        *,
        say: Callable[[str], None] | None = None,
        stream: TextIO | None = None,
        position: int | None = None,
    ):
        """unit: prefix of the counts. interval: seconds between updates, for `is_due`.
        say: replaces the stream for plain lines of `show`. position: line of the bar, from 0, if
        there are several at once; such a bar vanishes at `close`."""
        self._unit, self._interval, self.position = unit, interval, position
        self._stream, self._show_line = stream or sys.stderr, say or self.say
        self._active = multihost.is_main_process()
        self._live = self._active and self._stream.isatty()
        self._bar: _Bar | None = None
        self._shown = time.monotonic()

    def is_due(self) -> bool:
        """True if the last update is at least one interval ago."""
        return time.monotonic() - self._shown >= self._interval

    def show(self, done: int, total: int, text: str):
        """Shows "UNIT done/total text"."""
        self._shown = time.monotonic()
        line = f"{self._unit} {done}/{total} {text}"
        if not self._active:
            return
        if not self._live:
            self._show_line(line)
        elif self._bar is None:
            bar = "{bar}" if self.position is None else "{bar:16}"  # several are aligned
            self._bar = _Bar(
                total=total, initial=done, desc=line, file=self._stream, dynamic_ncols=True,
                bar_format=f"{{percentage:3.0f}}%|{bar}| {{desc}}", position=self.position,
                leave=self.position is None,
            )  # fmt: skip
        else:
            self._bar.total, self._bar.n, self._bar.desc = total, done, line
            self._bar.refresh()

    def say(self, text: str):
        """Prints a line, above the bar if there is one, also that of another Progress."""
        if self._active:
            _Bar.write(text, file=self._stream, nolock=True)
            self._stream.flush()

    def close(self):
        """Ends the line of the bar; the last update stays visible."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TrainingProgress(Progress):
    """Progress of a training run, with a warning if the input pipeline is too slow."""

    _slow_intervals = 0  # in a row

    def show_step(self, step: int, total: int, values: dict[str, float]):
        """Shows the metrics of the interval that ended with `step`."""
        formatted = (
            "eta_seconds", "images_per_second", "data_wait", "step_seconds", "learning_rate",
            *COUNTERS, *time_use.KEYS,
        )  # fmt: skip
        losses = " ".join(f"{n} {v:.4f}" for n, v in values.items() if n not in formatted)
        data_wait = values.get("data_wait", 0)
        self.show(
            step,
            total,
            f"eta {duration(values.get('eta_seconds', math.inf))} "
            f"{values.get('images_per_second', 0):.0f} img/s wait {data_wait:.0%} {losses} "
            f"lr {values['learning_rate']:.2e}",
        )
        self._slow_intervals = self._slow_intervals + 1 if data_wait > MAX_WAIT else 0
        if self._slow_intervals == 2:  # a single one may be an accident
            benchmark = "; python -m tools.benchmarks.bench_input measures the input"
            self.say(
                f"warning: {data_wait:.0%} of the time is spent waiting for data: "
                f"config.data.threads and config.data.workers set its parallelism"
                f"{benchmark if invocation.IN_CLONE else ''}"
            )
