"""What stands on an encoder in use: learned positions, a final norm, pooling, a linear head.

Heads that are trained on a frozen encoder are in probe_heads.py.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dgpt_jax import segments, transformer, vit


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
        self.norm = transformer.LayerNorm(self.encoder.eps)
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

    def last(self, images, blocks: int, normed: bool):
        """Tokens (blocks, B, 1+N, D) after each of the last blocks, raw or through the norm."""
        last, inputs = self.encoder.transform(self.enter(images))
        tokens = jnp.concatenate([inputs[len(inputs) - blocks + 1 :], last[None]])
        return self.norm(tokens) if normed else tokens

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
