"""The peer that tools/bench.py times beside ours: the same model and step in plain PyTorch.

    python tools/bench_torch.py --work=DIR

bench.py starts it on weights and a batch that it has written under DIR, and asks over the standard
input: `loss` for the losses of the batch in float32, `run N` for the seconds of N training steps.
It is what a good PyTorch user would write: fused QKV, scaled_dot_product_attention, bfloat16
autocast, fused AdamW, torch.compile.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from dgpt_jax import cli, vit
from dgpt_jax.config import Model
from dgpt_jax.schema import parse

with cli.needs("dgpt_jax[torch]"):
    import torch
    import torch.nn.functional as F
    from torch import nn

    from dgpt_jax.convert import digpt_torch


class Losses(nn.Module):
    """Both losses of a model on what is stored."""

    def __init__(self, model: digpt_torch.DiGPT):
        super().__init__()
        self.model = model

    def forward(self, pictures, stored, scale, order, mean, std):
        """Pictures uint8 (B, 3, size, size), stored tokens int8 (B, 1+M, C) to next, visible."""
        _, (ahead, seen) = self.model((pictures.float() / 255 - mean) / std, order)
        tokens, visible = stored.float() * scale, self.model.visible
        return (
            self.loss(ahead, tokens, order, slice(1, None)),
            self.loss(seen, tokens, order, slice(0, visible)),
        )

    def loss(self, predicted, tokens, order, places):
        side = round((tokens.shape[1] - 1) ** 0.5)
        target = self.model.split(tokens[:, 1:], (side, side))
        index = order[:, places, None, None].expand(-1, -1, *target.shape[2:])
        target = torch.gather(target, 1, index)
        down, across = self.model.segments
        small = (self.model.grid[0] // down, self.model.grid[1] // across)
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
        with cli.needs("timm"):
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
            model, state = parse(Model, told["model"]), load_file(work / "weights.safetensors")
            self.model = Losses(digpt_torch.build(model, state))
        self.model.to(self.device)
        arrays = np.load(work / "batch.npz", allow_pickle=False)
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
