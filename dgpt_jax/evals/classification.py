"""What is measured while a classifier trains: top-1 and top-5 accuracy, resized in both ways.

Top-5 is left out of five classes or fewer, where every answer is right.

At the end it becomes rows of results: of the last evaluation and of the best.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import bad_records, batching, pipeline, records, run_log, sharding, views, vit
from dgpt_jax.evals import features, results
from dgpt_jax.schema import UserError

# Metric suffix → whether both sides are resized alike, as the official code has it.
RESIZES = {"": False, "_squash": True}


def periodic(task, mesh) -> list[Callable]:
    """The evaluators that a config names, each params → {metric: value}."""
    return [accuracy(task, mesh)] if task.config.evals.heldout else []


def measured(task) -> list[str]:
    """The metrics that `periodic` gives."""
    if not task.config.evals.heldout:
        return []
    heads = [f"val/top1{suffix}/{head}" for suffix in RESIZES for head in task.heads]
    return [f"val/top{k}{suffix}" for suffix in RESIZES for k in _ks(task.config)] + heads


def _ks(config) -> tuple[int, ...]:
    """The k of the top-k accuracies: of five classes or fewer the top-5 says nothing."""
    return (1, 5) if config.classify.num_classes > 5 else (1,)


# What is trained, and by whose protocol: the name in results, its source.
PROTOCOLS = {
    "all": ("finetune", "MAE's and BEiT's, as the official D-iGPT main_finetune.py has it"),
    "linear": ("linear_mae", "facebookresearch/mae main_linprobe.py"),
    "dinov2": ("linear_dinov2", "facebookresearch/dinov2 dinov2/eval/linear.py"),
    "attentive": ("attentive_aim", "arXiv 2401.08541, apple/ml-aim aim-v1"),
}


def resize_of(config) -> int:
    """Pixels of the shorter side, or both, before the centre crop."""
    size = config.model.image_size
    return config.classify.resize or (size * 256 // 224 if size <= 224 else size)


def accuracy(task, mesh) -> Callable:
    """Shares of right answers among all held-out examples, each counted once.

    Where a task has heads, val/top1/HEAD is that of each, and the others are of the head whose
    val/top1 is best: chosen by these examples. An answer that is not finite is never right; where
    the weights, or the best head, give any, UserError is raised.
    """
    config = task.config
    ks = _ks(config)
    batch_size, size = config.evals.batch_size, config.model.image_size
    resize = resize_of(config)
    rows = sharding.process_rows(mesh, batch_size)
    source = records.Split(config.evals.heldout, config.evals.heldout_split)
    pipeline.require_labels(source, config.classify)
    if task.examples is not None:  # a task that was made to train
        pipeline.require_same_classes(source, task.examples.sources.splits[0])
    length = _count(source, config)
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))

    def load(index):
        record = source[index]
        image = bad_records.picture(source, index, record)
        crops = {
            f"image{suffix}": views.centre_crop(image, resize, size, squash=squash)
            for suffix, squash in RESIZES.items()
        }
        return crops | {"label": np.int32(record["label"])}

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def add(totals, params, frozen, batch):
        seen = {}
        for suffix in RESIZES:
            logits = task.logits(params, frozen, batch[f"image{suffix}"])
            label = jnp.broadcast_to(batch["label"][:, None], (*logits.shape[:-1], 1))
            own = jnp.take_along_axis(logits, label, axis=-1)
            place = (~(logits < own)).sum(axis=-1)  # 1 for the largest; NaN is never right
            bad = ~jnp.isfinite(logits).all(axis=-1)
            seen[f"bad{suffix}"] = (bad & batch["valid"]).sum(axis=-1)
            for k in ks:
                seen[f"val/top{k}{suffix}"] = ((place <= k) & batch["valid"]).sum(axis=-1)
        return jax.tree.map(jnp.add, totals, seen)

    def evaluate(params) -> dict[str, float]:
        names = [name for name in measured(task) if not run_log.is_detail(name)]
        names += [f"bad{suffix}" for suffix in RESIZES]
        shape = (len(task.heads),) if task.heads else ()
        totals = dict.fromkeys(names, jnp.zeros(shape, jnp.int32))
        threads = config.evals.threads
        for local in batching.eval_batches(load, length, batch_size, rows=rows, threads=threads):
            labels = local["label"][local["valid"]]
            pipeline.check_labels(labels, source, config.classify.num_classes)
            batch = sharding.global_batch(mesh, batch_size, local)
            totals = add(totals, params, frozen, batch)
        totals = {name: np.asarray(x) for name, x in totals.items()}
        best = int(totals["val/top1"].argmax()) if task.heads else ()
        for suffix in RESIZES:
            bad = int(totals.pop(f"bad{suffix}")[best])
            features.refuse_not_finite(bad, length, f"{source}: logits")
        return _shares(totals, task, length)

    return evaluate


def _count(source: records.Split, config) -> int:
    """Examples that are measured."""
    return min(len(source), config.evals.most or len(source))


def _shares(hits: dict[str, np.ndarray], task, count: int) -> dict[str, float]:
    if not task.heads:
        return {name: int(x) / count for name, x in hits.items()}
    best = int(hits["val/top1"].argmax())
    found = {name: int(x[best]) / count for name, x in hits.items()}
    for suffix in RESIZES:
        each = zip(task.heads, hits[f"val/top1{suffix}"], strict=True)
        found |= {f"val/top1{suffix}/{head}": int(x) / count for head, x in each}
    return found


def rows(task, workdir) -> list[dict]:
    """Rows of results (evals/results.py) from what a run has logged: for each way of resizing the
    last evaluation and the best one; of a grid also every head's at the last one, as a detail."""
    config = task.config
    count = _count(records.Split(config.evals.heldout, config.evals.heldout_split), config)
    curves = {
        name: curve.finite().as_dict()
        for name, curve in run_log.read(workdir).curves.items()
        if name.startswith("val/")
    }
    what, how = _protocol(config)
    choice = "head, on the test images" if task.heads else ""
    both = f"epoch and {choice}" if choice else "epoch, on the test images"

    def row(curve, epoch, step, selection, more):
        hits = round(curve[step] * count)
        told = what | {"epoch": epoch, "step": step} | more
        return results.row(told, hits, count, selection=selection or "none", how=how)

    def chosen(step) -> dict:
        heads = {head: curves[f"val/top1/{head}"][step] for head in task.heads}
        return {"head": max(heads, key=heads.get)} if heads else {}

    found = []
    for suffix, squash in RESIZES.items():
        curve, at = curves.get(f"val/top1{suffix}"), {"squash": squash}
        if not curve:
            continue
        last, best = max(curve), max(curve, key=curve.get)
        found.append(row(curve, "last", last, choice, at | chosen(last)))
        found.append(row(curve, "best", best, both, at | chosen(best)))
        for head in task.heads:
            own = curves[f"val/top1{suffix}/{head}"]
            found.append(row(own, "last", last, "", at | {"head": head, "detail": True}))
    return found


