"""Runs a named study: the same small training in several ways, from several seeds, measured alike.

    python tools/ablate.py views --out=DIR [--seeds=5] [--images=glyphs] [--config.total=…]

Real images (digits, or glyphs in fonts that were not seen), a teacher that is trained on the spot,
token stores, dgpt_jax.train, then kNN and linear probes on the test split. `--config` is what every
run begins from; default: configs/study.py. Prints how long it will take, a line a run, and writes
DIR/STUDY.md and .png; what is finished is in DIR/results.jsonl. The same command again goes on
after a kill, and a second one beside it shares the work. Studies in one DIR share images, teacher,
stores and equal runs.
"""

import dgpt_jax.starting  # noqa: F401

import contextlib
import dataclasses
import fcntl
import json
import shlex
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plot
import small_images
from etils import epath

from dgpt_jax import (
    cli,
    durations,
    hosts,
    load,
    outputs,
    progress,
    resume,
    run_log,
    schema,
    signals,
    studies,
    towers,
    train,
)
from dgpt_jax.config import Train
from dgpt_jax.convert import teacher as teacher_weights
from dgpt_jax.schema import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "results.jsonl"
SHORT = 40  # steps of the run that the time is told from, where nothing else tells it


def say(text: str):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@contextlib.contextmanager
def claimed(path: Path, wait: bool = False):
    """Whether this process has `path`, a lock file, to itself; the system frees it at a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def finished(out: Path) -> dict[tuple[str, int], dict]:
    """{(name, seed): its line} of the runs that are done; a line cut off by a kill is none."""
    lines = {}
    if (out / RESULTS).exists():
        for text in (out / RESULTS).read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                lines[line["run"], line["seed"]] = line
    return lines


def add_line(out: Path, line: dict):
    with claimed(out / "results.lock", wait=True), (out / RESULTS).open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut_off = file.read() not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(line).encode() + b"\n")


def settle(out: Path, base: Train, kind: str):
    """Writes down what the runs of `out` have in common. Raises UserError where it is another."""
    path = out / "settings.json"
    now = {"images": kind} | schema.flatten(schema.to_dict(base))
    now = json.loads(json.dumps(now))
    if not path.exists():
        path.write_text(json.dumps(now, indent=1) + "\n")
    before = json.loads(path.read_text())
    for name, value in now.items():
        if before.get(name, value) != value and not resume.FREE.match(name):
            raise UserError(
                f"{out} has runs with {name} {before[name]}, this command has {value}: choose "
                f"another --out"
            )


@partial(jax.jit, static_argnums=0)
def _mean_features(model, params, pictures):
    return load.Encoder(model, params, "").features(pictures, "mean")


def features_of(encoder: load.Encoder):
    """pictures → mean features; compiled once for all encoders of a model."""
    params = jax.tree.map(jnp.asarray, encoder.params)
    return partial(_mean_features, encoder.model, params)


def untrained_features(run: studies.Run, base: Train, out: Path):
    """pictures → features of a row of the frame."""
    if run.row == "raw pixels":
        return small_images.raw_pixels
    if run.row == "untrained encoder":
        return features_of(load.untrained(base.model, run.seed))
    teacher = teacher_weights.load(str(out / "teacher"))
    return jax.jit(lambda x: towers.teacher_tokens(teacher.tower, teacher.params, x)[:, 0])


def measured(encode, pictures: dict) -> dict[str, float]:
    """{"knn 5": accuracy in percent, the mean over draws of labels, …}."""
    found = small_images.accuracies(small_images.banks(encode, pictures))
    return {f"{protocol} {shots}": float(np.mean(x)) for (protocol, shots), x in found.items()}


def trained(config: Train, directory: Path) -> load.Encoder:
    """Trains, or goes on; what training prints goes to its log. Ends the command on a signal."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
        code = train.train(config, epath.Path(directory))
    if code:
        say(f"stopped, {directory} is saved; next: the same command continues")
        sys.exit(code)
    return load.load_encoder(directory)


def directory_of(run: studies.Run, out: Path) -> Path:
    return out / "runs" / run.name / f"seed{run.seed}"


def carry_out(run: studies.Run, base: Train, out: Path, pictures: dict) -> dict:
    """Trains and measures a run, or measures a row of the frame; its line."""
    started, line = time.monotonic(), {"run": run.name, "seed": run.seed}
    if run.changes is None:
        encode = untrained_features(run, base, out)
    else:
        directory = directory_of(run, out)
        encode = features_of(trained(studies.config_of(run, base, out), directory))
        curves = run_log.read(directory).curves
        kept = ("loss", "next", "visible", "direct", "images_per_second")
        last = {name: curves[name].point(-1)[0] for name in kept if name in curves}
        line |= {"changes": dict(run.changes), "last": last}
    line["accuracy"] = measured(encode, pictures)
    return line | {"seconds": time.monotonic() - started, "date": time.strftime("%Y-%m-%d")}


