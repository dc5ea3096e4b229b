"""The official pretraining model in plain PyTorch.

Source: `models_digpt.py` and `vit.py` of the official code, with its module names, so that official
state dicts load, positions and mask included. parity.py compares exports with it and
tools/benchmarks/bench.py times it. Imported only where torch is needed.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dgpt_jax.config import ModelConfig
from dgpt_jax.data import segments
from dgpt_jax.weights.layouts import digpt

# {decoder: encoder features that it reads}, by official names.
FEATURES = dict(digpt.DECODERS.values())


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention with a fused projection, or (`cross`) attention from queries to features."""

    def __init__(self, width: int, heads: int, cross: bool = False):
        super().__init__()
        self.heads = heads
        if cross:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: torch.Tensor,
        features: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        projections = [self.qkv(x)] if features is None else [self.q(x), self.kv(features)]
        qkv = []
        for projection in projections:
            batch, tokens, width = projection.shape
            stacked = projection.view(batch, tokens, width // x.shape[-1], self.heads, -1)
            qkv += stacked.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, hidden)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    norm1: nn.LayerNorm
    norm2_1: nn.LayerNorm
    norm2_2: nn.LayerNorm
    norm2: nn.LayerNorm

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        for name in ("norm1", "norm2_1", "norm2_2", "norm2"):
            setattr(self, name, nn.LayerNorm(width, eps=1e-6))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads, cross=True)
        self.mlp = Mlp(width, hidden)

    def forward(self, q: torch.Tensor, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = q + self.attn1(self.norm1(q), mask=mask)
        q = q + self.attn2(self.norm2_1(q), self.norm2_2(features), mask)
        return q + self.mlp(self.norm2(q))


class DiGPT(nn.Module):
    """The pretraining model of a resolved `ModelConfig`; C = `out_width`."""

    mask: torch.Tensor
    pos_embed: torch.Tensor
    decoder_pos_embed: torch.Tensor

    def __init__(self, model: ModelConfig, out_width: int):
        super().__init__()
        width, wide, ratio = model.width, model.decoder_width, model.mlp_ratio
        self.grid = (model.image_size // model.patch,) * 2
        self.segments, self.taps = model.segments, model.taps
        self.visible = segments.visible_count(self.segments)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, model.patch, model.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, model.heads, int(width * ratio)) for _ in range(model.depth)
        )
        for name in ("ar", "kd"):
            depth = model.decoder_depth
            shared = nn.LayerNorm(width, eps=1e-5)
            modules = {
                "token": nn.Parameter(torch.zeros(1, 1, wide)),
                "enc_norm": nn.ModuleList([shared] * len(self.taps)),
                "enc2dec": nn.Linear(width * len(self.taps), wide * depth),
                "blocks": nn.ModuleList(
                    DecoderBlock(wide, model.decoder_heads, int(wide * ratio)) for _ in range(depth)
                ),
                "norm": nn.LayerNorm(wide, eps=1e-6),
                "pred": nn.Linear(wide, out_width),
            }
            for key, value in modules.items():
                setattr(self, f"{name}_{key}", value)
        count = 1 + self.grid[0] * self.grid[1]
        tokens = self.visible * (count - 1) // segments.count(self.segments) + 1
        self.register_buffer("mask", torch.zeros(tokens, tokens))
        self.register_buffer("pos_embed", torch.zeros(1, count, width))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, count, wide))

    def take_segments(self, table: torch.Tensor, order: torch.Tensor, ranks: slice) -> torch.Tensor:
        """Rows of a raster (B or 1, N, D) in the segments at some ranks of each image's order."""
        blocks = self.split(table)
        index = order[:, ranks, None, None].expand(-1, -1, *blocks.shape[2:])
        return torch.gather(blocks.expand(len(order), -1, -1, -1), 1, index).flatten(1, 2)

    def split(self, table: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, N, D) in raster order to (B, S, T, D)."""
        rows, cols = grid or self.grid
        down, across = self.segments
        x = table.view(len(table), down, rows // down, across, cols // across, -1)
        return x.transpose(2, 3).reshape(len(table), down * across, -1, table.shape[-1])

    def forward(
        self, images: torch.Tensor, order: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Residual streams of all blocks (B, N, D), and predictions of `ar` and `kd` (B, N, C).

        images: normalized (B, 3, size, size). order: (B, S).
        """
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        visible, predicted = slice(0, self.visible), slice(1, None)
        cls = self.cls_token.expand(len(x), -1, -1) + self.pos_embed[:, :1]
        x = torch.cat([self.take_segments(x, order, visible), cls], dim=1)
        mask, blocks = self.mask == 0, []
        for block in self.blocks:
            x = block(x, mask)
            blocks.append(x)
        taps = [blocks[depth - 1] for depth in self.taps]
        ranks = {"ar": predicted, "kd": visible}
        return blocks, [self.decode(name, taps, order, ranks[name], mask) for name in FEATURES]

    def decode(
        self,
        name: str,
        taps: list[torch.Tensor],
        order: torch.Tensor,
        ranks: slice,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Predictions of one decoder, (B, N, C) float32."""
        source = FEATURES[name]
        norms = getattr(self, f"{source}_enc_norm")
        features = torch.cat([norm(tap) for norm, tap in zip(norms, taps, strict=True)], dim=-1)
        features = getattr(self, f"{source}_enc2dec")(features)
        blocks = getattr(self, f"{name}_blocks")
        features = features.unflatten(-1, (-1, len(blocks)))
        positions = self.take_segments(self.decoder_pos_embed[:, 1:], order, ranks)
        cls = self.decoder_pos_embed[:, :1].expand(len(order), -1, -1)
        q = getattr(self, f"{name}_token") + torch.cat([positions, cls], dim=1)
        for i, block in enumerate(blocks):
            q = block(q, features[..., i], mask)
        return getattr(self, f"{name}_pred")(getattr(self, f"{name}_norm")(q)).float()


def build(model: ModelConfig, state: Mapping[str, np.ndarray]) -> DiGPT:
    """Module of a resolved `config.Model` with a copy of an official state dict."""
    with torch.device("meta"):
        module = DiGPT(model, len(state["ar_pred.weight"]))
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    module.load_state_dict(tensors, assign=True)
    return module


def predictions(
    state: Mapping[str, np.ndarray], model: ModelConfig, images: np.ndarray, orders: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(residual streams of all blocks (L, B, N, D), predictions of `ar` and `kd` (2, B, N, C)).

    images: normalized (B, size, size, 3). orders: int (B, S).
    """
    images_t = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    orders_t = torch.from_numpy(np.array(orders, np.int64))
    with torch.no_grad():
        blocks, decoded = build(model, state)(images_t, orders_t)
    return torch.stack(blocks).numpy(), torch.stack(decoded).numpy()
