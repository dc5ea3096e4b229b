"""A tiny classifier's settings, and its accuracy by hand, for the tests of supervised training."""

import jax
import numpy as np

from dgpt_jax import config, heads, records, schema, views, vit
from dgpt_jax.convert import export, formats
from dgpt_jax.convert.weights import encoder_shapes
from tests.data import TINY, tiny_model

# Enough blocks for every probe.
DEEP = {"depth": 6, "taps": None}


def settings(path, **changes) -> config.Train:
    defaults = dict(
        task="classify",
        total="6 steps",
        batch_size=8,
        dtype="float32",
        log_every=1,
        model=TINY,
        data={"path": str(path), "threads": 2, "crop_scale": (0.3, 1.0)},
        classify={"num_classes": 2, "mix_group": 4, "drop_path": 0.3},
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
        both = isinstance(value, dict) and name in defaults
        defaults[name] = defaults[name] | value if both else value
    return schema.parse(config.Train, defaults)


def by_hand(encoder_params, dataset, *, squash: bool):
    """Logits and labels of all examples, one by one."""
    module = heads.classifier(tiny_model(), "mean", 2)
    source = records.Split(dataset, "train")
    crops = [
        views.centre_crop(views.decode_picture(r["image"]), 18, 16, squash=squash) for r in source
    ]
    logits = jax.jit(module.apply)({"params": encoder_params}, vit.normalise(np.stack(crops)))
    return np.asarray(logits), np.array([r["label"] for r in source])


def untrained(path, pooling: str, **changes):
    """An encoder in a file."""
    model, rng = tiny_model(**changes), np.random.default_rng(5)
    params = {
        name: np.float32(name.endswith("scale") + 0.2 * rng.standard_normal(shape))
        for name, shape in encoder_shapes(model, pooling, 0).items()
    }
    weights = formats.Weights(model, params, pooling, "untrained")
    export.write(weights, formats.LAYOUTS["safetensors"], path)
    return path
