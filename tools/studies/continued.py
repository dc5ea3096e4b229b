"""Continued pretraining on glyphs from an encoder trained on digits, against from scratch.

    python -m tools.studies.continued --out=DIR [--seeds=3] [--config.total="800 steps"]

For each seed: pretrains on digits (DIGITS_STEPS steps), then on glyphs from random parameters and
from the encoder of the digits run of that seed, with fresh decoders and the same config. The loss
on glyphs of held-out fonts is logged every 4 % of the steps. Writes DIR/continued.csv (steps until
the held-out loss is that which the run from scratch has after some of its steps),
DIR/curve_continued.csv and .png, and DIR/continued_accuracy.csv (kNN and linear probes); copied to
docs/results/data they are the tables of docs/results/ablations.md. DIR/results.jsonl has the
finished runs: the same command resumes after a kill; a second one in parallel shares the seeds.

Prediction, written before the runs: the loss that the run from scratch has after a quarter of its
steps is reached in 30 % fewer steps, after half in 20 % fewer, at the end in 10 % fewer with an
interval that holds 0. kNN with 5 labels per class is 2 to 5 points higher, the linear probe with
all labels within 2 points.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgpt_jax import cli
from dgpt_jax.config import TrainConfig
from dgpt_jax.distributed import multihost, preemption
from dgpt_jax.evals import ablations
from dgpt_jax.examples import small_images
from dgpt_jax.examples.small_images import Images, say
from dgpt_jax.monitoring import metrics_log
from dgpt_jax.storage import output_paths
from dgpt_jax.tokens import build
from tools.studies import ablate, ablation_runs, curves

ROOT = Path(__file__).resolve().parents[2]
DIGITS_STEPS = 800
GLYPHS_STEPS = 800
SCRATCH, CONTINUED, DIGITS = "from scratch", "from digits", "digits"
ROWS = (SCRATCH, CONTINUED)
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the steps from scratch
LOSSES = ("heldout/next", "heldout/visible")  # the held-out loss is their mean
Curve = tuple[np.ndarray, np.ndarray]  # steps, held-out losses


def prepare(out: Path, base: TrainConfig) -> Images:
    """Creates images, teacher and stores of both sets below `out`. Returns the glyphs."""
    views = {"tokens": base.data.views or 1}
    small_images.prepare(out / "digits", "digits", base, views)
    images = small_images.prepare(out / "glyphs", "glyphs", base, views)
    heldout = out / "glyphs/tokens_test"
    if not (heldout / "dataset_info.json").exists():
        say("building the store of held-out fonts")
        store = small_images.store_config(out / "glyphs", "tokens", 1, base)
        codec = str(out / "glyphs/tokens")
        store = dataclasses.replace(store, split="test", codec_from=codec)
        with (out / "heldout.log").open("a") as log, contextlib.redirect_stderr(log):
            build.build(store, heldout)
    return images


def run_directory(out: Path, row: str, seed: int) -> Path:
    return out / "runs" / row.replace(" ", "_") / f"seed{seed}"


def config_of(row: str, seed: int, base: TrainConfig, out: Path) -> TrainConfig:
    """Config of a training of ROWS, or of DIGITS."""
    images = "digits" if row == DIGITS else "glyphs"
    data = dataclasses.replace(base.data, path=str(out / images / "tokens"))
    config = dataclasses.replace(base, seed=seed, data=data)
    if row == DIGITS:
        return dataclasses.replace(config, total=f"{DIGITS_STEPS} steps")
    evals = dataclasses.replace(
        base.evals, heldout=str(out / "glyphs/tokens_test"), every="4%", figures=0
    )
    weights = str(run_directory(out, DIGITS, seed)) if row == CONTINUED else ""
    init = dataclasses.replace(base.init, weights=weights, decoders="fresh")
    return dataclasses.replace(config, evals=evals, init=init).resolved()


def heldout_curve(directory: Path) -> Curve:
    """Steps and held-out losses of a run."""
    log = metrics_log.read(directory)
    steps, _ = log.arrays(LOSSES[0])
    return steps, np.mean([log.arrays(name)[1] for name in LOSSES], axis=0)


def execute(row: str, seed: int, base: TrainConfig, out: Path, images: Images) -> dict[str, Any]:
    """Trains a run, or resumes it. Returns its line of results."""
    started, directory = time.process_time(), run_directory(out, row, seed)
    encoder = ablation_runs.train_encoder(config_of(row, seed, base, out), directory)
    line: dict[str, Any] = {"run": row, "seed": seed}
    if row != DIGITS:
        steps, losses = heldout_curve(directory)
        line |= {"steps": steps.tolist(), "heldout": losses.tolist()}
        line["accuracy"] = ablation_runs.measure(ablation_runs.encoder_features(encoder), images)
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return line | {"cpu_seconds": time.process_time() - started}


def execute_seed(seed: int, base: TrainConfig, out: Path, images: Images):
    """Executes the runs of a seed that are not finished, and writes the report."""
    for row in (DIGITS, *ROWS):
        if (row, seed) not in ablate.read_results(out):
            line = execute(row, seed, base, out, images)
            ablate.append_result(out, line)
            say(f"{row}, seed {seed}: {line['cpu_seconds']:.0f} s of CPU")
    write_report(out, ablate.read_results(out).values())


def steps_to(curve: Curve, loss: float) -> float:
    """First step at which a curve is at most `loss`, linear between its points; NaN if never. A
    curve that begins below it has its first step, an upper bound."""
    steps, losses = curve
    below = np.flatnonzero(losses <= loss)
    if not len(below):
        return math.nan
    if (i := int(below[0])) == 0:
        return float(steps[0])
    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def cell(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Text of the mean and the half width of Student's 95 % interval; "not reached" if a value is
    NaN."""
    if missing := sum(math.isnan(x) for x in values):
        return f"not reached in {missing} of {len(values)}"
    mean, half = ablations.interval(values)
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def reach_table(pairs: Sequence[tuple[Curve, Curve]]) -> list[list[str]]:
    """Lines of continued.csv of (from scratch, continued) of each seed."""
    lines = [["loss of the run from scratch after", "held-out loss", *(f"steps {x}" for x in ROWS),
              "fewer steps, %"]]  # fmt: skip
    for share in SHARES:
        losses, scratch, continued = [], [], []
        for first, second in pairs:
            at = int(np.searchsorted(first[0], share * first[0][-1]))
            losses.append(float(first[1][at]))
            scratch.append(steps_to(first, losses[-1]))
            continued.append(steps_to(second, losses[-1]))
        saved = [100 * (1 - b / a) for a, b in zip(scratch, continued, strict=True)]
        cells = cell(losses, 4), cell(scratch, 0), cell(continued, 0), cell(saved, 1)
        lines.append([f"{share:.0%} of its steps", *cells])
    return lines


