"""Heads alone, on the features of a frozen encoder: the linear and attentive probes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax import heads, optim, probe_heads, vit
from dgpt_jax.config import Train
from dgpt_jax.tasks.classify import FRESH, Classify, Start


class Probe(Classify):
    """What is given is not trained, and read once for all heads. With config.optim.grid there is a
    head for each learning rate (of DINOv2's, on each kind of features); each trains as if it were
    alone, but a step whose numbers are bad for one is left out for all.
    """

    def __init__(self, config: Train, *, examples=None, start: Start = FRESH):
        super().__init__(config, examples=examples, start=start._replace(given={}))
        told, model = config.classify, config.model
        self.encoder = heads.classifier(model, told.pooling, dtype=config.dtype)
        pixels = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
        whole = jax.eval_shape(self.encoder.init, jax.random.key(0), pixels)["params"]
        fresh = {"norm": {"scale": np.ones(model.width, np.float32),
                          "bias": np.zeros(model.width, np.float32)}}  # fmt: skip
        kept = {name: x for name, x in start.given.items() if name in whole}
        self.frozen = fresh | kept if start.given else whole
        self.module, self.stacks = _module(config), ()
        self.independent = told.head == "dinov2"  # the others have BatchNorm
        if config.optim.grid:
            self.then = "python tools/report.py {workdir}/results.json"
            self.stacks = self.module.stacks
            rates = optim.peaks(config.optim, config.batch_size)
            kinds = [f"{name}_" for name in self.stacks] if len(self.stacks) > 1 else [""]
            self.heads = tuple(f"{kind}lr{rate:.3g}" for kind in kinds for rate in rates)

    def init(self, key):
        model = self.config.model
        pixels = jnp.zeros((1, model.image_size, model.image_size, 3))
        features = jax.eval_shape(self._features, self.frozen, pixels)
        features = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), features)
        return self.module.init(key, features)["params"]

    def optimizer(self, rate):
        return optim.optimizer(self.config.optim, rate, running=True, stacks=self.stacks)

    def loss(self, params, frozen, batch):
        """(mean over heads, {"loss": (B,)}); the gradient of each head is that of its own loss."""
        features = self._features(frozen, batch["image"])
        logits, gap = self.module.apply({"params": params}, features, method="train")
        values = optax.softmax_cross_entropy(logits, batch["target"])
        if not self.heads:
            return values.mean() + gap, {"loss": values}
        total, mean = values.mean(axis=1).sum(), values.mean()
        return total + jax.lax.stop_gradient(mean - total) + gap, {"loss": values.mean(axis=0)}

    def logits(self, params, frozen, pictures):
        """uint8 (B, height, width, 3) to (B, classes) float32; of a grid (heads, B, classes)."""
        features = self._features(frozen, vit.normalise(pictures))
        return self.module.apply({"params": params}, features)

    def model_flops(self) -> float:
        return super().model_flops() / 3  # nothing but the heads goes backwards

    def _features(self, frozen, images):
        how = {}
        if self.stacks:
            how = {"blocks": self.module.blocks, "normed": self.module.normed, "method": "last"}
        return self.encoder.apply({"params": frozen}, images, **how)


def _module(config: Train):
    told, model, count = config.classify, config.model, len(config.optim.grid)
    if told.head == "dinov2":
        return probe_heads.LinearGrid(told.num_classes, count)
    if told.head == "attentive":
        return probe_heads.AttentiveGrid(model.width, model.heads, told.num_classes, count)
    return probe_heads.LinearProbe(model.width, told.num_classes)
