"""The vision transformer that D-iGPT trains, and its inputs: normalized images and patches."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgpt_jax.config import ModelConfig
from dgpt_jax.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from dgpt_jax.models import transformer
from dgpt_jax.models.remat import rematerialized


def patch_bias_init(fan_in: int) -> Callable:
    """torch's initializer of a convolution's bias, U(±1/√fan_in), as in the official code."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Encoder(nn.Module):
    """The vision transformer that D-iGPT trains.

    Pretraining calls its methods one by one (digpt.py); classifier.py calls the module.
    """

    width: int
    depth: int
    heads: int
    patch: int
    mlp_ratio: float = 4.0
    remat: str = "none"
    dtype: Any = jnp.float32
    eps: float = 1e-6
    activation: str = "gelu"

    def setup(self):
        self.patch_embed = nn.Dense(
            self.width,
            kernel_init=transformer.xavier,
            bias_init=patch_bias_init(3 * self.patch**2),
            dtype=self.dtype,
        )
        self.cls_token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
        self.blocks = rematerialized(transformer.Block, self.remat)(
            self.heads, self.mlp_ratio, self.activation, self.eps, self.dtype
        )

    def embed(self, images: jax.Array) -> jax.Array:
        """Patch tokens (B, rows, cols, D) of normalized images (B, height, width, 3)."""
        return self.patch_embed(patchify(images.astype(self.dtype), self.patch))

    def forward_blocks(
        self, x_BND: jax.Array, mask_NM: Any = None, drop_path_scale_LB2: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the last residual (B, N, D) and the input of every block (L, B, N, D)."""
        return transformer.scan_blocks(self.blocks, self.depth, x_BND, mask_NM, drop_path_scale_LB2)

    def __call__(
        self, images: jax.Array, positions: jax.Array, drop_path_scale_LB2: jax.Array | None = None
    ) -> jax.Array:
        """Residuals (B, 1+N, D) of images (B, height, width, 3) with positions (1, 1+N, D).

        CLS first, full attention, no final norm. drop_path_scale_LB2: of sample_drop_path, with the
        layer axis first, in training.
        """
        x_BND = self.embed_tokens(images, positions)
        return self.forward_blocks(x_BND, None, drop_path_scale_LB2)[0]

    def embed_tokens(self, images: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns the input of the first block (B, 1+N, D) under full attention, CLS first."""
        patches = self.embed(images)
        batch, _, _, width = patches.shape
        cls = jnp.broadcast_to(self.cls_token, (batch, 1, width))
        return jnp.concatenate([cls, patches.reshape(batch, -1, width)], axis=1) + positions


def sample_drop_path(key: jax.Array, batch: int, depth: int, rate: float) -> jax.Array:
    """Samples stochastic depth: scales (B, L, 2) of both branches of every block per example.

    The probability of dropping a branch grows linearly from 0 in the first block to `rate` in the
    last; branches that are not dropped are scaled up to keep the mean. Source: timm's DropPath.
    """
    keep_prob = 1 - jnp.linspace(0, rate, depth)[:, None]
    return jax.random.bernoulli(key, keep_prob, (batch, depth, 2)) / keep_prob


def normalize(
    images: jax.Array, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> jax.Array:
    """Normalizes uint8 images (B, height, width, 3) by channel statistics, to float32."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """Reshapes (B, height, width, 3) to (B, rows, cols, patch·patch·3), pixels row by row."""
    batch, height, width, channels = images.shape
    rows, cols = height // patch, width // patch
    if (rows * patch, cols * patch) != (height, width):
        raise ValueError(f"image size {height}×{width} is not divisible by patch size {patch}")
    x = images.reshape(batch, rows, patch, cols, patch, channels).swapaxes(2, 3)
    return x.reshape(batch, rows, cols, patch * patch * channels)


def encoder(model: ModelConfig, dtype: Any = jnp.float32) -> Encoder:
    """Returns the Encoder of a config."""
    return Encoder(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        patch=model.patch,
        mlp_ratio=model.mlp_ratio,
        remat=model.remat,
        dtype=jnp.dtype(dtype),
        eps=model.eps,
        activation=model.activation,
    )
