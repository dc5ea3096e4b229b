"""Weights by path, ready to use: what notebooks, `evaluate` and `convert` open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from dgpt_jax import digpt, heads, vit
from dgpt_jax.config import Model
from dgpt_jax.convert import formats, layout
from dgpt_jax.convert.weights import Preprocess
from dgpt_jax.convert.weights import encoder as encoder_of
from dgpt_jax.schema import UserError


@dataclass(frozen=True)
class Encoder:
    """An encoder for use: full attention, CLS first, final norm (heads.Classifier without head).

    Attributes: model (config.Model), params, where they came from, how pictures are prepared, and
    {"config", "step"} of the training, where it is known.
    """

    model: Model
    params: Any
    source: str
    preprocess: Preprocess = field(default_factory=Preprocess)
    run: Mapping[str, Any] = field(default_factory=dict)

    def features(self, pictures, pooling: str = "cls"):
        """uint8 RGB (B, size, size, 3) to features (B, D) float32; jittable."""
        return self._apply(pictures, pooling)

    def tokens(self, pictures):
        """uint8 RGB (B, size, size, 3) to normed tokens (B, 1+N, D) float32, CLS first."""
        return self._apply(pictures, "cls", method="tokens")

    def pooled(self, pictures, poolings: Sequence[str]) -> dict[str, jax.Array]:
        """{pooling: features (B, D) float32} of several poolings in one pass; jittable."""
        return self._apply(pictures, "cls", poolings, method="pooled")

    def _apply(self, pictures, pooling: str, *args, classes: int = 0, **kwargs):
        how = self.preprocess
        images = vit.normalise(jnp.asarray(pictures), how.mean, how.std)
        module = heads.classifier(self.model, pooling, classes)
        return module.apply({"params": self.params}, images, *args, **kwargs)


@dataclass(frozen=True)
class Classifier(Encoder):
    """An encoder with its classification head: fine-tuned weights."""

    pooling: str = "mean"
    num_classes: int = 0

    def logits(self, pictures):
        """uint8 RGB (B, size, size, 3) to logits (B, classes) float32; jittable."""
        return self._apply(pictures, self.pooling, classes=self.num_classes)


@dataclass(frozen=True)
class Pretrained:
    """The whole pretraining model: encoder and decoders."""

    model: Model
    params: Any
    module: digpt.DiGPT

    def predictions(self, images, orders):
        """{decoder: (B, V·T+1, C)} for normalised images and orders, as DiGPT returns them."""
        return self.module.apply({"params": self.params}, images, orders)

    def losses(self, images, tokens, orders, params=None, *, cls=True) -> dict[str, jax.Array]:
        """{"next", "visible"}: mean 2-2cos to teacher tokens (B, cls+N, C), CLS first.

        images: normalised (B, size, size, 3); orders: int (B, S). Jittable, and differentiable in
        every argument; `params` replaces the loaded ones; `cls`: whether the teacher has a CLS.
        """
        params = self.params if params is None else params
        predictions = self.module.apply({"params": params}, images, orders)
        grid = (self.model.grid, self.model.grid)
        parts = digpt.token_losses(
            predictions, tokens, orders, grid=grid, segment_grid=self.model.segments, cls=cls
        )
        return {name: values.mean() for name, values in parts.items()}


def load_encoder(path, *, heads: int | None = None) -> Encoder:
    """The encoder of a work directory (its newest checkpoint), or of weights in a known layout.

    `heads` is for weights beside which no JSON tells it. A classification head is left out. Raises
    UserError.
    """
    _, weights = formats.read(path, heads=heads, encoder_only=True)
    weights = encoder_of(weights, None)
    params = {p: x for p, x in weights.params.items() if not p.startswith("head/")}
    return Encoder(
        weights.model, layout.unflatten(params), weights.source, weights.preprocess, weights.run
    )


def load_classifier(path, *, heads: int | None = None) -> Classifier:
    """Fine-tuned weights with their head: a work directory, or any layout that holds heads.

    Raises UserError, also where there is no head.
    """
    _, weights = formats.read(path, heads=heads, encoder_only=True)
    if not weights.num_classes:
        raise UserError(
            f"{path} has no classification head: give fine-tuned weights, or measure frozen "
            f"features (configs/knn_in1k.py, fewshot_in1k.py, linear_in1k.py)"
        )
    return Classifier(
        weights.model,
        layout.unflatten(weights.params),
        weights.source,
        weights.preprocess,
        weights.run,
        pooling=weights.pooling,
        num_classes=weights.num_classes,
    )


def untrained(model: Model, seed: int) -> Encoder:
    """The encoder as pretraining starts it: the baseline that a pretrained one is compared with."""
    init = jax.jit(digpt.build(model, out_width=1).init)
    params = init(jax.random.key(seed), *digpt.dummy_inputs(model))["params"]
    return Encoder(
        model, heads.from_pretrained(params["encoder"], model), f"untrained, seed {seed}"
    )


def load_digpt(path, *, heads: int | None = None, decoder_heads: int | None = None) -> Pretrained:
    """The pretraining model of a work directory, or of the official layout (.pth, .safetensors).

    Head counts are not in official files: widths other than the base model's need them given.
    """
    _, weights = formats.read(path, heads=heads, decoder_heads=decoder_heads)
    if not weights.full:
        raise UserError(f"{path} holds an encoder without decoders")
    return Pretrained(weights.model, layout.unflatten(weights.params), weights.module())
