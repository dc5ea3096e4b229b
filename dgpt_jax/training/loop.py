"""The steps of a run, and what is done between them: logging, evaluating, saving."""

import contextlib
import dataclasses
import shlex
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import jax
from etils import epath

from dgpt_jax import (
    STARTED,
    batching,
    compile_cache,
    metrics,
    optim,
    pictures,
    replay,
    run_log,
    saving,
    schema,
    sharding,
    signals,
)
from dgpt_jax.config import Train
from dgpt_jax.evals import classification, pretraining
from dgpt_jax.progress import Clock, Progress
from dgpt_jax.schema import UserError
from dgpt_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The durations of a config as optimizer steps."""

    total: int
    warmup: int
    checkpoint_every: int
    keep_every: int
    eval_every: int


def evaluations_of(task):
    """The module with what is measured while a task trains."""
    return classification if task.config.task == "classify" else pretraining


def periodic_evaluators(task, mesh) -> list[Callable]:
    """What is called every config.evals.every: each params → {metric: value}.

    Raises UserError where its data do not fit the task, and where none of it gives the metric
    config.checkpoint.best ("": none is asked for).
    """
    best, measured = task.config.checkpoint.best, evaluations_of(task).measured(task)
    if best and best not in measured:
        known = f"name one of {', '.join(measured)}" if measured else "config.evals names no data"
        raise UserError(f"config.checkpoint.best={best} is not measured: {known}")
    return evaluations_of(task).periodic(task, mesh)


class Loop:
    """Where a run is: `state` after `step` steps."""

    def __init__(
        self,
        task,
        schedule: Schedule,
        rate: Callable,
        state: TrainState,
        first: int,
        *,
        mesh,
        workdir: epath.Path,
        evaluators: list[Callable],
        checkpoints: saving.Checkpoints,
        writer: metrics.Writer,
        progress: Progress,
    ):
        """rate: steps to learning rates; first: how many steps the state has behind it."""
        self.task, self.config, self.schedule, self.rate = task, task.config, schedule, rate
        self.mesh, self.workdir = mesh, workdir
        self.checkpoints, self.writer, self.progress = checkpoints, writer, progress
        self.state, self.step, self._first = state, first, first
        self._rows = sharding.process_rows(mesh, self.config.batch_size)
        self._metadata = {
            "config": schema.to_dict(self.config), "data": task.examples.identity()
        }  # fmt: skip
        self._interval = metrics.Interval(task.metric_names, mesh)
        self._in_flight: deque[jax.Array] = deque()
        self._clock = Clock(first, schedule.total, self.config.batch_size)
        self._evaluators = evaluators
        pretrains = self.config.task == "pretrain"
        self._painter = pretraining.painter(task, mesh) if pretrains else None

    def run(self, step_fn: Callable, stop: signals.StopOnSignal):
        """To the last step, or to the next one after a signal; what it leaves is saved."""
        config, schedule = self.config, self.schedule
        batches = self._batches(self.step)
        batches = batching.ahead(
            batches, partial(sharding.global_batch, self.mesh, config.batch_size)
        )
        profile = metrics.Profile(self.workdir, config.profile, self.step)
        results = {}
        self._stream = batches
        with stop, profile, contextlib.closing(batches):
            while self.step < schedule.total and not stop.asked(self.step):
                if profile.reached(self.step, self.state):
                    self._clock.restart(self.step)
                self._advance(step_fn, batches)
                last = self.step == schedule.total
                failed = False
                if self.step % config.log_every == 0 or last:
                    self._log()
                    failed = self._has_failed_to_save()
                results = {}
                if self._evaluators and (self.step % schedule.eval_every == 0 or last):
                    results = self._evaluate()
                measured = config.checkpoint.best in results
                due = self.step % schedule.checkpoint_every == 0 or measured or last
                if due or failed:
                    self._flush()  # a run killed right after has logged all that it does not repeat
                    self._save(results or None)
            self._flush()
            if stop.exit_code is not None and self.checkpoints.latest() != self.step:
                self._save()
            while self.checkpoints.failed(wait=True):
                self.progress.say("the last checkpoint could not be written: once more")
                self._save(results or None)

    def _batches(self, start: int):
        size = self.config.batch_size
        return batching.train_batches(self.task.examples, size, rows=self._rows, start_step=start)

    def _advance(self, step_fn: Callable, batches):
        """One step, which is not waited for, unless it is the first: that one was compiled."""
        asked = time.monotonic()
        batch = next(batches)
        self._clock.waited(time.monotonic() - asked)
        begins = self.step == self._first
        if begins and self.config.evals.pictures:
            self.writer.pictures(self.step, partial(crops, self.config, batch))
        self.state, self._interval.running = step_fn(
            self.state, self._interval.running, batch, self.task.frozen
        )
        self.step += 1
        # By itself JAX lets 32 steps wait in line, each with its batch in the device's memory.
        self._in_flight.append(self.state.step + 0)  # the state itself is given to the next step
        if len(self._in_flight) > 1:
            jax.block_until_ready(self._in_flight.popleft())
        if begins:
            jax.block_until_ready(self.state)
            now = time.monotonic()
            self.progress.say(
                f"first step {now - STARTED:.0f} s after the start, {now - asked:.0f} s of them "
                f"for this step: {compile_cache.told()}"
            )
            self._clock.restart(self.step)

    def _log(self):
        """Ends an interval, and writes down the one before."""
        self._flush()
        values = {"learning_rate": float(self.rate(self.step - 1).max())}
        values |= self._clock.read(self.step) | self.task.examples.counters()
        self._interval.end(self.step, values, optim.counts(self.state.opt_state))

    def _flush(self):
        """Writes down the interval that has ended, if that is not done. Raises UserError after bad
        numbers."""
        if (ended := self._interval.take()) is None:
            return
        step, values = ended
        in_a_row = values.pop("in_a_row")
        self.writer.scalars(step, values)
        self.progress.show(step, self.schedule.total, values)
        if in_a_row >= self.config.optim.bad_steps:
            self._stop_at_bad_numbers()

    def _evaluate(self) -> dict[str, float]:
        self._flush()
        params, results = optim.measured(self.state), {}
        for evaluate in self._evaluators:
            results |= evaluate(params)
        self.writer.scalars(self.step, results)
        told = (name for name in results if not run_log.is_detail(name))
        shown = " ".join(f"{name} {results[name]:.4f}" for name in told)
        self.progress.say(f"step {self.step}: {shown}")
        if self._painter:
            self.writer.pictures(self.step, self._painter(params))
        self._clock.restart(self.step)
        return results

    def _has_failed_to_save(self) -> bool:
        if failed := self.checkpoints.failed():
            self.progress.say("a checkpoint could not be written: once more")
        return failed

    def _save(self, results=None):
        self.writer.copy()
        self.checkpoints.save(self.state, self._metadata, results)

    def _stop_at_bad_numbers(self):
        """Writes down the first of the steps in a row whose update was left out. Raises UserError.

        The parameters are those that it met, because none of these steps has changed them.
        """
        in_a_row = int(self.state.opt_state.in_a_row)
        first = int(self.state.step) - in_a_row
        self._stream.close()  # its batches are not used any more; both would share a shard cache
        with contextlib.closing(self._batches(first)) as batches:
            local = next(batches)
            ids = batching.batch_ids(  # before the stream is closed, and with it the shard cache
                self.task.examples, self.config.batch_size, rows=self._rows, step=first
            )
        try:
            left = replay.write(
                self.workdir, self.task, self.state.params, first, ids, local, self.mesh
            )
            then = f"look with python tools/replay.py {shlex.quote(str(left))}"
        except (UserError, OSError) as e:
            then = f"the step was not written: {e}"
        raise UserError(
            f"loss or gradients were not finite (config.optim.bad_steps) or spiked "
            f"(config.optim.spike) in all {in_a_row} steps from {first} on, and no update was "
            f"made: {then}"
        )


def crops(config: Train, batch) -> dict:
    """What the model sees of a batch, as a picture."""
    seen = {name: batch[name] for name in ("image", "order") if name in batch}
    seen = sharding.some(seen, config.evals.pictures)
    return {"crops": pictures.crops(seen, config.model.segments)}