def seconds_left(todo, base: Train, out: Path, pictures: dict) -> float:
    """By finished runs of the same name, or by all of them; where there is none, by a short run."""
    trainings = [run for run in todo if run.changes is not None]
    times: dict[str, list[float]] = {}
    for line in finished(out).values():
        if "changes" in line:
            times.setdefault(line["run"], []).append(line["seconds"])
    if trainings and not times:
        say(f"a run of {SHORT} steps tells how long the study will take …")
        times["short"] = [short_run(trainings[0], base, out, pictures)]
    usual = float(np.median([x for found in times.values() for x in found] or [0]))
    return sum(float(np.median(times.get(run.name, usual))) for run in trainings)


def short_run(run: studies.Run, base: Train, out: Path, pictures: dict) -> float:
    """Seconds that a whole run would take, with what it compiles."""
    config, place = studies.config_of(run, base, out), out / "short"
    steps = durations.steps(
        config.total,
        "config.total",
        batch_size=config.batch_size,
        examples=len(pictures["train"][0]),
        least=1,
    )
    shutil.rmtree(place, ignore_errors=True)
    started = time.monotonic()
    optim = dataclasses.replace(config.optim, warmup="0 steps")  # it may be longer than this run
    short = dataclasses.replace(config, total=f"{min(SHORT, steps)} steps", optim=optim)
    measured(features_of(trained(short, place)), pictures)
    passed = time.monotonic() - started
    rate, _ = run_log.read(place).curves["images_per_second"].point(-1)
    shutil.rmtree(place)
    return passed + max(0, steps - SHORT) * config.batch_size / rate


def work(todo, base: Train, out: Path, pictures: dict):
    """Carries out the runs that no other process has begun or finished."""
    for run in todo:
        lock = out / "locks" / f"{run.name}.{run.seed}"
        with claimed(lock) as mine:
            if not mine or run.key in finished(out):
                continue
            line = carry_out(run, base, out, pictures)
            add_line(out, line)
            for spent in ("checkpoints", "tensorboard"):
                shutil.rmtree(directory_of(run, out) / spent, ignore_errors=True)
        shown = " ".join(f"{name} {value:.1f}" for name, value in line["accuracy"].items())
        say(f"{run.row}, seed {run.seed}: {shown} ({line['seconds']:.0f} s)")


def write_up(out: Path, name: str, study: studies.Study, wanted) -> list[studies.Run]:
    """DIR/STUDY.md and .png of the runs that are finished; those that are not."""
    done = finished(out)
    there = [run for run in wanted if run.key in done]
    numbers: dict[str, dict[int, dict]] = {row: {} for row in (*studies.FRAME, *study.rows)}
    for run in there:
        numbers[run.row][run.seed] = done[run.key]["accuracy"]
    numbers = {row: seeds for row, seeds in numbers.items() if seeds}
    dates = ", ".join(sorted({done[run.key]["date"] for run in there}))
    text = [f"### {name}: {study.about}", "", f"    python {shlex.join(sys.argv)}", ""]
    text += [f"{dates}; {len(there)} of {len(wanted)} runs. Paper: {study.paper}.", ""]
    if numbers:
        text += [studies.table(studies.means(numbers), "accuracy, %"), ""]
    ways = {row: seeds for row, seeds in numbers.items() if row in study.rows}
    baseline = next(iter(study.rows))
    if found := studies.differences(ways, baseline):
        text += [studies.table(found, f"minus {baseline}", sign="+"), ""]
        plot.differences(found, out / f"{name}.png", f"{name}: minus {baseline}")
    (out / f"{name}.md").write_text("\n".join(text))
    print("\n".join(["", *text]))
    return [run for run in wanted if run.key not in done]


def main():
    made = cli.parser(__doc__, Train)
    made.add_argument("study", help="which; a wrong name lists them")
    made.add_argument("--out", required=True, type=cli.local_path, help="directory for everything")
    made.add_argument("--seeds", type=int, default=5, help="runs of every row")
    made.add_argument(
        "--images", default="digits", choices=small_images.IMAGES, help="which images"
    )
    made.add_argument("--table", action="store_true", help="train nothing: what is finished")
    words = sys.argv[1:]
    if not any(word.partition("=")[0] == "--config" for word in words):
        words = [f"--config={ROOT}/configs/study.py", *words]
    args, base = cli.parse(made, Train, words)
    known, out = studies.studies(base), args.out.resolve()
    schema.one_of("the study", args.study, known)
    study = known[args.study]
    wanted = studies.runs(study, base, range(args.seeds))
    for run in wanted:
        if run.changes is not None:
            studies.config_of(run, base, out)  # refused before anything is made
    outputs.directory(args.out)
    hosts.start(base.hosts, base.platform)
    signals.raise_on_sigterm()
    if not args.table:
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
        with claimed(out / "prepare.lock", wait=True):
            settle(out, base, args.images)
            pictures = small_images.prepare(out, args.images, base, studies.views(study, base), say)
            todo = [run for run in wanted if run.key not in finished(out)]
            left = seconds_left(todo, base, out, pictures)
        say(f"{len(wanted)} runs, {len(todo)} to do: about {progress.duration(left)} alone")
        work(todo, base, out, pictures)
    if missing := write_up(out, args.study, study, wanted):
        print(f"{len(missing)} runs are not finished; next: the same command again")
    else:
        print(f"next: look at {out / args.study}.md and .png")


if __name__ == "__main__":
    cli.run(main)
