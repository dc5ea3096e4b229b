"""Top-1 and top-5 accuracy while a classifier trains, for both ways of resizing.

Top-5 is omitted for five classes or fewer, where it is always 100 %. At the end the last and the
best evaluation become rows of results.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.config import TrainConfig
from dgpt_jax.data import bad_records, dataset, image_ops, loader
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import feature_bank, results
from dgpt_jax.monitoring import metrics_log
from dgpt_jax.storage import tfds_dataset

if TYPE_CHECKING:  # tasks are a later package
    from dgpt_jax.training.tasks.classify import ClassificationTask

# Metric suffix → squash: resize both sides to the same length, as the official code does.
RESIZES = {"": False, "_squash": True}


def make_evaluators(
    task: "ClassificationTask", mesh: jax.sharding.Mesh
) -> list[Callable[[Any], dict[str, float]]]:
    """Evaluators that the config enables, each params → {metric: value}."""
    return [accuracy(task, mesh)] if task.config.evals.heldout else []


def metric_names(task: "ClassificationTask") -> list[str]:
    """Names of the metrics of `make_evaluators`."""
    if not task.config.evals.heldout:
        return []
    heads = [f"val/top1{suffix}/{head}" for suffix in RESIZES for head in task.heads]
    return [f"val/top{k}{suffix}" for suffix in RESIZES for k in _ks(task.config)] + heads


def _ks(config: TrainConfig) -> tuple[int, ...]:
    """The k of the top-k accuracies."""
    return (1, 5) if config.classify.num_classes > 5 else (1,)


# config.classify.trainable or head → protocol name in results, its source.
PROTOCOLS = {
    "all": ("finetune", "MAE's and BEiT's, as the official D-iGPT main_finetune.py has it"),
    "linear": ("linear_mae", "facebookresearch/mae main_linprobe.py"),
    "dinov2": ("linear_dinov2", "facebookresearch/dinov2 dinov2/eval/linear.py"),
    "attentive": ("attentive_aim", "arXiv 2401.08541, apple/ml-aim aim-v1"),
}


def resize_of(config: TrainConfig) -> int:
    """Pixels of the shorter side, or of both, before the center crop."""
    size = config.model.image_size
    return config.classify.resize or (size * 256 // 224 if size <= 224 else size)


def accuracy(
    task: "ClassificationTask", mesh: jax.sharding.Mesh
) -> Callable[[Any], dict[str, float]]:
    """Evaluator of the accuracy on all held-out examples, each counted once.

    For a task with several heads, val/top1/HEAD is that of each head, the other metrics are those
    of the head with the best val/top1 on these examples. Non-finite logits count as wrong; the
    evaluator raises UserError if the only or best head has any.
    """
    config = task.config
    ks = _ks(config)
    batch_size = config.evals.batch_size
    rows = sharding.process_rows(mesh, batch_size)
    source = tfds_dataset.Split(config.evals.heldout, config.evals.heldout_split)
    dataset.require_labels(source, config.classify)
    if task.examples is not None:  # None: the task does not train
        dataset.require_same_classes(source, task.examples.sources.splits[0])
    length = _count(source, config)
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
    load = partial(_load, source, resize_of(config), config.model.image_size)

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def add(totals, params, frozen, batch):
        counts = {}
        for suffix in RESIZES:
            logits = task.logits(params, frozen, batch[f"image{suffix}"])
            label = jnp.broadcast_to(batch["label"][:, None], (*logits.shape[:-1], 1))
            target = jnp.take_along_axis(logits, label, axis=-1)
            rank = (~(logits < target)).sum(axis=-1)  # 1 for the largest; NaN counts as wrong
            bad = ~jnp.isfinite(logits).all(axis=-1)
            counts[f"bad{suffix}"] = (bad & batch["valid"]).sum(axis=-1)
            for k in ks:
                counts[f"val/top{k}{suffix}"] = ((rank <= k) & batch["valid"]).sum(axis=-1)
        return jax.tree.map(jnp.add, totals, counts)

    def evaluate(params) -> dict[str, float]:
        names = [name for name in metric_names(task) if not metrics_log.is_detail(name)]
        names += [f"bad{suffix}" for suffix in RESIZES]
        shape = (len(task.heads),) if task.heads else ()
        totals = dict.fromkeys(names, jnp.zeros(shape, jnp.int32))
        threads = config.evals.threads
        for local in loader.eval_batches(load, length, batch_size, rows=rows, threads=threads):
            labels = local["label"][local["valid"]]
            dataset.check_labels(labels, source, config.classify.num_classes)
            batch = sharding.global_batch(mesh, batch_size, local)
            totals = add(totals, params, frozen, batch)
        totals = {name: np.asarray(x) for name, x in totals.items()}
        best = int(totals["val/top1"].argmax()) if task.heads else ()
        for suffix in RESIZES:
            bad = int(totals.pop(f"bad{suffix}")[best])
            feature_bank.refuse_not_finite(bad, length, f"{source}: logits")
        return _shares(totals, task, length)

    return evaluate


def _load(source: tfds_dataset.Split, resize: int, size: int, index: int) -> dict[str, np.ndarray]:
    """The label of an example, and an image (size, size, 3) for each way of resizing."""
    record = source[index]
    image = bad_records.decode_image(source, index, record)
    crops = {
        f"image{suffix}": image_ops.center_crop(image, resize, size, squash=squash)
        for suffix, squash in RESIZES.items()
    }
    return crops | {"label": np.asarray(record["label"], np.int32)}


def _count(source: tfds_dataset.Split, config: TrainConfig) -> int:
    """Number of evaluated examples."""
    return min(len(source), config.evals.max_examples or len(source))


def _shares(hits: dict[str, np.ndarray], task, count: int) -> dict[str, float]:
    if not task.heads:
        return {name: int(x) / count for name, x in hits.items()}
    best = int(hits["val/top1"].argmax())
    shares = {name: int(x[best]) / count for name, x in hits.items()}
    for suffix in RESIZES:
        each = zip(task.heads, hits[f"val/top1{suffix}"], strict=True)
        shares |= {f"val/top1{suffix}/{head}": int(x) / count for head, x in each}
    return shares


def result_rows(task: "ClassificationTask", workdir: Path | str) -> list[dict]:
    """Rows of results (evals/results.py) from a run's metrics: for each resizing the last and the
    best evaluation; of a grid of heads also every head at the last one, as details."""
    config = task.config
    count = _count(tfds_dataset.Split(config.evals.heldout, config.evals.heldout_split), config)
    curves = {
        name: curve.finite().as_dict()
        for name, curve in metrics_log.read(workdir).curves.items()
        if name.startswith("val/")
    }
    identity, how = _protocol(config)
    by_head = "head, on the test images" if task.heads else ""
    by_epoch = f"epoch and {by_head}" if by_head else "epoch, on the test images"

    def row(curve, epoch, step, selection, extra):
        hits = round(curve[step] * count)
        fields = identity | {"epoch": epoch, "step": step} | extra
        return results.row(fields, hits, count, selection=selection or "none", how=how)

    def best_head(step) -> dict:
        heads = {head: curves[f"val/top1/{head}"][step] for head in task.heads}
        return {"head": max(heads, key=lambda head: heads[head])} if heads else {}

    rows = []
    for suffix, squash in RESIZES.items():
        curve, extra = curves.get(f"val/top1{suffix}"), {"squash": squash}
        if not curve:
            continue
        last, best = max(curve), max(curve, key=curve.__getitem__)
        rows.append(row(curve, "last", last, by_head, extra | best_head(last)))
        rows.append(row(curve, "best", best, by_epoch, extra | best_head(best)))
        for head in task.heads:
            head_curve = curves[f"val/top1{suffix}/{head}"]
            rows.append(row(head_curve, "last", last, "", extra | {"head": head, "detail": True}))
    return rows


def _protocol(config: TrainConfig) -> tuple[dict, dict]:
    """(identifying fields, `how`) of a training's rows."""
    cfg, optim = config.classify, config.optim
    name, source = PROTOCOLS["all" if cfg.trainable == "all" else cfg.head]
    features = {"dinov2": "last blocks", "attentive": "patches"}.get(cfg.head, cfg.pooling)
    identity = {
        "protocol": name,
        "data": tfds_dataset.open_builder(config.evals.heldout).info.name,
        "splits": f"{config.data.split} → {config.evals.heldout_split}",
        "features": cfg.pooling if cfg.trainable == "all" else features,
        "seed": config.seed,
        "resize": resize_of(config),
    }
    how = {
        "source": source,
        "path": results.location(config.evals.heldout),
        "weights": config.init.weights,
        "crop": config.model.image_size,
        "filter": "bicubic, antialiased",
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "total": config.total,
        "batch_size": config.batch_size,
        "optimizer": optim.kind,
        "blr": list(optim.base_lr_grid) or optim.blr,
        "ema": optim.ema,
    }
    return identity, how


def save_results(task: "ClassificationTask", workdir: Path | str) -> list[str]:
    """Writes the rows to a results file in the work directory; returns lines to print.

    Fine-tuned weights have a file per step, to which rows are added; a probe has one, which
    describes the encoder that it read.
    """
    if jax.process_index() or not task.config.evals.heldout:
        return []
    rows = result_rows(task, workdir)
    if not rows:
        return []
    if task.config.classify.trainable == "all":
        step = max(row["step"] for row in rows)
        path, weights = results.default_path(workdir, step), f"{workdir}, step {step}"
        save = results.merge
    else:
        path, weights = results.default_path(workdir, None), task.source
        save = results.write  # rows of this run alone
    try:
        save(path, weights, dataclasses.asdict(task.config.model), rows)
    except UserError as e:  # not an error of the training itself
        return [f"results were not written: {e}"]
    return [f"results are in {path}"]
