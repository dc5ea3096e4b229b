"""Vision towers of teachers in one module.

Sources: CLIP is `clip.py` of the official D-iGPT, after OpenAI's; SigLIP (arXiv 2303.15343),
DINOv2 (2304.07193, registers 2309.16588), DINOv3 (2508.10104), AIMv2 (2411.14402), TIPSv2 and
C-RADIO (2412.07679) are Hugging Face's classes; EVA-02-CLIP (2303.15389), the Perception Encoder
(2504.13181) and other towers of OpenCLIP are timm's.
"""

from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgpt_jax.data.normalization import CLIP_MEAN, CLIP_STD
from dgpt_jax.models import transformer, vit
from dgpt_jax.models.rope import Rope
from dgpt_jax.models.teacher_block import NORMS, TeacherBlock


@dataclass(frozen=True)
class TeacherArchitecture:
    """Architecture of a vision tower; the defaults are CLIP's.

    Sizes in pixels, widths in channels. `out_width`: None for a tower without a projection.
    `activation`: a name of transformer.ACTIVATIONS. `registers`: tokens that are dropped after the
    blocks; other class tokens than the first are among them. `norm`: of teacher_block.NORMS.
    `embed_norm`: a norm of the patches before their positions; `pre_norm`: of all tokens before the
    blocks; `attn_norm`, `mlp_norm`: within the blocks; `post_norm`: after them. `positions`: False
    without learned ones.
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
    positions: bool = True
    rope: Rope | None = None
    norm: str = "layer"
    embed_norm: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False
    post_norm: bool = True
    proj_bias: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        side = self.image_size // self.patch
        return side, side

    @property
    def token_width(self) -> int:
        """C, the width of the output tokens."""
        return self.width if self.out_width is None else self.out_width

    def describe(self) -> dict[str, Any]:
        """Returns the fields as JSON values, for metadata: those that CLIP, SigLIP and DINOv2 need,
        which the metadata of older stores have, and others where they are not the default."""
        values = asdict(self)
        names = [field.name for field in fields(self)]
        newer = names[names.index("positions") :]
        default = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in values.items() if k not in newer or v != default[k]}


class TeacherViT(nn.Module):
    """Computes all tokens after the final norm, and after CLIP's `proj`, the targets of D-iGPT."""

    tower: TeacherArchitecture
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Tokens (B, cls+N, C) float32, CLS first, of normalized images (B, size, size, 3)."""
        tower, batch = self.tower, len(images)
        normal = nn.initializers.normal(tower.width**-0.5)
        norm = partial(NORMS[tower.norm], tower.eps)
        covered = tower.grid[0] * tower.patch
        if covered != tower.image_size:  # like a convolution, which ignores incomplete patches
            images = images[:, :covered, :covered]
        patches = vit.patchify(images.astype(self.dtype), tower.patch)
        embed = nn.Dense(
            tower.width, use_bias=tower.patch_bias, dtype=self.dtype, name="patch_embed"
        )
        x = embed(patches.reshape(batch, -1, patches.shape[-1]))
        if tower.embed_norm:
            x = norm(name="embed_norm")(x)
        if tower.cls:
            cls = self.param("class_embedding", normal, (tower.width,))
            cls = jnp.broadcast_to(cls, (batch, 1, tower.width))
            x = jnp.concatenate([cls, x], axis=1)
        if tower.positions:
            x = x + self.param("positions", normal, (x.shape[1], tower.width))
        if tower.registers:
            registers = self.param("registers", normal, (tower.registers, tower.width))
            registers = jnp.broadcast_to(registers, (batch, tower.registers, tower.width))
            x = jnp.concatenate([x[:, : tower.cls], registers, x[:, tower.cls :]], axis=1)
        if tower.pre_norm:
            x = norm(name="ln_pre")(x)
        x = x.astype(jnp.float32)
        block = TeacherBlock(
            tower.heads,
            mlp_width=tower.mlp_width,
            activation=tower.activation,
            eps=tower.eps,
            dtype=self.dtype,
            layer_scale=tower.layer_scale,
            norm=tower.norm,
            rope=tower.rope,
            grid=tower.grid,
            attn_norm=tower.attn_norm,
            mlp_norm=tower.mlp_norm,
            name="blocks",
        )
        x, _ = transformer.scan_blocks(block, tower.depth, x, None, trained=False)
        if tower.registers:
            x = jnp.concatenate([x[:, : tower.cls], x[:, tower.cls + tower.registers :]], axis=1)
        if tower.post_norm:
            x = norm(name="ln_post")(x)
        if tower.out_width is None:
            return x
        proj = nn.Dense(tower.out_width, use_bias=tower.proj_bias, dtype=self.dtype, name="proj")
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
