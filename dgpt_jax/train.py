"""Training: `python -m dgpt_jax.train --config=configs/… --workdir=DIR`.

Running the same command again continues from the newest checkpoint in DIR. DIR holds config.json
(resolved), metrics.jsonl, tensorboard/, checkpoints/ and, where asked for, profile/. One training
at a time works in DIR (workdir_lock.py). Exit codes: 0 done, 1 a user's error, 75 stopped by
SIGTERM after saving, 130 by Ctrl-C after saving.
"""

import dgpt_jax.starting  # noqa: F401

import contextlib
import shlex
import sys
from functools import partial

import jax
from clu import parameter_overview
from etils import epath

from dgpt_jax import (
    cli,
    compile_cache,
    durations,
    hosts,
    metrics,
    optim,
    outputs,
    resume,
    saving,
    schema,
    sharding,
    signals,
    tasks,
    workdir_lock,
)
from dgpt_jax.config import Train
from dgpt_jax.loop import Loop, Schedule, evaluations_of, periodic_evaluators
from dgpt_jax.progress import Progress
from dgpt_jax.schema import UserError
from dgpt_jax.step import make_train_step


def resolve_schedule(config: Train, examples: int) -> Schedule:
    """Durations become steps here and nowhere else; `examples` is the length of the dataset.

    Raises UserError where nothing would be trained, the warm-up does not end, or an interval is
    shorter than a step.
    """
    to_steps = partial(durations.steps, batch_size=config.batch_size, examples=examples)
    total = to_steps(config.total, "config.total", least=1)
    warmup = to_steps(config.optim.warmup, "config.optim.warmup", total=total)
    if warmup >= total:
        raise UserError(
            f"config.optim.warmup={config.optim.warmup!r} is {warmup} steps, config.total is "
            f"{total}: the peak learning rate would not be reached; shorten the warm-up"
        )
    if config.profile and config.profile[0] >= total:
        raise UserError(
            f"config.profile starts at step {config.profile[0]} of {total}: start it sooner"
        )
    every, keep = config.checkpoint.every, config.checkpoint.keep_every
    interval = partial(to_steps, total=total, least=1)
    return Schedule(
        total=total,
        warmup=warmup,
        checkpoint_every=interval(every, "config.checkpoint.every"),
        keep_every=interval(keep, "config.checkpoint.keep_every") if keep else 0,
        eval_every=interval(config.evals.every, "config.evals.every"),
    )


def train(config: Train, workdir: epath.Path, *, allow_config_change: bool = False) -> int:
    """Trains to the end or to a signal; returns the exit code. Raises UserError."""
    mesh = sharding.make_mesh(config.mesh)
    progress = Progress()
    progress.say("\n".join(hosts.preflight(workdir, mesh)))
    task = tasks.open_task(config)
    schedule = resolve_schedule(config, len(task.examples))
    peaks = optim.peaks(config.optim, config.batch_size)
    rate = optim.schedule(peaks, schedule.warmup, schedule.total, config.optim.min_lr)
    tx = task.optimizer(rate)
    describe(config, task, schedule, mesh, peaks.max(), progress)
    # Evaluators find it where it is, instead of making copies.
    task.frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
    evaluators = periodic_evaluators(task, mesh)

    stop = signals.StopOnSignal()
    with (
        workdir_lock.held(workdir, progress.say),
        saving.Checkpoints(
            workdir,
            keep=config.checkpoint.keep,
            keep_every=schedule.keep_every,
            best=config.checkpoint.best,
        ) as checkpoints,
        contextlib.closing(progress),
    ):
        train_state, first = resume.begin(
            config, task, tx, mesh, checkpoints, progress, allow_config_change
        )
        progress.say(
            parameter_overview.get_parameter_overview(train_state.params, include_stats=False)
        )
        step_fn = make_train_step(
            task.loss,
            tx,
            mesh,
            accum_steps=config.accum_steps,
            prepare=task.prepare,
            seed=config.seed,
            places=jax.tree.map(lambda leaf: leaf.sharding, train_state),
        )
        # What is refused before leaves the logs of a run as they are.
        with contextlib.closing(metrics.Writer(workdir, config.wandb)) as writer:
            writer.config(schema.to_dict(config))
            loop = Loop(
                task,
                schedule,
                rate,
                train_state,
                first,
                mesh=mesh,
                workdir=workdir,
                evaluators=evaluators,
                checkpoints=checkpoints,
                writer=writer,
                progress=progress,
            )
            loop.run(step_fn, stop)
    if stop.exit_code is not None:
        progress.say(f"stopped by a signal, saved at step {loop.step}: the same command continues")
        return stop.exit_code
    best_and_last = metrics.best_and_last(workdir, config.checkpoint.best)
    for line in (*best_and_last, *evaluations_of(task).recorded(task, workdir)):
        progress.say(line)
    then = task.then.format(workdir=shlex.quote(str(workdir)))
    progress.say(f"done: {workdir} holds step {loop.step}; next: {then}")
    return 0


def describe(config, task, schedule, mesh, peak, progress):
    """Prints the resolved config and what follows from it."""
    for line in schema.lines(schema.to_dict(config)):
        progress.say(line)
    for note in task.notes:
        progress.say(note)
    epoch = len(task.examples) / config.batch_size
    progress.say(
        f"{len(task.examples)} examples, batch {config.batch_size}, {epoch:.1f} steps an epoch, "
        f"{schedule.total} steps ({schedule.warmup} warm-up), peak learning rate {peak:.3g}, "
        f"mesh {dict(mesh.shape)} on {mesh.devices.flat[0].device_kind}, "
        f"{jax.process_count()} process(es)"
    )


def main():
    made = cli.parser(__doc__, Train)
    made.add_argument(
        "--workdir", type=cli.path, required=True, help="directory of the run; made if absent"
    )
    made.add_argument(
        "--allow_config_change",
        action="store_true",
        help="continue though data, schedule or optimizer of the config are others",
    )
    arguments, config = cli.parse(made, Train)
    outputs.directory(arguments.workdir)
    signals.raise_on_sigterm()  # until the loop: nothing is lost yet
    hosts.start(config.hosts, config.platform)
    compile_cache.use(arguments.workdir)
    allow = arguments.allow_config_change
    sys.exit(train(config, epath.Path(arguments.workdir), allow_config_change=allow))


if __name__ == "__main__":
    cli.run(main)
