"""Settings of a tiny classifier and its reference logits, for tests of supervised training."""

import jax
import numpy as np

from dgpt_jax.config import roots, schema
from dgpt_jax.data import image_ops
from dgpt_jax.models import classifier, vit
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.weights import export, registry
from dgpt_jax.weights.types import encoder_shapes
from tests.support.data import TINY, tiny_model

# Enough blocks for every probe.
DEEP = {"depth": 6, "taps": None}


def settings(path, **changes) -> roots.TrainConfig:
    defaults = dict(
        task="classify",
        total="6 steps",
        batch_size=8,
        dtype="float32",
        log_every=1,
        model=TINY,
        data={"path": str(path), "threads": 2, "crop_scale": (0.3, 1.0)},
        classify={"num_classes": 2, "mixup_group_size": 4, "drop_path": 0.3},
        optim={"blr": 0.05, "warmup": "1 steps", "layer_decay": 0.7, "min_lr": 1e-5, "ema": 0.8},
        evals={
            "heldout": str(path),
            "heldout_split": "train",
            "every": "3 steps",
            "batch_size": 10,
        },
        checkpoint={"every": "100%", "best": "val/top1"},
    )
    for name, value in changes.items():
        merge = isinstance(value, dict) and name in defaults
        defaults[name] = defaults[name] | value if merge else value
    return schema.parse(roots.TrainConfig, defaults)


def by_hand(encoder_params, dataset, *, squash: bool):
    """Logits and labels of all examples."""
    module = classifier.classifier(tiny_model(), "mean", 2)
    source = tfds_dataset.Split(dataset, "train")
    crops = [
        image_ops.center_crop(image_ops.decode_image(r["image"]), 18, 16, squash=squash)
        for r in source
    ]
    logits = jax.jit(module.apply)({"params": encoder_params}, vit.normalize(np.stack(crops)))
    return np.asarray(logits), np.array([r["label"] for r in source])


def untrained(path, pooling: str, **changes):
    """Writes an encoder with random weights to a file."""
    model, rng = tiny_model(**changes), np.random.default_rng(5)
    params = {
        name: np.float32(name.endswith("scale") + 0.2 * rng.standard_normal(shape))
        for name, shape in encoder_shapes(model, pooling, 0).items()
    }
    weights = registry.Weights(model, params, pooling, "untrained")
    export.write(weights, registry.LAYOUTS["safetensors"], path)
    return path
