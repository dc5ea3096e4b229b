"""The train loop: runs the steps, and logs, evaluates and saves between them."""

import contextlib
import dataclasses
import shlex
import time
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dgpt_jax import invocation
from dgpt_jax.config import schema
from dgpt_jax.data import loader
from dgpt_jax.distributed import compilation_cache, preemption, sharding
from dgpt_jax.errors import UserError, counted
from dgpt_jax.evals import classification, figures, pretraining
from dgpt_jax.monitoring import metrics, metrics_log, time_use
from dgpt_jax.monitoring.progress import Clock, TrainingProgress, seconds_since_start
from dgpt_jax.training import bad_step_replay, checkpointing, optimizer
from dgpt_jax.training.resume import Start
from dgpt_jax.training.tasks.base import Task
from dgpt_jax.training.tasks.pretrain import PretrainTask

Evaluator = Callable[[Any], dict[str, float]]  # params → {metric: value}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The durations of a config in optimizer steps."""

    total: int
    warmup: int
    checkpoint_every: int
    keep_every: int
    eval_every: int
    freeze: int


def evaluations_of(task: Task) -> ModuleType:
    """The module in evals/ with the evaluators of a task."""
    return classification if task.config.task == "classify" else pretraining


def periodic_evaluators(task: Task, mesh: jax.sharding.Mesh) -> list[Evaluator]:
    """The evaluators to run every config.evals.every.

    Raises UserError if their data do not match the task, or if no evaluator returns the metric
    config.checkpoint.best ("": none required).
    """
    best, names = task.config.checkpoint.best, evaluations_of(task).metric_names(task)
    if best and best not in names:
        remedy = f"choose one of {', '.join(names)}" if names else "set config.evals.heldout"
        raise UserError(f"config.checkpoint.best={best} is not evaluated in this run: {remedy}")
    return evaluations_of(task).make_evaluators(task, mesh)


