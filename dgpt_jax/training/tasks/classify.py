"""Fine-tuning of an encoder on labels, with MAE's and BEiT's recipe.

The mean of the patch tokens goes through a new norm and a linear head (or CLS through the final
norm); positions, fixed in pretraining, are trained. Source: the official main_finetune.py,
models_vit.py, engine_finetune.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax import invocation
from dgpt_jax.config import ModelConfig, TrainConfig
from dgpt_jax.data import class_names, dataset
from dgpt_jax.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from dgpt_jax.errors import UserError
from dgpt_jax.models import classifier, flops, vit
from dgpt_jax.training import mixup, optimizer
from dgpt_jax.training.tasks.base import Batch
from dgpt_jax.weights import mapping, registry
from dgpt_jax.weights import types as weights_lib
from dgpt_jax.weights.teacher_loading import interpolate_positions

# Fields that an encoder and config.model must have in common; mlp_ratio is compared by width.
ENCODER_FIELDS = ("width", "depth", "heads", "patch", "eps", "activation")


class InitialWeights(NamedTuple):
    """Nested arrays to use instead of initialized parameters, their source, lines to log."""

    initial_params: dict[str, Any]
    source: str
    notes: tuple[str, ...]


FRESH = InitialWeights({}, "", ())


class ClassificationTask:
    """A base.Task. `heads`: names of heads trained side by side, empty for a single head.

    `open_classify` makes one with its data; without, it can be planned and replayed.
    """

    heads: tuple[str, ...] = ()
    independent: bool = True

    def __init__(
        self,
        config: TrainConfig,
        *,
        examples: dataset.ExampleDataset | None = None,
        start: InitialWeights = FRESH,
    ):
        self.config = config
        self.next_command = f"{invocation.command('convert')} {{workdir}} EXPORT --to=timm"
        self.examples: Any = examples
        self.initial_params, self.source, self.notes = start
        self.frozen: dict[str, Any] = {}
        self.metric_names: tuple[str, ...] = ("loss", "grad_norm")
        cfg = config.classify
        self.module: Any = classifier.classifier(
            config.model, cfg.pooling, cfg.num_classes, dtype=config.dtype
        )

    def abstract_example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        size = self.config.model.image_size
        return {
            "image": jax.ShapeDtypeStruct((size, size, 3), np.uint8),
            "erased": jax.ShapeDtypeStruct((4,), np.int32),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters, a nested dict."""
        size = self.config.model.image_size
        return self.module.init(key, jnp.zeros((1, size, size, 3)))["params"]

    def optimizer(self, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """The optimizer of the config with a learning-rate schedule."""
        return optimizer.optimizer(
            self.config.optim,
            rate,
            decay=optimizer.FINE_TUNING_DECAY,
            layers=optimizer.layer_ids(self.config.model.depth),
        )

    def prepare(self, key: jax.Array, batch: Batch) -> Batch:
        """Input of `loss` from a full batch: images (B, height, width, 3), normalized, erased and
        mixed; soft labels `target` (B, classes); `paths` (B, L, 2) of vit.sample_drop_path."""
        cfg, model = self.config.classify, self.config.model
        noise, mix, paths = jax.random.split(key, 3)
        images = vit.normalize(batch["image"])
        if cfg.random_erase_prob:
            images = mixup.erase(noise, images, batch["erased"])
        targets = mixup.soft_labels(batch["label"], cfg.num_classes, cfg.label_smoothing)
        if cfg.mixup or cfg.cutmix:
            groups = len(images) // cfg.mixup_group_size
            params = mixup.sample_mix(
                mix, groups, model.image_size, mixup=cfg.mixup, cutmix=cfg.cutmix
            )
            images, targets = mixup.apply(params, images, targets)
        prepared = {"image": images.astype(self.config.dtype), "target": targets}
        if cfg.drop_path:
            prepared["paths"] = vit.sample_drop_path(paths, len(images), model.depth, cfg.drop_path)
        return prepared

    def loss(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Batch]:
        """(mean, {"loss": (B,)}): cross-entropy to soft labels of a prepared batch."""
        drop_path_scale_LB2 = batch["paths"].swapaxes(0, 1) if "paths" in batch else None
        logits = self.module.apply({"params": params}, batch["image"], drop_path_scale_LB2)
        values = optax.softmax_cross_entropy(logits.astype(jnp.float32), batch["target"])
        return values.mean(), {"loss": values}

    def logits(self, params: Any, frozen: Any, images: jax.Array) -> jax.Array:
        """uint8 (B, height, width, 3) to float32 (B, classes), without drop path."""
        images = vit.normalize(images)
        return self.module.apply({"params": params}, images).astype(jnp.float32)

    def model_flops(self) -> float:
        """FLOPs per image of a train step, by flops.FORMULA."""
        return flops.classifier_flops(self.config.model, self.config.classify.num_classes)

    def replay_metadata(self) -> dict[str, Any]:
        """Nothing beside the config."""
        return {}


def open_classify(config: TrainConfig, kind: type[ClassificationTask]) -> ClassificationTask:
    """The task with its data and initial weights. Raises UserError."""
    examples = dataset.open_labelled(config.data, config.model, config.classify, config.seed)
    label = examples.sources.splits[0].label
    assert label is not None
    return kind(config, examples=examples, start=starting_weights(config, label.names))


def starting_weights(config: TrainConfig, names: Sequence[str] = ()) -> InitialWeights:
    """Encoder and positions of config.init.weights, or none of them. Raises UserError.

    From a classifier with the same pooling also the norm, and the head if it has as many classes
    and, where class names are available on both sides, the same `names`. Positions of another grid
    are resized as in the official code: bicubic, without antialiasing.
    """
    cfg, model = config.classify, config.model
    if not config.init.weights:
        table = classifier.classifier_params_from_encoder({}, model)["pos_embed"]
        notes = ("config.init.weights is empty: training from random weights",)
        return InitialWeights({"pos_embed": table}, "random weights", notes)
    _, weights = registry.read(config.init.weights, heads=model.heads, encoder_only=True)
    weights = weights_lib.encoder(weights, cfg.pooling if weights.full else None)
    _require_same_encoder(model, weights)
    notes = [f"initial weights: {weights.source}", *weights.notes]
    params = dict(weights.params)
    if weights.model.grid != model.grid:
        params["pos_embed"] = interpolate_positions(
            params["pos_embed"][0], (model.grid, model.grid), cls=True, antialias=False
        )[None]
        notes.append(f"positions resized from {weights.model.grid}² to {model.grid}² patches")
    if (weights.preprocess.mean, weights.preprocess.std) != (IMAGENET_MEAN, IMAGENET_STD):
        notes.append(f"{config.init.weights} was trained with another mean and std than ImageNet's")
    same_pooling = weights.pooling == cfg.pooling
    same_classes = weights.num_classes == cfg.num_classes
    if same_classes and (i := class_names.first_difference(weights.classes, names)) is not None:
        same_classes = False
        notes.append(f"head not loaded, its class {i} is {weights.classes[i]!r}, not {names[i]!r}")
    if not (same_pooling and same_classes):
        params = {name: x for name, x in params.items() if not name.startswith("head/")}
    if not same_pooling:
        params = {name: x for name, x in params.items() if not name.startswith("norm/")}
    notes.append(f"loaded: {', '.join(sorted({name.partition('/')[0] for name in params}))}")
    return InitialWeights(mapping.unflatten(params), weights.source, tuple(notes))


def _require_same_encoder(model: ModelConfig, weights: weights_lib.Weights):
    """Raises UserError if the encoder is not the one of config.model."""
    ours, theirs = (
        replace(m, mlp_ratio=int(m.width * m.mlp_ratio)) for m in (model, weights.model)
    )
    for name in (*ENCODER_FIELDS, "mlp_ratio"):
        if getattr(ours, name) != getattr(theirs, name):
            value = getattr(weights.model, name)
            raise UserError(
                f"{weights.source} has {name} {value}, the config has {getattr(model, name)}: set "
                f"config.model.{name}={value}"
            )