def curve_table(pairs: Sequence[tuple[Curve, Curve]]) -> list[list[str]]:
    """Lines of curve_continued.csv: mean held-out losses, and their differences paired by seed."""
    head = ["step", *(f"held-out loss: {row}" for row in ROWS)]
    lines = [[*head, f"difference: {CONTINUED} minus {SCRATCH}", "difference: ±"]]
    for i, step in enumerate(pairs[0][0][0]):
        both = np.array([[curve[1][i] for curve in pair] for pair in pairs])
        difference, half = ablations.interval((both[:, 1] - both[:, 0]).tolist())
        numbers = (f"{x:.4f}" for x in both.mean(0))
        lines.append([str(step), *numbers, f"{difference:.4f}", f"{half:.4f}"])
    return lines


def write_report(out: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Writes the tables and the figure from the seeds of which both runs are finished. Returns the
    number of these seeds."""
    finished = {(line["run"], line["seed"]): line for line in lines if line["run"] in ROWS}
    seeds = sorted(s for row, s in finished if row == SCRATCH and (CONTINUED, s) in finished)
    if not seeds:
        return 0
    pairs = []
    for seed in seeds:
        first, second = (
            (np.array(finished[row, seed]["steps"]), np.array(finished[row, seed]["heldout"]))
            for row in ROWS
        )
        pairs.append((first, second))
    curves.write(out / "continued.csv", reach_table(pairs))
    curves.write(out / "curve_continued.csv", curve_table(pairs))
    curves.draw(out / "curve_continued.csv", out / "curve_continued.png")
    numbers = {row: {s: finished[row, s]["accuracy"] for s in seeds} for row in ROWS}
    curves.write_accuracies(out / "continued_accuracy.csv", numbers)
    return len(seeds)


def main():
    parser = cli.parser(__doc__, TrainConfig)
    parser.add_argument("--out", required=True, type=cli.local_path, help="output directory")
    parser.add_argument("--seeds", type=int, least=1, default=3, help="runs per row")
    args, base = cli.parse(parser, TrainConfig, curves.with_defaults(
        f"--config={ROOT}/configs/study.py", f"--config.total={GLYPHS_STEPS} steps"
    ))  # fmt: skip
    output_paths.directory(args.out)
    out = args.out.resolve()
    multihost.start(base.hosts, base.platform)
    preemption.raise_on_sigterm()
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    with ablate.try_lock(out / "prepare.lock", wait=True):
        ablate.check_settings(out, base, "digits, glyphs")
        images = prepare(out, base)
    for seed in range(args.seeds):
        with ablate.try_lock(out / "locks" / f"seed{seed}") as locked:
            if locked:
                execute_seed(seed, base, out, images)
    finished = write_report(out, ablate.read_results(out).values())
    if finished < args.seeds:
        print(f"{finished} of {args.seeds} seeds are finished; next: the same command again")
    else:
        print(f"next: look at {args.out}/continued.csv and curve_continued.png")


if __name__ == "__main__":
    cli.run(main)
