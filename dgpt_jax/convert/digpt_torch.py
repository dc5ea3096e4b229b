"""What a file of the official layout computes: its pretraining forward pass in plain torch.

Source: `models_digpt.py` and `vit.py` of the official code. Positions and mask are read from the
file, as it does. Shape suffixes are those of digpt.py.
"""

from collections.abc import Callable, Mapping

import numpy as np

# `forward_encoder` returns the `kd` features first, and `forward` takes them as those of `ar`.
FEATURES = {"ar": "kd", "kd": "ar"}


def predictions(state: Mapping[str, np.ndarray], model, images, orders):
    """(residuals of all blocks (L, B, N, D), predictions of `ar` and `kd` (2, B, N, C)).

    state: an official state dict, of a resolved `config.Model`. images: normalised (B, size, size,
    3). orders: int (B, S).
    """
    import torch

    tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    inputs = (torch.from_numpy(np.array(x)) for x in (images, orders.astype(np.int64)))
    with torch.no_grad():
        blocks, decoded = _forward(tensors, model, *inputs)
    return torch.stack(blocks).numpy(), torch.stack(decoded).numpy()


def _forward(state, model, images, orders):
    import torch
    from torch.nn import functional

    linear, norm = _layers(state)
    mask, visible = state["mask"], orders.shape[1] - 1
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = functional.conv2d(images.permute(0, 3, 1, 2), kernel, bias, stride=model.patch)
    x = x.flatten(2).mT + state["pos_embed"][:, 1:]
    cls = state["cls_token"] + state["pos_embed"][:, :1]
    x = _joined(_ordered(x, orders, model)[:, :visible], cls)
    blocks = []
    for i in range(model.depth):
        name = f"blocks.{i}"
        x = x + _attend(linear, f"{name}.attn", norm(f"{name}.norm1", x), model.heads, mask)
        x = x + _mlp(linear, f"{name}.mlp", norm(f"{name}.norm2", x))
        blocks.append(x)
    positions = state["decoder_pos_embed"]
    places = _ordered(positions[:, 1:].expand(len(x), -1, -1), orders, model)
    decoded = []
    for one, queried in (("ar", places[:, 1:]), ("kd", places[:, :visible])):
        source = FEATURES[one]
        taps = [
            norm(f"{source}_enc_norm.{i}", blocks[tap - 1], eps=1e-5)
            for i, tap in enumerate(model.taps)
        ]
        kv = linear(f"{source}_enc2dec", torch.cat(taps, -1))
        kv = kv.unflatten(-1, (model.decoder_width, model.decoder_depth))
        token = state[f"{one}_token"]
        q = _joined(queried + token[:, None], token + positions[:, :1])
        for i in range(model.decoder_depth):
            name, heads = f"{one}_blocks.{i}", model.decoder_heads
            q = q + _attend(linear, f"{name}.attn1", norm(f"{name}.norm1", q), heads, mask)
            features = norm(f"{name}.norm2_2", kv[..., i])
            queries = norm(f"{name}.norm2_1", q)
            q = q + _attend(linear, f"{name}.attn2", queries, heads, mask, features)
            q = q + _mlp(linear, f"{name}.mlp", norm(f"{name}.norm2", q))
        decoded.append(linear(f"{one}_pred", norm(f"{one}_norm", q)))
    return blocks, decoded


def _layers(state) -> tuple[Callable, Callable]:
    """Linear and LayerNorm by the name of their weights."""
    from torch.nn import functional

    def linear(name, x):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps=1e-6):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    return linear, norm


def _attend(linear, name: str, x, heads: int, mask, features=None):
    """Attention of x to itself (one projection `qkv`) or to features (`q` and `kv`)."""
    from torch.nn import functional

    if features is None:
        q, k, v = linear(f"{name}.qkv", x).chunk(3, -1)
    else:
        q, (k, v) = linear(f"{name}.q", x), linear(f"{name}.kv", features).chunk(2, -1)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return linear(f"{name}.proj", mixed.transpose(1, 2).flatten(2))


def _mlp(linear, name: str, x):
    from torch.nn import functional

    return linear(f"{name}.fc2", functional.gelu(linear(f"{name}.fc1", x)))


def _ordered(x_BND, orders, model):
    """Patches (B, rows·cols, D) as segments in each image's order (B, S, T, D)."""
    rows, cols = model.segments
    x = x_BND.unflatten(1, (rows, model.grid // rows, cols, model.grid // cols))
    x_BSTD = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x_BSTD.take_along_dim(orders[:, :, None, None], dim=1)


def _joined(x_BVTD, cls):
    """Segments and CLS behind them as one sequence (B, V·T+1, D)."""
    import torch

    x_BND = x_BVTD.flatten(1, 2)
    return torch.cat([x_BND, cls.expand(len(x_BND), -1, -1)], dim=1)
