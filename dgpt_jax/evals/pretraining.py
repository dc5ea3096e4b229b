"""Evaluations while pretraining: loss on held-out data, a small kNN, and figures of predictions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.data import loader
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import feature_maps, features, figures, knn, label_free
from dgpt_jax.models import classifier, vit
from dgpt_jax.storage import tfds_dataset

if TYPE_CHECKING:  # tasks are a later package
    from dgpt_jax.training.tasks.pretrain import PretrainTask

POOLINGS = ("cls", "mean")  # of frozen features


def make_evaluators(
    task: "PretrainTask", mesh: jax.sharding.Mesh
) -> list[Callable[[Any], dict[str, float]]]:
    """Evaluators that the config enables, each params → {metric: value}."""
    evaluators = []
    if task.config.evals.heldout:
        evaluators.append(heldout_loss(task, mesh))
    if task.config.evals.knn:
        evaluators.append(knn_accuracy(task, mesh))
    if task.config.evals.label_free:
        evaluators.append(label_free_quality(task, mesh))
    return evaluators


def metric_names(task: "PretrainTask") -> list[str]:
    """Names of the metrics of `make_evaluators`."""
    evals = task.config.evals
    losses = [f"heldout/{name}" for name in task.weights] if evals.heldout else []
    groups = ["knn"] * bool(evals.knn) + ["rank", "agreement"] * bool(evals.label_free)
    return losses + [f"{group}/{pooling}" for group in groups for pooling in POOLINGS]


def save_results(task: "PretrainTask", workdir: Path | str) -> list[str]:
    """Writes nothing: held-out losses compare only within a run."""
    return []


def heldout_loss(
    task: "PretrainTask", mesh: jax.sharding.Mesh
) -> Callable[[Any], dict[str, float]]:
    """Evaluator of each loss term's mean over all held-out examples, each counted once."""
    batch_size = task.config.evals.batch_size
    rows = sharding.process_rows(mesh, batch_size)
    load, length = task.heldout()
    length = min(length, task.config.evals.max_examples or length)
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))

    @jax.jit
    def add(totals, params, frozen, batch):
        _, losses = task.loss(params, frozen, batch)
        sums = {name: jnp.where(batch["valid"], x, 0).sum() for name, x in losses.items()}
        return jax.tree.map(jnp.add, totals, sums)

    def evaluate(params) -> dict[str, float]:
        totals = {name: jnp.zeros(()) for name in task.weights}
        threads = task.config.evals.threads
        for local in loader.eval_batches(load, length, batch_size, rows=rows, threads=threads):
            batch = sharding.global_batch(mesh, batch_size, local)
            totals = add(totals, params, frozen, batch)
        return {f"heldout/{name}": float(x) / length for name, x in totals.items()}

    return evaluate


def prediction_figures(
    task: "PretrainTask", mesh: jax.sharding.Mesh
) -> Callable[[Any], Callable[[], dict[str, np.ndarray]]] | None:
    """Returns draw(params) → a callable, for any thread, of {name: figure}: predictions of some
    held-out examples (config.evals.figures) beside the teacher's tokens. None if disabled."""
    config = task.config
    if not (config.evals.heldout and config.evals.figures) or config.data.targets == "pixels":
        return None
    load, length = task.heldout()
    count = min(config.evals.figures, length)
    examples = [
        load(i * length // count) for i in range(count)
    ]  # spread: they may be sorted by class
    local = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    replicated, shape = sharding.replicated(mesh), config.model.segments
    batch, frozen = jax.device_put((local, task.frozen), replicated)

    @partial(jax.jit, out_shardings=replicated)
    def predict(params, frozen, batch):
        name, target = next(iter(task.targets.items()))
        tokens, cls = task.tokens(frozen, batch, name), target.cls
        images = vit.normalize(batch["image"], config.data.mean, config.data.std)
        inputs = images, tokens, batch["order"]
        return feature_maps.aligned(
            task.module, config.model, params, *inputs, cls=cls, teacher=name
        )

    def draw(pairs):
        maps = feature_maps.in_image_order(pairs, local["order"], shape)
        rows = figures.prediction_rows(maps, local["image"], local["order"], shape)
        return {"predictions": figures.sheet(rows)}

    return lambda params: partial(draw, predict(params, frozen, batch))


def knn_accuracy(
    task: "PretrainTask", mesh: jax.sharding.Mesh
) -> Callable[[Any], dict[str, float]]:
    """Evaluator of kNN (k = 20) on frozen CLS and mean features of a labeled image dataset."""
    config, model = task.config.evals, task.config.model
    train = features.RecordSource(tfds_dataset.Split(config.knn, config.knn_train))
    test = features.RecordSource(tfds_dataset.Split(config.knn, config.knn_test))
    extract = features.Extractor(
        _pooled_features(task),
        mesh,
        batch_size=config.batch_size,
        max_examples=config.max_examples,
        threads=config.threads,
    )
    view = features.center_view(model.image_size, config.knn_resize, squash=False)

    def evaluate(params) -> dict[str, float]:
        banks = [extract(_encoder(params), source, view) for source in (train, test)]
        return {
            f"knn/{pooling}": knn.correct(banks[0][pooling], test_bank, ks=(20,))[20]
            / len(test_bank)
            for pooling, test_bank in banks[1].items()
        }

    return evaluate


def label_free_quality(
    task: "PretrainTask", mesh: jax.sharding.Mesh
) -> Callable[[Any], dict[str, float]]:
    """Evaluator of the effective rank and the view agreement (label_free) of frozen CLS and mean
    features of the first config.evals.label_free held-out images. Adds a note to the task if there
    are fewer. Raises UserError without them."""
    config = task.config.evals
    if not config.heldout:
        raise UserError(
            "config.evals.label_free measures features of held-out images: set config.evals.heldout"
        )
    load, length = task.heldout()
    if length < config.label_free:
        task.notes += (
            f"config.evals.label_free={config.label_free}: there are {length} held-out images, and "
            f"all are used; agreement by chance is {1 / length:.2g}",
        )
    views = label_free.TwoViews(load, length, flip=task.config.data.flip)
    pooled = _pooled_features(task)

    def encode(params, images):
        named = zip(("image", "crop"), jnp.moveaxis(images, 1, 0), strict=True)
        return {
            f"{view}/{pooling}": rows
            for view, one in named
            for pooling, rows in pooled(params, one).items()
        }

    extract = features.Extractor(
        encode,
        mesh,
        batch_size=config.batch_size,
        max_examples=config.label_free,
        threads=config.threads,
    )

    def evaluate(params) -> dict[str, float]:
        banks = extract(_encoder(params), views, lambda pair: pair)
        ranks = {f"rank/{p}": label_free.effective_rank(banks[f"image/{p}"]) for p in POOLINGS}
        return ranks | {
            f"agreement/{p}": label_free.view_agreement(banks[f"image/{p}"], banks[f"crop/{p}"])
            for p in POOLINGS
        }

    return evaluate


def _encoder(params: Any) -> dict[str, Any]:
    """The part of the parameters of pretraining that features need."""
    return {name: params[name] for name in ("encoder", "pos_embed") if name in params}


def _pooled_features(task: "PretrainTask") -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """Returns encode(parameters, uint8 (B, size, size, 3)) → {pooling: (B, D)}."""
    model, data = task.config.model, task.config.data
    module: Any = classifier.classifier(model, "cls", dtype=task.config.dtype)

    def encode(params, images):
        variables = {"params": classifier.classifier_params_from_pretraining(params, model)}
        images = vit.normalize(images, data.mean, data.std)
        return module.apply(variables, images, POOLINGS, method="pooled")

    return encode
