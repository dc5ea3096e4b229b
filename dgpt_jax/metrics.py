"""Metrics: CLU collections on the device; JSONL, TensorBoard and a progress line; traces."""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from clu import metrics as clu_metrics
from clu import profiler
from etils import epath

from dgpt_jax import boards, run_log
from dgpt_jax.mirror import Mirror
from dgpt_jax.schema import UserError

Metrics = clu_metrics.Collection
# Counts of pipeline.Examples, in the files but not on the progress line.
COUNTERS = ("bad_records", "fetched_bytes", "fetch_wait_seconds")
MOST_WAIT = 0.1  # of the time, for data, before there is a warning


def averages(names: Iterable[str]) -> type[Metrics]:
    """A CLU collection that averages each of the named outputs of a step."""
    return Metrics.create(**{n: clu_metrics.Average.from_output(n) for n in names})


class Writer:
    """Scalars to `metrics.jsonl` (always), TensorBoard in the work directory, and W&B where a
    project is named, on process 0. Pictures are drawn by a thread."""

    def __init__(self, workdir, project: str = ""):
        self._active = jax.process_index() == 0
        self._boards: list[boards.Board] = []
        if self._active:
            self._mirror = Mirror(workdir, (run_log.FILE, boards.WANDB_ID))
            near = self._mirror.near
            # Unbuffered: closing is not to write, and fail, once more on a full disk.
            self._file = (near / run_log.FILE).open("ab", buffering=0)
            self._boards.append(boards.TensorBoard(near / "tensorboard"))
            if project:
                name = epath.Path(workdir).name
                self._boards.append(boards.Wandb(project, name, near))
            self._draughtsman = ThreadPoolExecutor(1)

    def scalars(self, step: int, values: dict[str, float]):
        """Raises UserError where the disk is full."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN; a reader should not need a special parser to find one.
        shown = {n: v if math.isfinite(v) else str(v) for n, v in values.items()}
        try:
            self._file.write(f"{json.dumps({'step': step} | shown)}\n".encode())
        except OSError as e:
            raise UserError(
                f"{self._file.name} cannot be written: {e.strerror}: mend that, then the same "
                f"command continues"
            ) from e
        for board in self._boards:
            board.scalars(step, values)
        self._mirror.copy_sometimes()

    def pictures(self, step: int, draw: Callable[[], dict[str, np.ndarray]]):
        """{name: uint8 (height, width, 3)} of `draw`, which is called in a thread: nothing waits
        for it. What goes wrong there is said, and no more."""
        if self._active:
            self._draughtsman.submit(self._draw, step, draw)

    def _draw(self, step: int, draw):
        try:
            for name, picture in draw().items():
                for board in self._boards:
                    board.picture(step, name, picture)
        except Exception as e:
            print(f"no pictures of step {step}: {type(e).__name__}: {e}", file=sys.stderr)

    def config(self, resolved: dict):
        """The resolved config: config.json, and a text in TensorBoard."""
        if self._active:
            text = json.dumps(resolved, indent=1)
            (self._mirror.near / "config.json").write_text(text + "\n")
            for board in self._boards:
                board.config(resolved, text)

    def copy(self):
        """Sees to it that all until now is in the work directory, if that is on gs://."""
        if self._active:
            self._mirror.copy()

    def close(self):
        if self._active:
            self._draughtsman.shutdown()
            self._file.close()
            for board in self._boards:
                board.close()
            self._mirror.close()


def best_and_last(workdir, best: str) -> list[str]:
    """A line for every metric of the evaluations of a run that keeps its `best`: its best value,
    its last."""
    if not best or not (epath.Path(workdir) / run_log.FILE).is_file():
        return []
    told = []
    for name, curve in run_log.read(workdir).curves.items():
        finite = {step: value for step, value in curve.items() if math.isfinite(value)}
        if (
            "/" in name and not run_log.is_detail(name) and finite
        ):  # knn/cls: what an evaluation has measured
            top = (min if run_log.is_loss(name) else max)(finite, key=finite.get)
            last = max(finite)
            told.append(
                f"{name}: best {finite[top]:.4f} at step {top}, last {finite[last]:.4f} at step "
                f"{last}"
            )
    return told


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


class Profile:
    """A trace of the steps that `config.profile` names, in TensorBoard's layout; a context.

    Every process traces the same steps, into a file of its own (number and host) under
    WORKDIR/profile/plugins/profile/step_N. A process that traced alone would hold up the others.
    """

    def __init__(self, workdir, steps: tuple[int, int] | None, first: int):
        self._start, self._stop = (first + n for n in steps) if steps else (None, None)
        self._to = epath.Path(workdir) / f"profile/plugins/profile/step_{self._start}"
        self._local = None  # where JAX writes: processes of one host would take the same name

    def reached(self, step: int, state) -> bool:
        """Starts or stops before `step`, once the steps until then are done; whether it did."""
        if step not in (self._start, self._stop):
            return False
        jax.block_until_ready(state)
        if step == self._start:
            self._local = tempfile.TemporaryDirectory()
            profiler.start(self._local.name)
        else:
            self._finish()
        return True

    def _finish(self):
        if self._local is None:
            return
        profiler.stop()
        self._to.mkdir(parents=True, exist_ok=True)
        for file in Path(self._local.name).glob("plugins/profile/*/*"):
            (self._to / f"{jax.process_index():04}.{file.name}").write_bytes(file.read_bytes())
        self._local.cleanup()
        self._local = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_):
        self._finish()
