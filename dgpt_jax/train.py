"""Training: `python -m dgpt_jax.train --config=NAME --workdir=DIR`.

The same command resumes from the newest checkpoint in DIR. DIR holds config.json (resolved),
parameters.txt, metrics.jsonl, tensorboard/, checkpoints/ and, with config.profile, profile/. It is
locked while a run is using it. Exit codes: 0 finished, 1 user error, 75 stopped by SIGTERM after
saving, 130 stopped by Ctrl-C after saving.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import contextlib
import shlex
import sys
import time
from functools import partial
from typing import Any

import jax
from clu import parameter_overview
from etils import epath

from dgpt_jax import cli
from dgpt_jax.config import TrainConfig, durations, schema
from dgpt_jax.distributed import compilation_cache, multihost, preemption, run_lock, sharding
from dgpt_jax.errors import UserError, counted
from dgpt_jax.models.kernels import kernel_check
from dgpt_jax.monitoring import metrics, trackers
from dgpt_jax.monitoring.progress import TrainingProgress, process_start
from dgpt_jax.storage import output_paths
from dgpt_jax.training import checkpointing, optimizer, resume, tasks
from dgpt_jax.training.loop import Loop, Schedule, evaluations_of, periodic_evaluators
from dgpt_jax.training.tasks.base import Task
from dgpt_jax.training.train_step import make_train_step


def resolve_schedule(config: TrainConfig, examples: int) -> Schedule:
    """All durations of a config in steps; `examples` is the length of the dataset.

    Raises UserError if the run has no steps, the warm-up is not shorter than the run, or an
    interval is shorter than a step.
    """
    to_steps = partial(durations.steps, batch_size=config.batch_size, examples=examples)
    total = to_steps(config.total, "config.total", least=1)
    warmup = to_steps(config.optim.warmup, "config.optim.warmup", total=total)
    if warmup >= total:
        raise UserError(
            f"config.optim.warmup={config.optim.warmup!r} is {counted(warmup, 'step')}, "
            f"config.total is {total}: shorten the warm-up, or the learning rate never reaches its "
            f"peak"
        )
    if config.profile and config.profile[0] >= total:
        raise UserError(
            f"config.profile starts at step {config.profile[0]} of {total}: choose an earlier step"
        )
    every, keep = config.checkpoint.every, config.checkpoint.keep_every
    freeze = config.init.freeze_steps
    interval = partial(to_steps, total=total, least=1)
    return Schedule(
        total=total,
        warmup=warmup,
        checkpoint_every=interval(every, "config.checkpoint.every"),
        keep_every=interval(keep, "config.checkpoint.keep_every") if keep else 0,
        eval_every=interval(config.evals.every, "config.evals.every"),
        freeze=to_steps(freeze, "config.init.freeze_steps", total=total) if freeze else total,
    )


def train(
    config: TrainConfig,
    workdir: epath.Path,
    *,
    allow_config_change: bool = False,
    started: float | None = None,
) -> int:
    """Trains to the end or until a signal and returns the exit code. started: of the command, in
    seconds since 1970, for the log; default: now. Raises UserError."""
    started = time.time() if started is None else started
    mesh = sharding.make_mesh(config.mesh)
    progress = TrainingProgress()
    if config.wandb:
        trackers.import_wandb()
    kernel_check.select(config.kernels, progress.say)
    processes = multihost.preflight(workdir, mesh)
    task = tasks.open_task(config)
    schedule = resolve_schedule(config, len(task.examples))
    peaks = optimizer.peak_learning_rates(config.optim, config.batch_size)
    rate = optimizer.schedule(peaks, schedule.warmup, schedule.total, config.optim.min_lr)
    tx = task.optimizer(rate, schedule.freeze)
    # Shared with the evaluators, which would copy host arrays to the devices.
    task.frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
    evaluators = periodic_evaluators(task, mesh)

    stop = preemption.StopOnSignal()
    with (
        run_lock.hold(workdir, progress.say),
        checkpointing.Checkpoints(
            workdir,
            keep=config.checkpoint.keep,
            keep_every=schedule.keep_every,
            best=config.checkpoint.best,
        ) as checkpoints,
        contextlib.closing(progress),
    ):
        origin = resume.find_origin(
            config, task, checkpoints, progress.say,
            allow_config_change=allow_config_change,
        )  # fmt: skip
        # From here on nothing in config, paths and data is refused.
        for line in (*processes, *describe(config, task, schedule, mesh, peaks.max(), workdir)):
            progress.say(line)
        for line in origin.lines:
            progress.say(line)
        start = resume.restore_or_init(task, tx, mesh, checkpoints, config.seed, origin)
        del origin  # with the initial weights on the host
        progress.say(parameters_line(start.state.params, workdir))
        step_fn = make_train_step(
            task.loss, tx, mesh, accum_steps=config.accum_steps, prepare=task.prepare,
            seed=config.seed, state_sharding=jax.tree.map(lambda leaf: leaf.sharding, start.state),
        )  # fmt: skip
        # Opened last: a command that was refused leaves the logs of a run unchanged.
        with contextlib.closing(metrics.Writer(workdir, config.wandb)) as writer:
            writer.config(schema.to_dict(config))
            writer.parameters(start.state.params)
            loop = Loop(
                task, schedule, rate, start, mesh=mesh, workdir=workdir, evaluators=evaluators,
                checkpoints=checkpoints, writer=writer, progress=progress, started=started,
            )  # fmt: skip
            loop.run(step_fn, stop)
    if stop.exit_code is not None and loop.step < schedule.total:
        progress.say(f"stopped by a signal, saved at step {loop.step}: the same command resumes")
        return stop.exit_code
    for line in finish(config, task, workdir, loop.step):
        progress.say(line)
    return 0


def describe(
    config: TrainConfig,
    task: Task,
    schedule: Schedule,
    mesh: jax.sharding.Mesh,
    peak: float,
    workdir: epath.Path,
) -> list[str]:
    """Returns lines with the configured values, notes of the task, and the sizes of the run."""
    epoch = len(task.examples) / config.batch_size
    return [
        *schema.lines(schema.set_values(config)),
        f"the other values are defaults; {workdir}/config.json has all",
        *task.notes,
        f"{counted(len(task.examples), 'example')}, batch {config.batch_size}, {epoch:.1f} steps "
        f"per epoch, {counted(schedule.total, 'step')} ({schedule.warmup} warm-up), peak learning "
        f"rate {peak:.3g}, mesh {dict(mesh.shape)} on {mesh.devices.flat[0].device_kind}, "
        f"{counted(jax.process_count(), 'process', 'processes')}",
    ]


def parameters_line(params: Any, workdir: epath.Path) -> str:
    """Returns the number of parameters, and where their table is."""
    count = counted(parameter_overview.count_parameters(params), "parameter")
    return f"{count}: {workdir}/{metrics.PARAMETERS_FILE} lists their shapes"


def finish(config: TrainConfig, task: Task, workdir: epath.Path, step: int) -> list[str]:
    """Saves the results of a finished run, and returns its last lines."""
    return [
        *metrics.best_and_last(workdir, config.checkpoint.best),
        *evaluations_of(task).save_results(task, workdir),
        f"finished: {workdir} holds step {step}, the last",
        f"next: {task.next_command.format(workdir=shlex.quote(str(workdir)))}",
    ]


def main():
    parser = cli.parser(__doc__, TrainConfig)
    parser.add_argument(
        "--workdir", type=cli.path, required=True, help="directory of the run, created if missing"
    )
    parser.add_argument(
        "--allow_config_change",
        action="store_true",
        help="resume although data, schedule or optimizer of the config differ",
    )
    arguments, config = cli.parse(parser, TrainConfig)
    output_paths.directory(arguments.workdir)
    preemption.raise_on_sigterm()  # until the loop handles signals
    multihost.start(config.hosts, config.platform)
    compilation_cache.use(arguments.workdir)
    allow, started = arguments.allow_config_change, process_start()
    workdir = epath.Path(arguments.workdir)
    sys.exit(train(config, workdir, allow_config_change=allow, started=started))


if __name__ == "__main__":
    cli.run(main)
