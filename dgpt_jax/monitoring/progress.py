"""What a command says while it works: how far it is, how fast, how long still."""

import math
import sys
import time

import jax

# Counts of pipeline.Examples, in the files but not on the progress line.
COUNTERS = ("bad_records", "fetched_bytes", "fetch_wait_seconds")
MOST_WAIT = 0.1  # of the time, for data, before there is a warning


class Clock:
    """Throughput and time left, without the compile: it starts when the first step is done."""

    def __init__(self, start_step: int, total: int, batch_size: int):
        self.total, self.batch_size = total, batch_size
        self._step, self._waited = start_step, 0.0
        self._time = time.monotonic()
        self._rate = None

    def restart(self, step: int):
        """Forgets what has passed: after the compile, an evaluation, a checkpoint."""
        self._step, self._time, self._waited = step, time.monotonic(), 0.0

    def waited(self, seconds: float):
        """Adds time that the loop stood waiting for data."""
        self._waited += seconds

    def read(self, step: int) -> dict[str, float]:
        """images/s, share of time waiting for data, and seconds left, since the last reading.

        Empty where no step has been done since.
        """
        if step == self._step:
            return {}
        elapsed = max(time.monotonic() - self._time, 1e-9)
        rate = (step - self._step) / elapsed
        self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        values = {
            "images_per_second": rate * self.batch_size,
            "data_wait": min(self._waited / elapsed, 1.0),
            "eta_seconds": (self.total - step) / self._rate,
        }
        self.restart(step)
        return values


def duration(seconds: float) -> str:
    """3725 as 1h02m."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.1f}d"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class Progress:
    """One line on stderr: a live bar in a terminal, plain lines elsewhere. On process 0."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._active = jax.process_index() == 0
        self._live = self._active and self._stream.isatty()
        self._waits = 0  # intervals in a row in which the loop waited too long for data

    def show(self, step: int, total: int, values: dict[str, float]):
        if not self._active:
            return
        known = ("eta_seconds", "images_per_second", "data_wait", "learning_rate", *COUNTERS)
        losses = " ".join(f"{n} {v:.4f}" for n, v in values.items() if n not in known)
        line = (
            f"step {step}/{total} eta {duration(values.get('eta_seconds', math.inf))} "
            f"{values.get('images_per_second', 0):.0f} img/s wait {values.get('data_wait', 0):.0%} "
            f"{losses} lr {values['learning_rate']:.2e}"
        )
        if self._live:
            filled = 20 * step // total
            bar = "█" * filled + "·" * (20 - filled)
            self._stream.write(f"\r\x1b[K{bar} {line}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._warn(values.get("data_wait", 0))

    def _warn(self, data_wait: float):
        """Says so where the input does not keep up; one interval may be an accident."""
        self._waits = self._waits + 1 if data_wait > MOST_WAIT else 0
        if self._waits == 2:
            self.say(
                f"warning: {data_wait:.0%} of the time the devices wait for data: "
                f"tools/bench_input.py measures what the input gives here; config.data.threads and "
                f"config.data.workers are what reads"
            )

    def say(self, text: str):
        """A line of its own, above the bar."""
        if self._active:
            self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
            self._stream.flush()

    def close(self):
        if self._live:
            self._stream.write("\n")
