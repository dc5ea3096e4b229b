"""The official pretraining model in plain PyTorch: what a file of its layout computes.

Source: `models_digpt.py` and `vit.py` of the official code, whose names the modules have: official
weights fit, with positions and mask, which the file holds too. It is what parity.py compares an
export with, and what tools/bench.py times beside ours. Imported only where torch is asked for.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dgpt_jax import segments
from dgpt_jax.convert import digpt

# Each decoder's features, by official names.
FEATURES = dict(digpt.DECODERS.values())


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention with a fused projection (`kv` False), or from queries to features."""

    def __init__(self, width: int, heads: int, cross: bool = False):
        super().__init__()
        self.heads = heads
        if cross:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, features=None, mask=None):
        parts = [self.qkv(x)] if features is None else [self.q(x), self.kv(features)]
        heads = []
        for part in parts:
            batch, tokens, width = part.shape
            split = part.view(batch, tokens, width // x.shape[-1], self.heads, -1)
            heads += split.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, hidden)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        for name in ("norm1", "norm2_1", "norm2_2", "norm2"):
            setattr(self, name, nn.LayerNorm(width, eps=1e-6))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads, cross=True)
        self.mlp = Mlp(width, hidden)

    def forward(self, q, features, mask):
        q = q + self.attn1(self.norm1(q), mask=mask)
        q = q + self.attn2(self.norm2_1(q), self.norm2_2(features), mask)
        return q + self.mlp(self.norm2(q))


class DiGPT(nn.Module):
    """The pretraining model of a resolved `config.Model`; C = `out_width`."""

    def __init__(self, model: dict, out_width: int):
        super().__init__()
        width, wide, ratio = model.width, model.decoder_width, model.mlp_ratio
        self.grid = (model.image_size // model.patch,) * 2
        self.segments, self.taps = tuple(model.segments), model.taps
        self.visible = segments.visible_count(self.segments)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, model.patch, model.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, model.heads, int(width * ratio)) for _ in range(model.depth)
        )
        for name in ("ar", "kd"):
            depth = model.decoder_depth
            shared = nn.LayerNorm(width, eps=1e-5)
            made = {
                "token": nn.Parameter(torch.zeros(1, 1, wide)),
                "enc_norm": nn.ModuleList([shared] * len(self.taps)),
                "enc2dec": nn.Linear(width * len(self.taps), wide * depth),
                "blocks": nn.ModuleList(
                    DecoderBlock(wide, model.decoder_heads, int(wide * ratio)) for _ in range(depth)
                ),
                "norm": nn.LayerNorm(wide, eps=1e-6),
                "pred": nn.Linear(wide, out_width),
            }
            for part, value in made.items():
                setattr(self, f"{name}_{part}", value)
        count = 1 + self.grid[0] * self.grid[1]
        tokens = self.visible * (count - 1) // segments.count(self.segments) + 1
        self.register_buffer("mask", torch.zeros(tokens, tokens))
        self.register_buffer("pos_embed", torch.zeros(1, count, width))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, count, wide))

    def place(self, table, order, places: slice):
        """Rows of a raster (B or 1, N, D) in the segments at some places of each image's order."""
        split = self.split(table)
        index = order[:, places, None, None].expand(-1, -1, *split.shape[2:])
        return torch.gather(split.expand(len(order), -1, -1, -1), 1, index).flatten(1, 2)

    def split(self, table, grid=None):
        """(B, N, D) in raster order to (B, S, T, D)."""
        rows, cols = grid or self.grid
        down, across = self.segments
        x = table.view(len(table), down, rows // down, across, cols // across, -1)
        return x.transpose(2, 3).reshape(len(table), down * across, -1, table.shape[-1])

    def forward(self, images, order):
        """Of normalised images (B, 3, size, size) and orders (B, S), the residuals of all blocks
        (B, N, D), and what `ar` and `kd` predict (B, N, C)."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        seen, unseen = slice(0, self.visible), slice(1, None)
        cls = self.cls_token.expand(len(x), -1, -1) + self.pos_embed[:, :1]
        x = torch.cat([self.place(x, order, seen), cls], dim=1)
        mask, blocks = self.mask == 0, []
        for block in self.blocks:
            x = block(x, mask)
            blocks.append(x)
        taps = [blocks[depth - 1] for depth in self.taps]
        places = {"ar": unseen, "kd": seen}
        return blocks, [self.decode(name, taps, order, places[name], mask) for name in FEATURES]

    def decode(self, name, taps, order, places, mask):
        """What one decoder predicts, (B, N, C) float32."""
        source = FEATURES[name]
        norms = getattr(self, f"{source}_enc_norm")
        features = torch.cat([norm(tap) for norm, tap in zip(norms, taps, strict=True)], dim=-1)
        features = getattr(self, f"{source}_enc2dec")(features)
        blocks = getattr(self, f"{name}_blocks")
        features = features.unflatten(-1, (-1, len(blocks)))
        positions = self.place(self.decoder_pos_embed[:, 1:], order, places)
        cls = self.decoder_pos_embed[:, :1].expand(len(order), -1, -1)
        q = getattr(self, f"{name}_token") + torch.cat([positions, cls], dim=1)
        for i, block in enumerate(blocks):
            q = block(q, features[..., i], mask)
        return getattr(self, f"{name}_pred")(getattr(self, f"{name}_norm")(q)).float()


def build(model, state: Mapping[str, np.ndarray]) -> DiGPT:
    """The module of a resolved `config.Model` with an official state dict, which is copied once."""
    with torch.device("meta"):
        made = DiGPT(model, len(state["ar_pred.weight"]))
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    made.load_state_dict(tensors, assign=True)
    return made


def predictions(state: Mapping[str, np.ndarray], model, images, orders):
    """(residuals of all blocks (L, B, N, D), predictions of `ar` and `kd` (2, B, N, C)).

    images: normalised (B, size, size, 3). orders: int (B, S).
    """
    images = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    orders = torch.from_numpy(np.array(orders, np.int64))
    with torch.no_grad():
        blocks, decoded = build(model, state)(images, orders)
    return torch.stack(blocks).numpy(), torch.stack(decoded).numpy()
