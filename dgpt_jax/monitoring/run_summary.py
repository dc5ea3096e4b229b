"""Key numbers and status of a run, from what its work directory holds."""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax.config import durations, renamed_keys
from dgpt_jax.distributed import run_lock
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import metrics_log
from dgpt_jax.monitoring.progress import duration
from dgpt_jax.storage import gcs, orbax_checkpoint

EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.(.+)")
BAD_STEP = re.compile(r"bad_step_(\d+)")
LOST = 3  # logged losses at the end, none of them finite, of a run that has diverged
# Seconds between a start and its config.json; more if the files were copied without their times.
MAX_START_SECONDS = 60


@dataclass(frozen=True)
class Start:
    """One start of the training command: seconds since 1970, and the host of process 0."""

    time: int
    host: str


@dataclass(frozen=True)
class Checkpoints:
    """Steps of the checkpoints, and what the newest one tells about the run.

    examples: length of the dataset. encoder: its part of `parameters`. mesh: {axis: devices}.
    error: why these are missing although there is a checkpoint.
    """

    steps: tuple[int, ...] = ()
    examples: int | None = None
    parameters: int | None = None
    encoder: int | None = None
    mesh: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Run:
    """A work directory: log and config (nested, {} without one, with today's keys)."""

    path: epath.Path
    log: metrics_log.Log
    config: Mapping[str, Any]
    checkpoints: Checkpoints
    starts: tuple[Start, ...]
    written: float  # when the last line of metrics was, in seconds since 1970
    now: float

    @cached_property
    def total(self) -> int | None:
        """Steps of the complete run; None if that depends on data of unknown length."""
        try:
            return durations.steps(
                self.config["total"],
                "config.total",
                batch_size=self.config["batch_size"],
                examples=self._examples(),
            )
        except (UserError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            return None

    def _examples(self) -> int:
        if self.checkpoints.examples is None and "epoch" in self.config["total"]:
            raise KeyError
        return self.checkpoints.examples or 0

    def section(self, name: str) -> Mapping[str, Any]:
        """A group of config keys, {} without it."""
        section = self.config.get(name)
        return section if isinstance(section, Mapping) else {}

    @cached_property
    def epochs(self) -> float | None:
        """Passes over the dataset that were trained; None if its length is unknown."""
        examples, batch_size = self.checkpoints.examples, self.config.get("batch_size")
        if not (examples and isinstance(batch_size, int)):
            return None
        return self.log.last * batch_size / examples

    @cached_property
    def skipped(self) -> int:
        """Updates that were skipped so far, because numbers were not finite or the loss spiked."""
        _, values = self.log.arrays("skipped")
        return int(values[-1]) if len(values) and np.isfinite(values[-1]) else 0

    @cached_property
    def wall_seconds(self) -> float | None:
        """Seconds from the first start to the last line of metrics, interruptions included.

        Of a log without times, of an earlier version, by the files. None if there are no times of
        starts, or if files were copied without their times: then config.json, which each start
        writes, is younger than the last start.
        """
        if self.log.times:
            return self.log.times.wall
        config = self.path / "config.json"
        if not self.starts or not config.is_file():
            return None
        wall = self.written - self.starts[0].time
        late = config.stat().mtime - self.starts[-1].time
        # On gs:// it is uploaded later, and so may be the metrics.
        copied = late > MAX_START_SECONDS and not gcs.is_remote(self.path)
        return None if copied or wall <= 0 else wall

    @cached_property
    def step_seconds(self) -> float | None:
        """Seconds that the logged steps took, without those that a later start repeated; of a log
        without times from their throughput. None if it was not logged throughout."""
        if self.log.times:
            return float(self.log.arrays("step_seconds")[1].sum())
        steps, rates = self.log.arrays("images_per_second")
        batch_size = self.config.get("batch_size")
        if not len(steps) or not isinstance(batch_size, int) or not np.all(rates > 0):
            return None
        return float(np.sum(np.diff(steps, prepend=0) / rates) * batch_size)

    @cached_property
    def data_wait(self) -> float | None:
        """Share of the time of the logged steps that was spent waiting for data."""
        steps, waits = self.log.arrays("data_wait")
        if self.log.times and len(waits):
            return float(np.average(waits, weights=self.log.arrays("step_seconds")[1]))
        _, rates = self.log.arrays("images_per_second")
        if not len(waits) or len(waits) != len(rates) or not np.all(rates > 0):
            return None
        return float(np.average(waits, weights=np.diff(steps, prepend=0) / rates))

    @cached_property
    def goodput(self) -> float | None:
        """Share of the wall time in which the logged steps ran; None if one of both is unknown."""
        if self.wall_seconds is None or self.step_seconds is None:
            return None
        share = self.step_seconds / self.wall_seconds
        return share if share <= 1 else None  # lines of a start whose times are missing

    @cached_property
    def time_use(self) -> dict[str, float]:
        """{what: seconds} of the wall time, which is their sum; {} for a log without times."""
        times, kept_seconds = self.log.times, self.step_seconds
        if times is None or kept_seconds is None:
            return {}
        waiting = min((self.data_wait or 0.0) * kept_seconds, kept_seconds)
        parts = {
            "steps": kept_seconds - waiting,
            "waiting for data": waiting,
            "start-up and compilation": times.startup,
            "evaluations": times.evaluations,
            "checkpoints": times.checkpoints,
            "steps that were repeated": times.steps - kept_seconds,
            "between sessions": times.between,
        }
        return parts | {"the rest": max(times.wall - sum(parts.values()), 0.0)}

    @cached_property
    def status(self) -> tuple[str, str]:
        """(kind, text); kind: finished, running, stopped or diverged."""
        last, total = self.log.last, self.total
        of = f"step {last} of {total}" if total else f"step {last}"
        skipped = f", {self.skipped} steps skipped" if self.skipped else ""
        if (bad := self._bad_step()) is not None:
            return "diverged", f"diverged: stopped at {of}, updates skipped from step {bad} on"
        _, losses = self.log.arrays("loss")
        if len(losses) >= LOST and not np.isfinite(losses[-LOST:]).any():
            return "diverged", f"diverged: the loss is not finite at {of}{skipped}"
        if total and last >= total:
            return "finished", f"finished {total} steps{skipped}"
        age = f"last line {duration(max(self.now - self.written, 0))} ago"
        lock = self.path / run_lock.FILE
        if not lock.is_file():
            return "stopped", f"stopped at {of}{skipped}"
        if self.now - lock.stat().mtime < (run_lock.MISSED + 1) * run_lock.BEAT_SECONDS:
            return "running", f"running: {of}, {age}{skipped}"
        return "stopped", f"killed at {of}, {age}{skipped}"

    def _bad_step(self) -> int | None:
        """First of the skipped steps that stopped the run, None if it got beyond them."""
        slack = self.section("optim").get("max_skipped_in_a_row", 10) + self.config.get(
            "log_every", 50
        )
        steps = [int(m[1]) for p in self.path.iterdir() if (m := BAD_STEP.fullmatch(p.name))]
        return next((s for s in sorted(steps) if s <= self.log.last <= s + slack), None)

    def best(self, name: str) -> tuple[float, int] | None:
        """Best (value, step) of an evaluation; None if it was never finite."""
        finite = self.log.curves.get(name, metrics_log.EMPTY).finite()
        if not len(finite):
            return None
        values = finite.values
        return finite.point(int(values.argmin() if metrics_log.is_loss(name) else values.argmax()))


def read(run: epath.PathLike, now: float | None = None) -> Run:
    """Reads a work directory. now: seconds since 1970, default the clock. Raises UserError."""
    path = epath.Path(run)
    log = metrics_log.read(path)
    return Run(
        path=path,
        log=log,
        config=_read_config(path),
        checkpoints=_read_checkpoints(path),
        starts=_read_starts(path / "tensorboard"),
        written=(path / metrics_log.FILE).stat().mtime,
        now=time.time() if now is None else now,
    )


def _read_config(path: epath.Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        return renamed_keys.translate(json.loads(file.read_text())) if file.is_file() else {}
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is damaged: {e}") from None


def _read_starts(directory: epath.Path) -> tuple[Start, ...]:
    """Starts by the names of the event files, each of which one start created."""
    matches = (EVENTS.fullmatch(p.name) for p in directory.glob("events.out.tfevents.*"))
    return tuple(sorted((Start(int(m[1]), m[2]) for m in matches if m), key=lambda s: s.time))


def _read_checkpoints(path: epath.Path) -> Checkpoints:
    try:
        steps = tuple(orbax_checkpoint.steps(path))
    except UserError:
        return Checkpoints()
    try:
        metadata, mesh = orbax_checkpoint.read_metadata(path)
        sizes = {name: math.prod(shape) for name, shape, *_ in orbax_checkpoint.describe(path)}
    except UserError as e:
        return Checkpoints(steps, error=str(e))
    params = {name: size for name, size in sizes.items() if name.startswith("params/")}
    encoder = sum(size for name, size in params.items() if name.startswith("params/encoder/"))
    examples = (metadata.get("data") or {}).get("examples")
    return Checkpoints(steps, examples, sum(params.values()) or None, encoder or None, mesh)
