"""Runs an ablation study: small trainings that differ in a few settings, several seeds each.

    python -m tools.studies.ablate views --out=DIR [--seeds=5] [--images=glyphs] [--config.total=…]

Prepares real images (digits, or glyphs with a test split of held-out fonts), a small teacher and
token stores, trains every row with dgpt_jax.train, and measures kNN and linear probes on the test
split. `--config` is the base config of all runs; default: configs/study.py. Prints the estimated
duration and one line per run, and writes DIR/STUDY.md, .csv and .png; DIR/results.jsonl has the
finished runs. The same command resumes after a kill; a second one in parallel shares the work.
Studies in one DIR share images, teacher, stores and equal runs.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import contextlib
import fcntl
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dgpt_jax import cli
from dgpt_jax.commands import charts
from dgpt_jax.config import TrainConfig, schema
from dgpt_jax.distributed import multihost, preemption
from dgpt_jax.errors import UserError
from dgpt_jax.evals import ablations
from dgpt_jax.examples import image_sets, small_images
from dgpt_jax.examples.small_images import Images, say
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import output_paths
from dgpt_jax.training import resume
from tools.studies import ablation_runs, result_tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "results.jsonl"


@contextlib.contextmanager
def try_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """A context: True if this process holds the lock file `path`, which a kill releases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except BlockingIOError:
            locked = False
        yield locked


def read_results(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """{(name, seed): line} of finished runs; lines truncated by a kill are ignored."""
    lines = {}
    if (out / RESULTS).exists():
        for text in (out / RESULTS).read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                lines[line["run"], line["seed"]] = line
    return lines


def append_result(out: Path, line: Mapping[str, Any]):
    with try_lock(out / "results.lock", wait=True), (out / RESULTS).open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        truncated = file.read() not in (b"", b"\n")
        file.write(b"\n" * truncated + json.dumps(line).encode() + b"\n")


def check_settings(out: Path, base: TrainConfig, kind: str):
    """Saves the settings that all runs in `out` share. Raises UserError if they differ."""
    path = out / "settings.json"
    settings = {"images": kind} | schema.flatten(schema.to_dict(base))
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n")
    saved = json.loads(path.read_text())
    for name, value in settings.items():
        if saved.get(name, value) != value and not resume.RESUMABLE_FIELDS.match(name):
            raise UserError(
                f"{out} has runs with {name} {saved[name]}, this command has {value}: choose "
                f"another --out"
            )


def execute_all(todo: Sequence[ablations.Run], base: TrainConfig, out: Path, images: Images):
    """Executes the runs that no other process is working on or has finished."""
    for run in todo:
        with try_lock(out / "locks" / f"{run.name}.{run.seed}") as locked:
            if not locked or run.key in read_results(out):
                continue
            line = ablation_runs.execute(run, base, out, images)
            append_result(out, line)
            for name in ("checkpoints", "tensorboard"):
                directory = ablation_runs.run_directory(run, out) / name
                shutil.rmtree(directory, ignore_errors=True)
        text = " ".join(f"{name} {value:.1f}" for name, value in line["accuracy"].items())
        say(f"{run.row}, seed {run.seed}: {text} ({line['seconds']:.0f} s)")


def write_report(
    out: Path, name: str, study: ablations.Study, runs: Sequence[ablations.Run]
) -> list[ablations.Run]:
    """Writes DIR/STUDY.md, .csv and .png from the finished runs. Returns the unfinished ones."""
    results = read_results(out)
    finished = [run for run in runs if run.key in results]
    numbers: dict[str, dict[int, dict]] = {
        row: {} for row in (*ablations.REFERENCE_ROWS, *study.rows)
    }
    for run in finished:
        numbers[run.row][run.seed] = results[run.key]["accuracy"]
    numbers = {row: seeds for row, seeds in numbers.items() if seeds}
    dates = ", ".join(sorted({results[run.key]["date"] for run in finished}))
    text = [f"### {name}: {study.about}", "", f"    python {shlex.join(sys.argv)}", ""]
    text += [f"{dates}; {len(finished)} of {len(runs)} runs. Paper: {study.paper}.", ""]
    if numbers:
        text += [ablations.table(ablations.means(numbers), "accuracy, %"), ""]
    trained = {row: seeds for row, seeds in numbers.items() if row in study.rows}
    baseline = next(iter(study.rows))
    if differences := ablations.differences(trained, baseline):
        text += [ablations.table(differences, f"minus {baseline}", sign="+"), ""]
        charts.differences(differences, out / f"{name}.png", f"{name}: minus {baseline}")
        result_tables.write_study(out / f"{name}.csv", ablations.means(numbers), differences)
    (out / f"{name}.md").write_text("\n".join(text))
    print("\n".join(["", *text]))
    return [run for run in runs if run.key not in results]


def main():
    parser = cli.parser(__doc__, TrainConfig)
    parser.add_argument("study", help="name; a wrong one lists them")
    parser.add_argument("--out", required=True, type=cli.local_path, help="output directory")
    parser.add_argument("--seeds", type=int, default=5, help="runs per row")
    parser.add_argument("--images", default="digits", choices=image_sets.SETS, help="image set")
    parser.add_argument("--table", action="store_true", help="report finished runs, train nothing")
    argv = sys.argv[1:]
    if not any(word.partition("=")[0] == "--config" for word in argv):
        argv = [f"--config={ROOT}/configs/study.py", *argv]
    args, base = cli.parse(parser, TrainConfig, argv)
    studies, out = ablations.studies(base), args.out.resolve()
    schema.check_choice("the study", args.study, studies)
    study = studies[args.study]
    runs = ablations.runs(study, base, range(args.seeds))
    for run in runs:
        if run.changes is not None:
            ablations.config_of(run, base, out)  # raises before anything is written
    output_paths.directory(args.out)
    multihost.start(base.hosts, base.platform)
    preemption.raise_on_sigterm()
    if not args.table:
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
        with try_lock(out / "prepare.lock", wait=True):
            check_settings(out, base, args.images)
            images = small_images.prepare(out, args.images, base, ablations.views(study, base))
            results = read_results(out)
            todo = [run for run in runs if run.key not in results]
            seconds = ablation_runs.remaining_seconds(todo, base, out, images, results)
        say(f"{len(runs)} runs, {len(todo)} to do: about {progress.duration(seconds)} alone")
        execute_all(todo, base, out, images)
    if unfinished := write_report(out, args.study, study, runs):
        print(f"{len(unfinished)} runs are not finished; next: the same command again")
    else:
        print(f"next: look at {out / args.study}.md and .png")


if __name__ == "__main__":
    cli.run(main)
