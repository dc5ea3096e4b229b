"""Training and evaluation of single runs of an ablation study."""

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dgpt_jax import train
from dgpt_jax.config import TrainConfig, durations
from dgpt_jax.evals import ablations
from dgpt_jax.examples import small_images
from dgpt_jax.examples.small_images import Encoder, Images, say
from dgpt_jax.models import teacher_vit
from dgpt_jax.monitoring import metrics_log
from dgpt_jax.weights import api
from dgpt_jax.weights import teacher_loading as teacher_weights

SHORT_RUN_STEPS = 40
LOGGED_METRICS = ("loss", "next", "visible", "direct", "images_per_second")


@partial(jax.jit, static_argnums=0)
def _mean_features(model, params, images):
    return api.PretrainedEncoder(model, params, "").features(images, "mean")


def encoder_features(encoder: api.PretrainedEncoder) -> Encoder:
    """Mean features of images as a function, compiled once for all encoders of one architecture."""
    params = jax.tree.map(jnp.asarray, encoder.params)
    return partial(_mean_features, encoder.model, params)


def reference_features(run: ablations.Run, base: TrainConfig, out: Path) -> Encoder:
    """Feature function of a row that is not trained."""
    if run.row == "raw pixels":
        return small_images.raw_pixels
    if run.row == "untrained encoder":
        return encoder_features(api.untrained(base.model, run.seed))
    teacher = teacher_weights.load(str(out / "teacher"))
    return jax.jit(lambda x: teacher_vit.teacher_tokens(teacher.tower, teacher.params, x)[:, 0])


def measure(encode: Encoder, images: Images) -> dict[str, float]:
    """{"knn 5": accuracy in percent, averaged over label subsets, …}"""
    values = small_images.accuracies(small_images.feature_banks(encode, images))
    return {f"{protocol} {shots}": float(np.mean(x)) for (protocol, shots), x in values.items()}


def train_encoder(config: TrainConfig, directory: Path) -> api.PretrainedEncoder:
    """Trains or resumes a run, logging to log.txt. Exits the process if training was preempted."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
        code = train.train(config, epath.Path(directory))
    if code:
        say(f"stopped, {directory} is saved; next: the same command continues")
        sys.exit(code)
    return api.load_encoder(directory)


def run_directory(run: ablations.Run, out: Path) -> Path:
    return out / "runs" / run.name / f"seed{run.seed}"


def execute(run: ablations.Run, base: TrainConfig, out: Path, images: Images) -> dict[str, Any]:
    """Trains and evaluates a run; reference rows are not trained. Returns its line of results."""
    started, line = time.monotonic(), {"run": run.name, "seed": run.seed}
    if run.changes is None:
        encode = reference_features(run, base, out)
    else:
        directory = run_directory(run, out)
        encode = encoder_features(train_encoder(ablations.config_of(run, base, out), directory))
        curves = metrics_log.read(directory).curves
        last = {name: curves[name].point(-1)[0] for name in LOGGED_METRICS if name in curves}
        line |= {"changes": dict(run.changes), "last": last}
    line["accuracy"] = measure(encode, images)
    return line | {"seconds": time.monotonic() - started, "date": time.strftime("%Y-%m-%d")}


def remaining_seconds(
    todo: list[ablations.Run], base: TrainConfig, out: Path, images: Images,
    results: Mapping[tuple[str, int], Mapping],
) -> float:  # fmt: skip
    """Estimate from finished runs of the same name, else from all, else from a short run."""
    trainings = [run for run in todo if run.changes is not None]
    times: dict[str, list[float]] = {}
    for line in results.values():
        if "changes" in line:
            times.setdefault(line["run"], []).append(line["seconds"])
    if trainings and not times:
        say(f"running {SHORT_RUN_STEPS} steps to estimate the duration …")
        times["short"] = [short_run(trainings[0], base, out, images)]
    typical = float(np.median([x for values in times.values() for x in values] or [0]))
    return sum(float(np.median(times.get(run.name, typical))) for run in trainings)


def short_run(run: ablations.Run, base: TrainConfig, out: Path, images: Images) -> float:
    """Seconds that the full run would take, compilation included."""
    config, directory = ablations.config_of(run, base, out), out / "short"
    steps = durations.steps(
        config.total,
        "config.total",
        batch_size=config.batch_size,
        examples=len(images["train"][0]),
        least=1,
    )
    shutil.rmtree(directory, ignore_errors=True)
    started = time.monotonic()
    optim = dataclasses.replace(config.optim, warmup="0 steps")  # may exceed the short run
    total = f"{min(SHORT_RUN_STEPS, steps)} steps"
    short = dataclasses.replace(config, total=total, optim=optim)
    measure(encoder_features(train_encoder(short, directory)), images)
    elapsed = time.monotonic() - started
    rate, _ = metrics_log.read(directory).curves["images_per_second"].point(-1)
    shutil.rmtree(directory)
    return elapsed + max(0, steps - SHORT_RUN_STEPS) * config.batch_size / rate
