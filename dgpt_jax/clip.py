"""CLIP's vision tower: the teacher. Source: `clip.py` of the official D-iGPT, after OpenAI's."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgpt_jax import vit

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Tower:
    """What a tower is, apart from its weights. Sizes in pixels; `mlp_width` in channels."""

    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    out_width: int
    activation: str
    eps: float = 1e-5
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        return (self.image_size // self.patch,) * 2


class ClipTower(nn.Module):
    """Images to all tokens after `ln_post` and `proj`, as D-iGPT's targets are."""

    tower: Tower
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        """Normalised images (B, size, size, 3) to tokens (B, 1+N, C) float32, CLS first."""
        tower, normal = self.tower, nn.initializers.normal(self.tower.width**-0.5)
        patches = vit.patchify(images.astype(self.dtype), tower.patch)
        embed = nn.Dense(tower.width, use_bias=False, dtype=self.dtype, name="patch_embed")
        x = embed(patches.reshape(len(images), -1, patches.shape[-1]))
        cls = self.param("class_embedding", normal, (tower.width,))
        cls = jnp.broadcast_to(cls, (len(images), 1, tower.width))
        positions = self.param("positions", normal, (1 + x.shape[1], tower.width))
        x = jnp.concatenate([cls, x], axis=1) + positions
        x = vit.layer_norm(tower.eps, "ln_pre")(x)
        ratio = tower.mlp_width / tower.width
        block = vit.Block(
            tower.heads, ratio, tower.activation, tower.eps, self.dtype, name="blocks"
        )
        x, _ = vit.scan_blocks(block, tower.depth, x, None)
        x = vit.layer_norm(tower.eps, "ln_post")(x).astype(self.dtype)
        proj = nn.Dense(tower.out_width, use_bias=False, dtype=self.dtype, name="proj")
        return proj(x).astype(jnp.float32)


def teacher_tokens(tower: Tower, params, pictures, dtype=jnp.float32):
    """Pictures uint8 (B, size, size, 3) to tokens (B, 1+N, C) float32, CLS first.

    Pictures of another size than the tower's are resized first (antialiased bicubic).
    """
    images = pictures.astype(jnp.float32)
    if images.shape[1] != tower.image_size:
        shape = (len(images), tower.image_size, tower.image_size, 3)
        images = jnp.clip(jax.image.resize(images, shape, "cubic"), 0, 255)
    images = vit.normalise(images, tower.mean, tower.std)
    return ClipTower(tower, jnp.dtype(dtype)).apply({"params": params}, images)