def _protocol(config) -> tuple[dict, dict]:
    """(what is measured, how) of a training's rows."""
    told, optim = config.classify, config.optim
    name, source = PROTOCOLS["all" if told.train == "all" else told.head]
    features = {"dinov2": "last blocks", "attentive": "patches"}.get(told.head, told.pooling)
    what = {
        "protocol": name,
        "data": records.open_builder(config.evals.heldout).info.name,
        "splits": f"{config.data.split} → {config.evals.heldout_split}",
        "features": told.pooling if told.train == "all" else features,
        "seed": config.seed,
        "resize": resize_of(config),
    }
    how = {
        "source": source,
        "path": results.location(config.evals.heldout),
        "weights": told.weights,
        "crop": config.model.image_size,
        "filter": "bicubic, antialiased",
        "mean": list(vit.IMAGENET_MEAN),
        "std": list(vit.IMAGENET_STD),
        "total": config.total,
        "batch_size": config.batch_size,
        "optimizer": optim.kind,
        "blr": list(optim.grid) or optim.blr,
        "ema": optim.ema,
    }
    return what, how


def recorded(task, workdir) -> list[str]:
    """Adds the rows to the file of results: of fine-tuned weights that of the run's last step, of a
    probe the run's own, about the encoder that it read. What there is to say."""
    if jax.process_index() or not task.config.evals.heldout:
        return []
    found = rows(task, workdir)
    if not found:
        return []
    if task.config.classify.train == "all":
        step = max(one["step"] for one in found)
        path, weights = results.default_path(workdir, step), f"{workdir}, step {step}"
        record = results.merge
    else:
        path, weights = results.default_path(workdir, None), task.source
        record = results.write  # it holds nothing but the rows of this run
    try:
        record(path, weights, dataclasses.asdict(task.config.model), found)
    except UserError as e:  # the training itself has gone well
        return [f"results were not written: {e}"]
    return [f"results are in {path}"]
