"""What is measured while a classifier trains: top-1 and top-5 accuracy, resized in both ways."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import bad_records, pipeline, records, sharding, views

# Metric suffix → whether both sides are resized alike, as the official code has it.
RESIZES = {"": False, "_squash": True}


def periodic(task, mesh) -> list[Callable]:
    """The evaluators that a config names, each params → {metric: value}."""
    return [accuracy(task, mesh)] if task.config.evals.heldout else []


def accuracy(task, mesh) -> Callable:
    """Shares of right answers among all held-out examples, each counted once."""
    config = task.config
    batch_size, size = config.evals.batch_size, config.model.image_size
    resize = config.classify.resize or (size * 256 // 224 if size <= 224 else size)
    rows = sharding.process_rows(mesh, batch_size)
    source = records.Split(config.evals.heldout, config.evals.heldout_split)
    pipeline.require_labels(source, config.classify)
    length = min(len(source), config.evals.most or len(source))
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))

    def load(index):
        record = source[index]
        image = bad_records.picture(source, index, record)
        crops = {
            f"image{suffix}": views.centre_crop(image, resize, size, squash=squash)
            for suffix, squash in RESIZES.items()
        }
        return crops | {"label": np.int32(record["label"])}

    @jax.jit
    def add(totals, params, frozen, batch):
        seen = {}
        for suffix in RESIZES:
            logits = task.logits(params, frozen, batch[f"image{suffix}"])
            own = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)
            place = (~(logits < own)).sum(axis=1)  # 1 for the largest; NaN is never right
            for k in (1, 5):
                seen[f"val/top{k}{suffix}"] = ((place <= k) & batch["valid"]).sum()
        return jax.tree.map(jnp.add, totals, seen)

    def evaluate(params) -> dict[str, float]:
        names = [f"val/top{k}{suffix}" for suffix in RESIZES for k in (1, 5)]
        totals = dict.fromkeys(names, jnp.zeros((), jnp.int32))
        for local in pipeline.eval_batches(load, length, batch_size, rows=rows):
            batch = sharding.global_batch(mesh, batch_size, local)
            totals = add(totals, params, frozen, batch)
        return {name: int(hits) / length for name, hits in totals.items()}

    return evaluate
