"""Classifier on the encoder: learned positions, final norm, pooling, linear head.

Heads that are trained on a frozen encoder are in probes.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.config import ModelConfig
from dgpt_jax.data import segments
from dgpt_jax.models import transformer, vit


class Classifier(nn.Module):
    """Encoder with full attention, CLS first, as in fine-tuning and timm.

    pooling "cls": LayerNorm of all tokens, then CLS (timm `norm`, `token`). pooling "mean": mean of
    the patch tokens, then LayerNorm (timm `fc_norm`, `avg`). num_classes 0: no head. The head is
    initialized near zero, as in MAE's fine-tuning.
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

    def tokens(self, images: jax.Array) -> jax.Array:
        """Tokens (B, 1+N, D), CLS first, of normalized images (B, height, width, 3).

        After the norm with pooling "cls", raw residuals with "mean", as timm's `forward_features`.
        """
        residual = self.encoder(images, self.pos_embed)
        return self.norm(residual) if self.pooling == "cls" else residual

    def features(self, images: jax.Array) -> jax.Array:
        """Pooled features (B, D) float32."""
        return self._pool(self.encoder(images, self.pos_embed), self.pooling)

    def pooled(self, images: jax.Array, poolings: Iterable[str]) -> dict[str, jax.Array]:
        """{pooling: features (B, D) float32} from one pass through the encoder."""
        residual = self.encoder(images, self.pos_embed)
        return {pooling: self._pool(residual, pooling) for pooling in poolings}

    def last_block_tokens(self, images: jax.Array, blocks: int, normed: bool) -> jax.Array:
        """Tokens (blocks, B, 1+N, D) after each of the last blocks, raw or after the norm."""
        last, inputs = self.encoder.forward_blocks(self.embed_tokens(images))
        tokens = jnp.concatenate([inputs[len(inputs) - blocks + 1 :], last[None]])
        return self.norm(tokens) if normed else tokens

    def embed_tokens(self, images: jax.Array) -> jax.Array:
        """Returns the input of the first block (B, 1+N, D)."""
        return self.encoder.embed_tokens(images, self.pos_embed)

    def forward_head(self, residual: jax.Array) -> jax.Array:
        """Returns the output of a call from the last block's output (B, 1+N, D)."""
        features = self._pool(residual, self.pooling)
        return self.head(features) if self.num_classes else features

    def _pool(self, residual: jax.Array, pooling: str) -> jax.Array:
        if pooling == "cls":
            return self.norm(residual)[:, 0]
        return self.norm(residual[:, 1:].mean(axis=1))

    def __call__(
        self, images: jax.Array, drop_path_scale_LB2: jax.Array | None = None
    ) -> jax.Array:
        """Logits (B, classes), or features without a head; drop_path_scale_LB2 as of Encoder."""
        return self.forward_head(self.encoder(images, self.pos_embed, drop_path_scale_LB2))


def classifier(
    model: ModelConfig, pooling: str, num_classes: int = 0, dtype: Any = jnp.float32
) -> Classifier:
    """Returns the Classifier of a config."""
    return Classifier(
        encoder=vit.encoder(model, dtype),
        grid=model.grid,
        pooling=pooling,
        num_classes=num_classes,
    )


def classifier_params_from_pretraining(params: Mapping[str, Any], model: ModelConfig) -> dict:
    """Returns classifier parameters, without a head, from those of a pretraining model.

    params: those of digpt.DiGPT, of which `encoder` and `pos_embed` are used. Fixed positions have
    no parameters: `pos_embed` is their table then. Pretraining has no final norm: it has scale 1
    and bias 0.
    """
    positions = params.get("pos_embed")
    if positions is None:
        positions = segments.sincos_table(model.width, model.grid)
    ones, zeros = np.ones(model.width, np.float32), np.zeros(model.width, np.float32)
    return {
        "encoder": params["encoder"],
        "pos_embed": positions,
        "norm": {"scale": ones, "bias": zeros},
    }
