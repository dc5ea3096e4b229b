"""What stands on an encoder in use: learned positions, a final norm, pooling, a linear head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import segments, vit


class Classifier(nn.Module):
    """An encoder with full attention, CLS first, as fine-tuning and timm have it.

    pooling "cls": LayerNorm of all tokens, then CLS (timm `norm`, `token`). pooling "mean": mean of
    the patch tokens, then LayerNorm (timm `fc_norm`, `avg`). num_classes 0: no head; the head
    begins near zero, as MAE's fine-tuning has it.
    """

    encoder: vit.Encoder
    grid: int
    pooling: str
    num_classes: int = 0

    def setup(self):
        shape = (1, 1 + self.grid**2, self.encoder.width)
        self.pos_embed = self.param("pos_embed", nn.initializers.zeros, shape)
        self.norm = vit.layer_norm(self.encoder.eps, None)
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(2e-5))

    def tokens(self, images):
        """Normalised images (B, height, width, 3) to tokens (B, 1+N, D), CLS first.

        Normed with pooling "cls", raw residuals with "mean": what timm's `forward_features` gives.
        """
        residual = self.encoder(images, self.pos_embed)
        return self.norm(residual) if self.pooling == "cls" else residual

    def features(self, images):
        """(B, D) float32: what is measured and exported."""
        return self._pool(self.encoder(images, self.pos_embed), self.pooling)

    def pooled(self, images, poolings):
        """{pooling: (B, D) float32} of several poolings, from one pass through the encoder."""
        residual = self.encoder(images, self.pos_embed)
        return {pooling: self._pool(residual, pooling) for pooling in poolings}

    def enter(self, images):
        """What the first block gets (B, 1+N, D)."""
        return self.encoder.enter(images, self.pos_embed)

    def leave(self, residual):
        """What a call gives, from what the last block gives (B, 1+N, D)."""
        features = self._pool(residual, self.pooling)
        return self.head(features) if self.num_classes else features

    def _pool(self, residual, pooling: str):
        if pooling == "cls":
            return self.norm(residual)[:, 0]
        return self.norm(residual[:, 1:].mean(axis=1))

    def __call__(self, images, paths_LB2=None):
        """Logits (B, classes), or features where there is no head; vit.drop_paths in training."""
        return self.leave(self.encoder(images, self.pos_embed, paths_LB2))


class LinearProbe(nn.Module):
    """BatchNorm without scale and bias (eps 1e-6), then a linear layer: MAE's head on frozen
    features (main_linprobe.py).

    Running statistics are parameters whose gradient, from `train`, is what they are minus what the
    batch has: a step of plain SGD with rate 0.1 moves them as momentum 0.9 does (torch's 0.1).
    """

    width: int
    num_classes: int
    eps: float = 1e-6

    def setup(self):
        self.running_mean = self.param("running_mean", nn.initializers.zeros, (self.width,))
        self.running_var = self.param("running_var", nn.initializers.ones, (self.width,))
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))

    def __call__(self, features):
        """(B, D) float32 to logits (B, classes), by running statistics."""
        return self._linear(features, self.running_mean, self.running_var)

    def train(self, features):
        """(logits by the batch's statistics, a scalar 0 to be added to the loss)."""
        mean, var = features.mean(axis=0), features.var(axis=0)
        unbiased = var * len(features) / max(len(features) - 1, 1)
        gap = jnp.zeros(())
        for running, seen in ((self.running_mean, mean), (self.running_var, unbiased)):
            half = 0.5 * jnp.square(running - jax.lax.stop_gradient(seen)).sum()
            gap += half - jax.lax.stop_gradient(half)
        return self._linear(features, mean, var), gap

    def _linear(self, features, mean, var):
        return self.head((features - mean) / jnp.sqrt(var + self.eps))


def fold(probe: dict, eps: float = LinearProbe.eps) -> dict:
    """The plain linear head, {"kernel", "bias"}, that is a LinearProbe's parameters in use."""
    scale = 1 / np.sqrt(probe["running_var"] + eps)
    kernel = probe["head"]["kernel"] * scale[:, None]
    return {"kernel": kernel, "bias": probe["head"]["bias"] - probe["running_mean"] @ kernel}


def classifier(model, pooling: str, num_classes: int = 0, dtype: Any = jnp.float32) -> Classifier:
    """The Classifier of a `config.Model`."""
    return Classifier(
        encoder=vit.encoder(model, dtype),
        grid=model.grid,
        pooling=pooling,
        num_classes=num_classes,
    )


def from_pretrained(encoder_params, model) -> dict:
    """Classifier parameters, without a head, of a pretrained encoder's.

    Pretraining has fixed positions (none for CLS) and no final norm: the table becomes `pos_embed`
    and the norm gets scale 1 and bias 0.
    """
    table = segments.sincos_positions(model.width, model.grid, model.grid)
    table = table.reshape(1, -1, model.width)
    pos_embed = np.concatenate([np.zeros((1, 1, model.width), np.float32), table], axis=1)
    ones, zeros = np.ones(model.width, np.float32), np.zeros(model.width, np.float32)
    return {
        "encoder": encoder_params,
        "pos_embed": pos_embed,
        "norm": {"scale": ones, "bias": zeros},
    }