class Loop:
    """A run in progress: `state` is the training state after `step` steps."""

    def __init__(
        self,
        task: Task,
        schedule: Schedule,
        rate: optax.Schedule,
        start: Start,
        *,
        mesh: jax.sharding.Mesh,
        workdir: epath.Path,
        evaluators: list[Evaluator],
        checkpoints: checkpointing.Checkpoints,
        writer: metrics.Writer,
        progress: TrainingProgress,
        started: float,
    ):
        self.task, self.config, self.schedule, self.rate = task, task.config, schedule, rate
        self.mesh, self.workdir = mesh, workdir
        self.checkpoints, self.writer, self.progress = checkpoints, writer, progress
        self.state, self.step, self._start_step = start.state, start.step, start.step
        self._rows = sharding.process_rows(mesh, self.config.batch_size)
        self._metadata = {
            "config": schema.to_dict(self.config),
            "data": task.examples.identity(),
        }
        if start.init:
            self._metadata["init"] = dict(start.init)
        self._accumulator = metrics.MetricAccumulator(task.metric_names, mesh)
        self._in_flight: deque[jax.Array] = deque()
        self._clock = Clock(start.step, schedule.total, self.config.batch_size)
        self._session = time_use.Session(started, self._clock.exclude)
        self._evaluators = evaluators
        self._prediction_figures = None
        if self.config.task == "pretrain":
            self._prediction_figures = pretraining.prediction_figures(
                cast(PretrainTask, task), mesh
            )

    def run(self, step_fn: Callable, stop: preemption.StopOnSignal):
        """Runs to the last step, or to the end of the current one after a signal, and saves.

        Implicit transfers between host and devices are errors while steps run: each would make the
        host wait for the steps in flight. Raises UserError after too many steps in a row with
        non-finite numbers.
        """
        config, schedule = self.config, self.schedule
        batches = self._batches(self.step)
        batches = loader.prefetch_to_device(
            batches, partial(sharding.global_batch, self.mesh, config.batch_size)
        )
        profile = metrics.Profile(self.workdir, config.profile, self.step)
        results = {}
        self._stream = batches
        with stop, profile, contextlib.closing(batches):
            while self.step < schedule.total and not stop.should_stop(self.step):
                if profile.reached(self.step, self.state):
                    self._clock.restart(self.step)
                last = self.step + 1 == schedule.total
                log = (self.step + 1) % config.log_every == 0 or last
                with jax.transfer_guard("disallow"):
                    with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                        self._advance(step_fn, batches)
                    if log:
                        self._log()
                failed = log and self._last_save_failed()
                results = {}
                if self._evaluators and (self.step % schedule.eval_every == 0 or last):
                    results = self._evaluate()
                has_best = config.checkpoint.best in results
                due = self.step % schedule.checkpoint_every == 0 or has_best or last
                if due or failed:
                    self._flush()  # a run killed after the save has logged all steps until then
                    self._save(results or None)
            self._flush()
            if stop.exit_code is not None and self.checkpoints.latest() != self.step:
                self._save()
            while self.checkpoints.last_save_failed(wait=True):
                self.progress.say("the last checkpoint could not be written, trying again")
                self._save(results or None)

    def _batches(self, start: int) -> Generator[dict[str, np.ndarray], None, None]:
        size = self.config.batch_size
        return loader.train_batches(self.task.examples, size, rows=self._rows, start_step=start)

    def _advance(self, step_fn: Callable, batches):
        """Dispatches one step; waits for it only if it is the first, which is compiled."""
        start = time.monotonic()
        batch = next(batches)
        self._clock.add_wait(time.monotonic() - start)
        is_first = self.step == self._start_step
        if is_first and self.config.evals.figures:
            self.writer.images(self.step, partial(figures.first_crops, self.config, batch))
        self.state, self._accumulator.running = step_fn(
            self.state, self._accumulator.running, batch, self.task.frozen
        )
        self.step += 1
        # JAX itself allows 32 steps in flight, each with its batch in device memory.
        self._in_flight.append(jnp.copy(self.state.step))  # the next step is donated the state
        if len(self._in_flight) > 1:
            jax.block_until_ready(self._in_flight.popleft())
        if is_first:
            jax.block_until_ready(self.state)
            now = time.monotonic()
            self.progress.say(
                f"first step {seconds_since_start():.0f} s after the start, {now - start:.0f} s "
                f"of them for this step: {compilation_cache.cache_summary()}"
            )
            self._clock.restart(self.step)
            self._session.first_step_ended()

    def _log(self):
        """Ends a log interval and writes the one before."""
        self._flush()
        values = self._clock.read(self.step) | self._session.read()
        values |= self.task.examples.counters()
        with jax.transfer_guard("allow"):  # Python scalars of the schedule
            arrays = {"learning_rate": jnp.max(self.rate(self.step - 1))}
        arrays |= optimizer.skip_counters(self.state.opt_state)
        self._accumulator.close(self.step, values, arrays)

    def _flush(self):
        """Writes the log interval that ended last, once. Raises UserError after too many steps in a
        row with non-finite numbers."""
        if (interval := self._accumulator.fetch()) is None:
            return
        step, values = interval
        in_a_row = values.pop("in_a_row")
        self.writer.scalars(step, values)
        self.progress.show_step(step, self.schedule.total, values)
        if in_a_row >= self.config.optim.max_skipped_in_a_row:
            with jax.transfer_guard("allow"):
                self._raise_bad_step()

    def _evaluate(self) -> dict[str, float]:
        self._flush()
        jax.block_until_ready(self.state)  # the last step is no part of the evaluation
        with self._session.spent("evaluation"):
            params, results = optimizer.eval_params(self.state), {}
            for evaluate in self._evaluators:
                results |= evaluate(params)
            if self._prediction_figures:
                self.writer.images(self.step, self._prediction_figures(params))
        self.writer.scalars(self.step, results | self._session.read())
        names = (name for name in results if not metrics_log.is_detail(name))
        summary = " ".join(f"{name} {results[name]:.4f}" for name in names)
        self.progress.say(f"step {self.step}: {summary}")
        return results

    def _last_save_failed(self) -> bool:
        if failed := self.checkpoints.last_save_failed():
            self.progress.say("a checkpoint could not be written, trying again")
        return failed

    def _save(self, results: dict[str, float] | None = None):
        jax.block_until_ready(self.state)
        with self._session.spent("checkpoint"):
            self.writer.copy()
            self.checkpoints.save(self.state, self._metadata, results)

    def _raise_bad_step(self):
        """Dumps the first of the steps in a row whose updates were skipped. Raises UserError.

        The parameters are still those of that step, because none of these steps changed them.
        """
        in_a_row = int(self.state.opt_state.in_a_row)
        first = int(self.state.step) - in_a_row
        self._stream.close()  # two streams would share a shard cache
        with contextlib.closing(self._batches(first)) as batches:
            local = next(batches)
            ids = loader.batch_ids(  # before the stream closes the shard cache
                self.task.examples, self.config.batch_size, rows=self._rows, step=first
            )
        try:
            directory = bad_step_replay.write(
                self.workdir, self.task, self.state.params, first, ids, local, self.mesh
            )
            remedy = f"run {invocation.command('replay')} {shlex.quote(str(directory))}"
        except (UserError, OSError) as e:
            remedy = f"step {first} could not be dumped: {e}"
        raise UserError(
            f"skipped {counted(in_a_row, 'step')} in a row, from step {first} on "
            f"(config.optim.max_skipped_in_a_row): loss or gradients were not finite, or the loss "
            f"exceeded config.optim.loss_spike_factor times its mean: {remedy}"
        )
