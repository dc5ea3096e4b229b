"""The vision transformer that D-iGPT trains, and what it is given: normalised pictures, patches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgpt_jax import transformer
from dgpt_jax.remat import rematerialised

# Of ImageNet's pixels in [0, 1]; what students see, and what exports carry.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def patch_bias_init(fan_in: int):
    """torch's default for a convolution's bias, U(±1/√fan_in), which the official code keeps."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Encoder(nn.Module):
    """The vision transformer that D-iGPT trains.

    In pretraining its parts are called one by one (digpt.py); calling the module is use (heads.py).
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
        self.blocks = rematerialised(transformer.Block, self.remat)(
            self.heads, self.mlp_ratio, self.activation, self.eps, self.dtype
        )

    def embed(self, images):
        """Normalised images (B, height, width, 3) to patch tokens (B, rows, cols, D)."""
        return self.patch_embed(patchify(images.astype(self.dtype), self.patch))

    def transform(self, x_BND, mask_NM=None, paths_LB2=None):
        """Tokens through all blocks: the last residual, and what each block got (L, B, N, D)."""
        return transformer.scan_blocks(self.blocks, self.depth, x_BND, mask_NM, paths_LB2)

    def __call__(self, images, positions, paths_LB2=None):
        """Use: images (B, height, width, 3), positions (1, 1+N, D) to residuals (B, 1+N, D).

        CLS first, full attention, no final norm. paths_LB2: of `drop_paths`, in training.
        """
        return self.transform(self.enter(images, positions), None, paths_LB2)[0]

    def enter(self, images, positions):
        """What the first block gets in use: (B, 1+N, D)."""
        patches = self.embed(images)
        batch, _, _, width = patches.shape
        cls = jnp.broadcast_to(self.cls_token, (batch, 1, width))
        return jnp.concatenate([cls, patches.reshape(batch, -1, width)], axis=1) + positions


def drop_paths(key, batch: int, depth: int, rate: float):
    """Stochastic depth: weights (B, L, 2) of both branches of every block for every example.

    A branch is left out with a probability that grows evenly from 0 in the first block to `rate` in
    the last, and is otherwise scaled up, so that it is the same on average. Source: timm's
    DropPath.
    """
    keep = 1 - jnp.linspace(0, rate, depth)[:, None]
    return jax.random.bernoulli(key, keep, (batch, depth, 2)) / keep


def normalise(pictures, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Pictures uint8 (B, height, width, 3) as float32 with the given statistics taken out."""
    return (pictures.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def patchify(images, patch: int):
    """(B, height, width, 3) to (B, rows, cols, patch·patch·3), a patch's pixels row by row."""
    batch, height, width, channels = images.shape
    rows, cols = height // patch, width // patch
    if (rows * patch, cols * patch) != (height, width):
        raise ValueError(
            f"an image of {height}×{width} is not a whole number of {patch}-px patches"
        )
    x = images.reshape(batch, rows, patch, cols, patch, channels).swapaxes(2, 3)
    return x.reshape(batch, rows, cols, patch * patch * channels)


def encoder(model, dtype=jnp.float32) -> Encoder:
    """The Encoder of a `config.Model`."""
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
