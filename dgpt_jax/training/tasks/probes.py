"""Probes: linear and attentive heads trained on the features of a frozen encoder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dgpt_jax import invocation
from dgpt_jax.config import TrainConfig
from dgpt_jax.data.dataset import ExampleDataset
from dgpt_jax.models import classifier, probes, vit
from dgpt_jax.training import initial_weights, optimizer
from dgpt_jax.training.initial_weights import InitialWeights
from dgpt_jax.training.tasks.base import Batch
from dgpt_jax.training.tasks.classify import ClassificationTask


class ProbeTask(ClassificationTask):
    """Trains heads on a frozen encoder, whose features are computed once for all of them.

    With config.optim.base_lr_grid there is one head per learning rate (DINOv2's: and per kind of
    features). Each trains independently, except that a step that is non-finite for one head is
    skipped for all.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        examples: ExampleDataset | None = None,
        read_weights: Callable[[], InitialWeights] = lambda: initial_weights.RANDOM,
    ):
        super().__init__(config, examples=examples)
        start = read_weights()
        self.source, self.notes, self.frozen_identity = start.source, start.notes, start.identity
        self.initial_weights = lambda: start._replace(params={}, notes=())
        cfg, model = config.classify, config.model
        self.encoder = classifier.classifier(model, cfg.pooling, dtype=config.dtype)
        images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
        shapes = jax.eval_shape(self.encoder.init, jax.random.key(0), images)["params"]
        identity_norm = {"scale": np.ones(model.width, np.float32),
                         "bias": np.zeros(model.width, np.float32)}  # fmt: skip
        loaded = {name: x for name, x in start.params.items() if name in shapes}
        self.frozen = {"norm": identity_norm} | loaded if start.params else shapes
        self.module, self.stacks = _module(config), ()
        self.independent = cfg.head == "dinov2"  # the others have BatchNorm
        if config.optim.base_lr_grid:
            self.next_command = (
                f"{invocation.command('results')} {{workdir}}/results.json"
                if config.evals.heldout
                else f"{invocation.command('plot')} {{workdir}} --out=curves.png"
            )
            self.stacks = self.module.stacks
            rates = optimizer.peak_learning_rates(config.optim, config.batch_size)
            kinds = [f"{name}_" for name in self.stacks] if len(self.stacks) > 1 else [""]
            self.heads = tuple(f"{kind}lr{rate:.3g}" for kind in kinds for rate in rates)

    def init(self, key: jax.Array) -> dict[str, Any]:
        model = self.config.model
        images = jnp.zeros((1, model.image_size, model.image_size, 3))
        features = jax.eval_shape(self._features, self.frozen, images)
        features = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), features)
        return self.module.init(key, features)["params"]

    def optimizer(
        self, rate: optax.Schedule, freeze_steps: int = 0
    ) -> optax.GradientTransformationExtraArgs:
        return optimizer.optimizer(self.config.optim, rate, running=True, stacks=self.stacks)

    def loss(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Batch]:
        """(mean over heads, {"loss": (B,)}); the gradient of each head is that of its own loss."""
        features = self._features(frozen, batch["image"])
        logits, running_stats_loss = self.module.apply({"params": params}, features, method="train")
        values = optax.softmax_cross_entropy(logits, batch["target"])
        if not self.heads:
            return values.mean() + running_stats_loss, {"loss": values}
        total, mean = values.mean(axis=1).sum(), values.mean()
        return total + jax.lax.stop_gradient(mean - total) + running_stats_loss, {
            "loss": values.mean(axis=0)
        }

    def logits(self, params: Any, frozen: Any, images: jax.Array) -> jax.Array:
        """uint8 (B, height, width, 3) to float32 (B, classes); of a grid (heads, B, classes)."""
        data = self.config.data
        features = self._features(frozen, vit.normalize(images, data.mean, data.std))
        return self.module.apply({"params": params}, features)

    def model_flops(self) -> float:
        return super().model_flops() / 3  # no backward pass through the encoder

    def _features(self, frozen, images):
        options = {}
        if self.stacks:
            blocks, normed = self.module.blocks, self.module.normed
            options = {"blocks": blocks, "normed": normed, "method": "last_block_tokens"}
        return self.encoder.apply({"params": frozen}, images, **options)


def _module(config: TrainConfig) -> nn.Module:
    cfg, model, count = config.classify, config.model, len(config.optim.base_lr_grid)
    if cfg.head == "dinov2":
        return probes.LinearGrid(cfg.num_classes, count)
    if cfg.head == "attentive":
        return probes.AttentiveGrid(model.width, model.heads, cfg.num_classes, count)
    return probes.LinearProbe(model.width, cfg.num_classes)
