"""Vision towers of teachers: CLIP's, SigLIP's and DINOv2's in one module.

Sources: CLIP is `clip.py` of the official D-iGPT, after OpenAI's; SigLIP (arXiv 2303.15343) and
DINOv2 (arXiv 2304.07193, registers 2309.16588) are Hugging Face's SiglipVisionModel, Dinov2Model
and Dinov2WithRegistersModel.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgpt_jax.data.normalization import CLIP_MEAN, CLIP_STD
from dgpt_jax.models import transformer, vit


@dataclass(frozen=True)
class TeacherArchitecture:
    """Architecture of a vision tower; the defaults are CLIP's.

    Sizes in pixels, widths in channels. `out_width`: None for a tower without a projection.
    `activation`: a name of transformer.ACTIVATIONS. `registers`: tokens that are dropped after the
    blocks.
    """

    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    out_width: int | None
    activation: str
    eps: float = 1e-5
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    cls: bool = True
    registers: int = 0
    pre_norm: bool = True
    patch_bias: bool = False
    layer_scale: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        side = self.image_size // self.patch
        return side, side

    @property
    def token_width(self) -> int:
        """C, the width of the output tokens."""
        return self.width if self.out_width is None else self.out_width


class TeacherViT(nn.Module):
    """Computes all tokens after the final norm, and after CLIP's `proj`, the targets of D-iGPT."""

    tower: TeacherArchitecture
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Tokens (B, cls+N, C) float32, CLS first, of normalized images (B, size, size, 3)."""
        tower, batch = self.tower, len(images)
        normal = nn.initializers.normal(tower.width**-0.5)
        covered = tower.grid[0] * tower.patch
        if covered != tower.image_size:  # like a convolution, which ignores incomplete patches
            images = images[:, :covered, :covered]
        patches = vit.patchify(images.astype(self.dtype), tower.patch)
        embed = nn.Dense(
            tower.width, use_bias=tower.patch_bias, dtype=self.dtype, name="patch_embed"
        )
        x = embed(patches.reshape(batch, -1, patches.shape[-1]))
        if tower.cls:
            cls = self.param("class_embedding", normal, (tower.width,))
            cls = jnp.broadcast_to(cls, (batch, 1, tower.width))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self.param("positions", normal, (x.shape[1], tower.width))
        if tower.registers:
            registers = self.param("registers", normal, (tower.registers, tower.width))
            registers = jnp.broadcast_to(registers, (batch, tower.registers, tower.width))
            x = jnp.concatenate([x[:, : tower.cls], registers, x[:, tower.cls :]], axis=1)
        if tower.pre_norm:
            x = transformer.LayerNorm(tower.eps, name="ln_pre")(x)
        block = transformer.Block(
            tower.heads,
            activation=tower.activation,
            eps=tower.eps,
            dtype=self.dtype,
            mlp_width=tower.mlp_width,
            layer_scale=tower.layer_scale,
            name="blocks",
        )
        x, _ = transformer.scan_blocks(block, tower.depth, x, None, trained=False)
        if tower.registers:
            x = jnp.concatenate([x[:, : tower.cls], x[:, tower.cls + tower.registers :]], axis=1)
        x = transformer.LayerNorm(tower.eps, name="ln_post")(x)
        if tower.out_width is None:
            return x
        proj = nn.Dense(tower.out_width, use_bias=False, dtype=self.dtype, name="proj")
        return proj(x.astype(self.dtype)).astype(jnp.float32)


def teacher_tokens(
    tower: TeacherArchitecture, params: Any, images: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """Tokens (B, cls+N, C) float32, CLS first if the tower has one, of uint8 images (B, …, …, 3).

    Images of another size than the tower's are resized first (antialiased bicubic).
    """
    images = images.astype(jnp.float32)
    if images.shape[1] != tower.image_size:
        shape = (len(images), tower.image_size, tower.image_size, 3)
        images = jnp.clip(jax.image.resize(images, shape, "cubic"), 0, 255)
    images = vit.normalize(images, tower.mean, tower.std)
    module = TeacherViT(tower, jnp.dtype(dtype))
    # apply returns a tuple only with mutable variables.
    return module.apply({"params": params}, images)  # pyright: ignore[reportReturnType]
