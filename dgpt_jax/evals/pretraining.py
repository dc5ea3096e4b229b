"""What is measured while pretraining: the loss on held-out data, a small kNN."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dgpt_jax import heads, pipeline, records, sharding, vit
from dgpt_jax.evals import features, knn


def periodic(task, mesh) -> list[Callable]:
    """The evaluators that a config names, each params → {metric: value}."""
    evaluators = []
    if task.config.evals.heldout:
        evaluators.append(heldout_loss(task, mesh))
    if task.config.evals.knn:
        evaluators.append(knn_accuracy(task, mesh))
    return evaluators


def recorded(task, workdir) -> list[str]:
    """Nothing: held-out losses are compared within a run."""
    return []


def heldout_loss(task, mesh) -> Callable:
    """Mean of each loss part over all held-out examples, each counted once."""
    batch_size = task.config.evals.batch_size
    rows = sharding.process_rows(mesh, batch_size)
    load, length = task.heldout()
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))

    @jax.jit
    def add(totals, params, frozen, batch):
        _, parts = task.loss(params, frozen, batch)
        seen = {name: jnp.where(batch["valid"], x, 0).sum() for name, x in parts.items()}
        return jax.tree.map(jnp.add, totals, seen)

    def evaluate(params) -> dict[str, float]:
        totals = {name: jnp.zeros(()) for name in task.weights}
        for local in pipeline.eval_batches(load, length, batch_size, rows=rows):
            batch = sharding.global_batch(mesh, batch_size, local)
            totals = add(totals, params, frozen, batch)
        return {f"heldout/{name}": float(x) / length for name, x in totals.items()}

    return evaluate


def knn_accuracy(task, mesh) -> Callable:
    """kNN accuracy (k = 20) of frozen CLS and mean features on a labelled image dataset."""
    config, model = task.config.evals, task.config.model
    train = features.Records(records.Split(config.knn, config.knn_train))
    test = features.Records(records.Split(config.knn, config.knn_test))
    module = heads.classifier(model, "cls", dtype=task.config.dtype)

    def encode(encoder_params, pictures):
        variables = {"params": heads.from_pretrained(encoder_params, model)}
        images = vit.normalise(pictures)
        return module.apply(variables, images, ("cls", "mean"), method="pooled")

    extract = features.Extractor(encode, mesh, batch_size=config.batch_size)
    view = features.centre_view(model.image_size, config.knn_resize, squash=False)

    def evaluate(params) -> dict[str, float]:
        banks = [extract(params["encoder"], source, view) for source in (train, test)]
        return {
            f"knn/{pooling}": knn.correct(banks[0][pooling], test_bank, ks=(20,))[20] / len(test)
            for pooling, test_bank in banks[1].items()
        }

    return evaluate
