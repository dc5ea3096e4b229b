"""What is measured while pretraining, the loss on held-out data and a small kNN, and drawn."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import batching, heads, maps, pictures, records, sharding, vit
from dgpt_jax.evals import features, knn

POOLINGS = ("cls", "mean")  # features of kNN


def periodic(task, mesh) -> list[Callable]:
    """The evaluators that a config names, each params → {metric: value}."""
    evaluators = []
    if task.config.evals.heldout:
        evaluators.append(heldout_loss(task, mesh))
    if task.config.evals.knn:
        evaluators.append(knn_accuracy(task, mesh))
    return evaluators


def measured(task) -> list[str]:
    """The metrics that `periodic` gives."""
    evals = task.config.evals
    losses = [f"heldout/{name}" for name in task.weights] if evals.heldout else []
    return losses + ([f"knn/{pooling}" for pooling in POOLINGS] if evals.knn else [])


def recorded(task, workdir) -> list[str]:
    """Nothing: held-out losses are compared within a run."""
    return []


def heldout_loss(task, mesh) -> Callable:
    """Mean of each loss part over all held-out examples, each counted once."""
    batch_size = task.config.evals.batch_size
    rows = sharding.process_rows(mesh, batch_size)
    load, length = task.heldout()
    length = min(length, task.config.evals.most or length)
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))

    @jax.jit
    def add(totals, params, frozen, batch):
        _, parts = task.loss(params, frozen, batch)
        seen = {name: jnp.where(batch["valid"], x, 0).sum() for name, x in parts.items()}
        return jax.tree.map(jnp.add, totals, seen)

    def evaluate(params) -> dict[str, float]:
        totals = {name: jnp.zeros(()) for name in task.weights}
        threads = task.config.evals.threads
        for local in batching.eval_batches(load, length, batch_size, rows=rows, threads=threads):
            batch = sharding.global_batch(mesh, batch_size, local)
            totals = add(totals, params, frozen, batch)
        return {f"heldout/{name}": float(x) / length for name, x in totals.items()}

    return evaluate


def painter(task, mesh) -> Callable | None:
    """params → what to call, later and elsewhere, for {name: picture}: what is predicted of some
    held-out examples (config.evals.pictures), beside the teacher's tokens."""
    config = task.config
    if not (config.evals.heldout and config.evals.pictures) or config.data.targets == "pixels":
        return None
    load, length = task.heldout()
    count = min(config.evals.pictures, length)
    examples = [load(i * length // count) for i in range(count)]  # they may be sorted by class
    local = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    where, shape = sharding.replicated(mesh), config.model.segments
    batch, frozen = jax.device_put((local, task.frozen), where)

    @partial(jax.jit, out_shardings=where)
    def predict(params, frozen, batch):
        tokens, cls = task.tokens(frozen, batch), task.target.cls
        given = params, batch["image"], tokens, batch["order"]
        return maps.aligned(task.module, config.model, *given, cls=cls)

    def draw(pairs):
        found = maps.in_place(pairs, local["order"], shape)
        rows = pictures.prediction_rows(found, local["image"], local["order"], shape)
        return {"predictions": pictures.sheet(rows)}

    return lambda params: partial(draw, predict(params, frozen, batch))


def knn_accuracy(task, mesh) -> Callable:
    """kNN accuracy (k = 20) of frozen CLS and mean features on a labelled image dataset."""
    config, model = task.config.evals, task.config.model
    train = features.Records(records.Split(config.knn, config.knn_train))
    test = features.Records(records.Split(config.knn, config.knn_test))
    module = heads.classifier(model, "cls", dtype=task.config.dtype)

    def encode(encoder_params, pictures):
        variables = {"params": heads.from_pretrained(encoder_params, model)}
        images = vit.normalise(pictures)
        return module.apply(variables, images, POOLINGS, method="pooled")

    extract = features.Extractor(
        encode, mesh, batch_size=config.batch_size, most=config.most, threads=config.threads
    )
    view = features.centre_view(model.image_size, config.knn_resize, squash=False)

    def evaluate(params) -> dict[str, float]:
        banks = [extract(params["encoder"], source, view) for source in (train, test)]
        return {
            f"knn/{pooling}": knn.correct(banks[0][pooling], test_bank, ks=(20,))[20]
            / len(test_bank)
            for pooling, test_bank in banks[1].items()
        }

    return evaluate
