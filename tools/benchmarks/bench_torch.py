"""PyTorch peer of bench.py: the same model and training step.

    python -m tools.benchmarks.bench_torch --work=DIR

bench.py writes weights and a batch to DIR, starts this script and sends requests on stdin: `loss`
for the losses of the batch in float32, `run N` for the seconds of N training steps. Uses the usual
optimizations: fused QKV, scaled_dot_product_attention, bfloat16 autocast, fused AdamW,
torch.compile.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dgpt_jax import cli
from dgpt_jax.config import ModelConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data.normalization import IMAGENET_MEAN, IMAGENET_STD

with cli.needs("torch"):
    import torch
    import torch.nn.functional as F
    from torch import nn

    from dgpt_jax.weights import official_torch


class Losses(nn.Module):
    """Both losses of a model on stored tokens."""

    def __init__(self, model: official_torch.DiGPT):
        super().__init__()
        self.model = model

    def forward(self, images, stored, scale, order, mean, std):
        """(next, visible) of images, uint8 (B, 3, size, size), and tokens, int8 (B, 1+M, C)."""
        _, (next_pred, visible_pred) = self.model((images.float() / 255 - mean) / std, order)
        tokens, visible = stored.float() * scale, self.model.visible
        return (
            self.loss(next_pred, tokens, order, slice(1, None)),
            self.loss(visible_pred, tokens, order, slice(0, visible)),
        )

    def loss(self, predicted, tokens, order, ranks):
        side = round((tokens.shape[1] - 1) ** 0.5)
        target = self.model.split(tokens[:, 1:], (side, side))
        index = order[:, ranks, None, None].expand(-1, -1, *target.shape[2:])
        target = torch.gather(target, 1, index)
        rows, columns = self.model.segments
        grid = (self.model.grid[0] // rows, self.model.grid[1] // columns)
        target_grid = (side // rows, side // columns)
        x = predicted[:, :-1].unflatten(1, (target.shape[1], -1))
        if grid != target_grid:
            x = x.transpose(2, 3).unflatten(3, grid).flatten(0, 1)
            x = F.interpolate(x, target_grid, mode="bilinear")
            x = x.flatten(2).transpose(1, 2).view_as(target)
        pairs = torch.cat([2 - 2 * cosine(x, target).flatten(1),
                           2 - 2 * cosine(predicted[:, -1:], tokens[:, :1])], dim=1)  # fmt: skip
        return pairs.mean()


def cosine(a, b):
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


class TimmBlocks(nn.Module):
    """Blocks of a timm model on as many tokens as our encoder sees."""

    blocks: nn.Sequential
    input: nn.Parameter

    def __init__(self, name: str, tokens: int):
        super().__init__()
        with cli.needs("parity"):
            import timm

        vit_model: Any = timm.create_model(name)
        self.blocks, self.tokens = vit_model.blocks, tokens
        self.input = nn.Parameter(torch.zeros(1, tokens, vit_model.embed_dim))

    def forward(self, images, *_):
        x = self.input + torch.zeros(len(images), 1, 1, device=images.device)
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean(), x.new_zeros(())


class Peer:
    """Model, batch and training step from the files of bench.py in `work`."""

    def __init__(self, work: Path, kind: str):
        settings = json.loads((work / "bench.json").read_text())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.bfloat16 = settings["dtype"] == "bfloat16"
        if kind == "timm":
            self.model = TimmBlocks(settings["timm"], settings["tokens"])
        else:
            model = parse(ModelConfig, settings["model"])
            state = load_file(work / "weights.safetensors")
            self.model = Losses(official_torch.build(model, state))
        self.model.to(self.device)
        arrays = np.load(work / "batch.npz", allow_pickle=False)
        images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2).contiguous()
        shape = (1, 3, 1, 1)
        batch = (
            images, torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["scale"]),
            torch.from_numpy(arrays["order"]).long(),
            *(torch.tensor(x).view(shape) for x in (IMAGENET_MEAN, IMAGENET_STD)),
        )  # fmt: skip
        self.batch = [x.to(self.device) for x in batch]
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        undecayed = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": undecayed, "weight_decay": 0.0}],
            lr=1e-4, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip
        self.compiled = torch.compile(self.model)

    def losses(self) -> list[float]:
        """Losses of the batch in float32, not compiled."""
        with torch.no_grad():
            return [float(x) for x in self.model(*self.batch)]

    def run(self, steps: int) -> float:
        """Seconds of `steps` training steps."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
                next_loss, visible_loss = self.compiled(*self.batch)
            (next_loss + visible_loss).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory written by tools/benchmarks/bench.py"
    )
    parser.add_argument("--kind", choices=("torch", "timm"), default="torch")
    args = parser.parse_args()
    peer = Peer(args.work, args.kind)
    for line in sys.stdin:
        command, *words = line.split()
        answer = peer.losses() if command == "loss" else peer.run(int(words[0]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
