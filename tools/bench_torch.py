"""The peer that tools/bench.py times beside ours: the same model and step in plain PyTorch.

    python tools/bench_torch.py --work=DIR

bench.py starts it on weights and a batch that it has written under DIR, and asks over the standard
input: `loss` for the losses of the batch in float32, `run N` for the seconds of N training steps.
It is what a good PyTorch user would write: fused QKV, scaled_dot_product_attention, bfloat16
autocast, fused AdamW, torch.compile. Names of modules are those of the official `models_digpt.py`,
so that official weights fit it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from dgpt_jax import segments, vit


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
    """The pretraining model of a `config.Model` as a dict; C = `out_width`."""

    def __init__(self, model: dict, out_width: int):
        super().__init__()
        width, wide, ratio = model["width"], model["decoder_width"], model["mlp_ratio"]
        self.grid = (model["image_size"] // model["patch"],) * 2
        self.segments, self.taps = tuple(model["segments"]), model["taps"]
        self.visible = segments.visible_count(self.segments)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, width, model["patch"], model["patch"])}
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, model["heads"], int(width * ratio)) for _ in range(model["depth"])
        )
        for name in ("ar", "kd"):
            depth = model["decoder_depth"]
            shared = nn.LayerNorm(width, eps=1e-5)
            made = {
                "token": nn.Parameter(torch.zeros(1, 1, wide)),
                "enc_norm": nn.ModuleList([shared] * len(self.taps)),
                "enc2dec": nn.Linear(width * len(self.taps), wide * depth),
                "blocks": nn.ModuleList(
                    DecoderBlock(wide, model["decoder_heads"], int(wide * ratio))
                    for _ in range(depth)
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

    def forward(self, pictures, stored, scale, order, mean, std):
        """Pictures uint8 (B, 3, size, size), stored tokens int8 (B, 1+M, C) to both losses."""
        images = (pictures.float() / 255 - mean) / std
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        seen, unseen = slice(0, self.visible), slice(1, None)
        cls = self.cls_token.expand(len(x), -1, -1) + self.pos_embed[:, :1]
        x = torch.cat([self.place(x, order, seen), cls], dim=1)
        mask, taps = self.mask == 0, []
        for depth, block in enumerate(self.blocks, 1):
            x = block(x, mask)
            if depth in self.taps:
                taps.append(x)
        tokens = stored.float() * scale
        # The official forward hands each decoder the other's features.
        predicted = self.decode("ar", "kd", taps, order, unseen, mask)
        generative = self.loss(predicted, tokens, order, unseen)
        predicted = self.decode("kd", "ar", taps, order, seen, mask)
        return generative, self.loss(predicted, tokens, order, seen)

    def decode(self, name, source, taps, order, places, mask):
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

    def loss(self, predicted, tokens, order, places):
        side = round((tokens.shape[1] - 1) ** 0.5)
        target = self.split(tokens[:, 1:], (side, side))
        index = order[:, places, None, None].expand(-1, -1, *target.shape[2:])
        target = torch.gather(target, 1, index)
        down, across = self.segments
        small = (self.grid[0] // down, self.grid[1] // across)
        x = predicted[:, :-1].unflatten(1, (target.shape[1], -1))
        if small != (side // down, side // across):
            x = x.transpose(2, 3).unflatten(3, small).flatten(0, 1)
            x = F.interpolate(x, (side // down, side // across), mode="bilinear")
            x = x.flatten(2).transpose(1, 2).view_as(target)
        pairs = torch.cat([2 - 2 * cosine(x, target).flatten(1),
                           2 - 2 * cosine(predicted[:, -1:], tokens[:, :1])], dim=1)  # fmt: skip
        return pairs.mean()


def cosine(a, b):
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


class TimmBlocks(nn.Module):
    """Forward and backward through timm's blocks of a size, on as many tokens as ours see."""

    def __init__(self, name: str, tokens: int):
        super().__init__()
        import timm

        vit_model = timm.create_model(name)
        self.blocks, self.tokens = vit_model.blocks, tokens
        self.input = nn.Parameter(torch.zeros(1, tokens, vit_model.embed_dim))

    def forward(self, pictures, *_):
        x = self.input + torch.zeros(len(pictures), 1, 1, device=pictures.device)
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean(), x.new_zeros(())


class Peer:
    """Model, batch and step of what bench.py wrote under `work`."""

    def __init__(self, work: Path, kind: str):
        told = json.loads((work / "bench.json").read_text())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.bfloat16 = told["dtype"] == "bfloat16"
        if kind == "timm":
            self.model = TimmBlocks(told["timm"], told["tokens"])
        else:
            self.model = DiGPT(told["model"], told["out_width"])
            self.model.load_state_dict(load_file(work / "weights.safetensors"))
        self.model.to(self.device)
        arrays = np.load(work / "batch.npz")
        images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2).contiguous()
        shape = (1, 3, 1, 1)
        batch = (
            images, torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["scale"]),
            torch.from_numpy(arrays["order"]).long(),
            torch.tensor(vit.IMAGENET_MEAN).view(shape), torch.tensor(vit.IMAGENET_STD).view(shape),
        )  # fmt: skip
        self.batch = [x.to(self.device) for x in batch]
        decays = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=1e-4, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip
        self.compiled = torch.compile(self.model)

    def losses(self) -> list[float]:
        """Of the batch, in float32, not compiled."""
        with torch.no_grad():
            return [float(x) for x in self.model(*self.batch)]

    def run(self, steps: int) -> float:
        """Seconds of so many training steps."""
        self.wait()
        began = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
                first, second = self.compiled(*self.batch)
            (first + second).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.wait()
        return time.perf_counter() - began

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def main():
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--work", type=Path, required=True, help="what tools/bench.py has written")
    made.add_argument("--kind", choices=("torch", "timm"), default="torch")
    args = made.parse_args()
    peer = Peer(args.work, args.kind)
    for line in sys.stdin:
        command, *words = line.split()
        answer = peer.losses() if command == "loss" else peer.run(int(words[0]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
