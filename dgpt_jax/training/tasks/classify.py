"""Fine-tuning of an encoder on labels, with MAE's and BEiT's recipe.

The mean of the patch tokens goes through a new norm and a linear head (or CLS through the final
norm); positions, fixed in pretraining, are trained. Source: the official main_finetune.py,
models_vit.py, engine_finetune.py.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax import invocation
from dgpt_jax.config import TrainConfig
from dgpt_jax.data import dataset
from dgpt_jax.models import classifier, flops, vit
from dgpt_jax.training import initial_weights, layerwise, mixup, optimizer
from dgpt_jax.training.initial_weights import InitialWeights
from dgpt_jax.training.tasks.base import Batch


class ClassificationTask:
    """A base.Task. `heads`: names of heads trained side by side, empty for a single head.
    read_weights: reads what training starts from. source: origin of frozen weights.

    `open_classify` makes one with its data; without, it can be planned and replayed.
    """

    heads: tuple[str, ...] = ()
    independent: bool = True
    source: str = ""
    notes: tuple[str, ...] = ()
    frozen_identity: Mapping[str, str] | None = None

    def __init__(
        self,
        config: TrainConfig,
        *,
        examples: dataset.ExampleDataset | None = None,
        read_weights: Callable[[], InitialWeights] = lambda: initial_weights.RANDOM,
    ):
        self.config = config
        self.next_command = f"{invocation.command('convert')} {{workdir}} EXPORT --to=timm"
        self.examples: Any = examples
        self.initial_weights = read_weights
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

    def optimizer(
        self, rate: optax.Schedule, freeze_steps: int = 0
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of the config with a learning-rate schedule."""
        return optimizer.optimizer(
            self.config.optim,
            rate,
            decay=optimizer.FINE_TUNING_DECAY,
            layers=layerwise.layer_ids(self.config.model.depth),
            frozen=layerwise.frozen_by_config(self.config, freeze_steps),
        )

    def prepare(self, key: jax.Array, batch: Batch) -> Batch:
        """Input of `loss` from a full batch: images (B, height, width, 3), normalized, erased and
        mixed; soft labels `target` (B, classes); `paths` (B, L, 2) of vit.sample_drop_path."""
        cfg, model = self.config.classify, self.config.model
        noise, mix, paths = jax.random.split(key, 3)
        images = vit.normalize(batch["image"], self.config.data.mean, self.config.data.std)
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
        images = vit.normalize(images, self.config.data.mean, self.config.data.std)
        return self.module.apply({"params": params}, images).astype(jnp.float32)

    def model_flops(self) -> float:
        """FLOPs per image of a train step, by flops.FORMULA."""
        return flops.classifier_flops(self.config.model, self.config.classify.num_classes)

    def replay_metadata(self) -> dict[str, Any]:
        """Nothing beside the config."""
        return {}


def open_classify(config: TrainConfig, kind: type[ClassificationTask]) -> ClassificationTask:
    """The task with its data. Raises UserError."""
    examples = dataset.open_labelled(config.data, config.model, config.classify, config.seed)
    label = examples.sources.splits[0].label
    assert label is not None
    read_weights = partial(initial_weights.for_classifier, config, label.names)
    return kind(config, examples=examples, read_weights=read_weights)
