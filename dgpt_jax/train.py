"""The training loop: `python -m dgpt_jax.train --config=configs/… --workdir=DIR`.

Running the same command again continues from the newest checkpoint in DIR. DIR holds config.json
(resolved), metrics.jsonl, tensorboard/, checkpoints/ and, where asked for, profile/. Exit codes: 0
done, 1 a user's error, 75 stopped by SIGTERM after saving, 130 by Ctrl-C after saving.
"""

import contextlib
import dataclasses
import sys
import time
from functools import partial

import jax
from clu import parameter_overview
from etils import epath

from dgpt_jax import (
    STARTED,
    cli,
    compile_cache,
    gcs,
    hosts,
    metrics,
    optim,
    pictures,
    pipeline,
    replay,
    resume,
    run_log,
    saving,
    schema,
    sharding,
    signals,
    tasks,
)
from dgpt_jax import config as config_lib
from dgpt_jax.config import Train
from dgpt_jax.evals import classification, pretraining
from dgpt_jax.progress import Clock, Progress
from dgpt_jax.schema import UserError
from dgpt_jax.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The durations of a config as optimizer steps."""

    total: int
    warmup: int
    checkpoint_every: int
    keep_every: int
    eval_every: int


def resolve_schedule(config: Train, examples: int) -> Schedule:
    """Durations become steps here and nowhere else; `examples` is the length of the dataset."""
    to_steps = partial(config_lib.steps, batch_size=config.batch_size, examples=examples)
    total = to_steps(config.total)
    return Schedule(
        total=total,
        warmup=to_steps(config.optim.warmup, total=total),
        checkpoint_every=max(1, to_steps(config.checkpoint.every, total=total)),
        keep_every=to_steps(config.checkpoint.keep_every or "0 steps", total=total),
        eval_every=max(1, to_steps(config.evals.every, total=total)),
    )


def evaluations_of(task):
    """The module with what is measured while a task trains."""
    return classification if task.config.task == "classify" else pretraining


def train(config: Train, workdir: epath.Path, *, allow_config_change: bool = False) -> int:
    """Trains to the end or to a signal; returns the exit code. Raises UserError."""
    mesh = sharding.make_mesh(config.mesh)
    progress = Progress()
    progress.say("\n".join(hosts.preflight(workdir, mesh)))
    rows = sharding.process_rows(mesh, config.batch_size)
    task = tasks.open_task(config)
    schedule = resolve_schedule(config, len(task.examples))
    peaks = optim.peaks(config.optim, config.batch_size)
    rate = optim.schedule(peaks, schedule.warmup, schedule.total, config.optim.min_lr)
    tx = task.optimizer(rate)
    describe(config, task, schedule, mesh, peaks.max(), progress)
    resolved = schema.to_dict(config)

    stop = signals.StopOnSignal()
    with (
        saving.Checkpoints(
            workdir,
            keep=config.checkpoint.keep,
            keep_every=schedule.keep_every,
            best=config.checkpoint.best,
        ) as checkpoints,
        contextlib.closing(metrics.Writer(workdir, config.wandb)) as writer,
        contextlib.closing(progress),
    ):
        train_state, first = resume.begin(
            config, task, tx, mesh, checkpoints, progress, allow_config_change
        )
        writer.config(resolved)
        progress.say(
            parameter_overview.get_parameter_overview(train_state.params, include_stats=False)
        )

        # Evaluators find it where it is, instead of making copies.
        task.frozen = frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
        step_fn = make_train_step(
            task.loss,
            tx,
            mesh,
            accum_steps=config.accum_steps,
            prepare=task.prepare,
            seed=config.seed,
            places=jax.tree.map(lambda leaf: leaf.sharding, train_state),
        )
        evaluators = evaluations_of(task).periodic(task, mesh)
        painter = pretraining.painter(task, mesh) if config.task == "pretrain" else None
        step, results = first, {}
        batches = pipeline.train_batches(
            task.examples, config.batch_size, rows=rows, start_step=first
        )
        batches = pipeline.ahead(batches, partial(sharding.global_batch, mesh, config.batch_size))
        clock = Clock(first, schedule.total, config.batch_size)
        profile = metrics.Profile(workdir, config.profile, first)
        interval = metrics.Interval(task.metric_names, mesh)

        def flush():
            if (ended := interval.take()) is None:
                return
            at, values = ended
            in_a_row = values.pop("in_a_row")
            writer.scalars(at, values)
            progress.show(at, schedule.total, values)
            if in_a_row >= config.optim.bad_steps:
                stop_at_bad_numbers(task, train_state, rows, mesh, workdir)

        def save(results=None):
            writer.copy()
            checkpoints.save(train_state, {"config": resolved}, results)

        with stop, profile, contextlib.closing(batches):
            while step < schedule.total and not stop.asked(step):
                if profile.reached(step, train_state):
                    clock.restart(step)
                asked = time.monotonic()
                batch = next(batches)
                clock.waited(time.monotonic() - asked)
                if step == first and config.evals.pictures:
                    writer.pictures(step, partial(crops, config, batch))
                train_state, interval.running = step_fn(
                    train_state, interval.running, batch, frozen
                )
                step += 1
                if step == first + 1:
                    jax.block_until_ready(train_state)
                    now = time.monotonic()
                    progress.say(
                        f"first step {now - STARTED:.0f} s after the start, {now - asked:.0f} s of "
                        f"them for this step: {compile_cache.told()}"
                    )
                    clock.restart(step)
                last = step == schedule.total
                if step % config.log_every == 0 or last:
                    flush()
                    if checkpoints.failed():
                        progress.say("a checkpoint could not be written: once more")
                        save()
                    values = {"learning_rate": float(rate(step - 1).max())} | clock.read(step)
                    values |= task.examples.counters()
                    interval.end(step, values, optim.counts(train_state.opt_state))
                results = {}
                if evaluators and (step % schedule.eval_every == 0 or last):
                    flush()
                    for evaluate in evaluators:
                        results |= evaluate(optim.measured(train_state))
                    writer.scalars(step, results)
                    told = (name for name in results if not run_log.is_detail(name))
                    shown = " ".join(f"{name} {results[name]:.4f}" for name in told)
                    progress.say(f"step {step}: {shown}")
                    if painter:
                        writer.pictures(step, painter(optim.measured(train_state)))
                    clock.restart(step)
                measured = config.checkpoint.best in results
                if step % schedule.checkpoint_every == 0 or measured or last:
                    flush()  # a run killed right after has logged all that it does not repeat
                    save(results or None)
            flush()
            if stop.exit_code is not None and checkpoints.latest() != step:
                save()
            while checkpoints.failed(wait=True):
                progress.say("the last checkpoint could not be written: once more")
                save(results or None)
    if stop.exit_code is not None:
        progress.say(f"stopped by a signal, saved at step {step}: the same command continues")
        return stop.exit_code
    best_and_last = metrics.best_and_last(workdir, config.checkpoint.best)
    for line in (*best_and_last, *evaluations_of(task).recorded(task, workdir)):
        progress.say(line)
    then = task.then.format(workdir=workdir)
    progress.say(f"done: {workdir} holds step {step}; next: {then}")
    return 0


def crops(config: Train, batch) -> dict:
    """What the model sees of a batch, as a picture."""
    seen = {name: batch[name] for name in ("image", "order") if name in batch}
    seen = sharding.some(seen, config.evals.pictures)
    return {"crops": pictures.crops(seen, config.model.segments)}


def stop_at_bad_numbers(task, train_state, rows, mesh, workdir):
    """Writes down the first of the steps in a row whose update was left out. Raises UserError.

    The parameters are those that it met, because none of these steps has changed them.
    """
    size = task.config.batch_size
    in_a_row = int(train_state.opt_state.in_a_row)
    first = int(train_state.step) - in_a_row
    batches = pipeline.train_batches(task.examples, size, rows=rows, start_step=first)
    with contextlib.closing(batches):
        local = next(batches)
    ids = pipeline.batch_ids(task.examples, size, rows=rows, step=first)
    left = replay.write(workdir, task, train_state.params, first, ids, local, mesh)
    raise UserError(
        f"loss or gradients were not finite (config.optim.bad_steps) or spiked "
        f"(config.optim.spike) in all {in_a_row} steps from {first} on, and no update was made: "
        f"look with python tools/replay.py {left}"
    )


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
    made.add_argument("--workdir", required=True, help="directory of the run; made if absent")
    made.add_argument(
        "--allow_config_change",
        action="store_true",
        help="continue though data, schedule or optimizer of the config are others",
    )
    arguments, config = cli.parse(made, Train)
    gcs.require(arguments.workdir)
    signals.raise_on_sigterm()  # until the loop: nothing is lost yet
    hosts.start(config.hosts, config.platform)
    compile_cache.use(arguments.workdir)
    allow = arguments.allow_config_change
    sys.exit(train(config, epath.Path(arguments.workdir), allow_config_change=allow))


if __name__ == "__main__":
    cli.run(main)
