"""Small random encoders in published layouts, each with its residuals in its own framework.

Architecture: 16×16 pixels, 4×4 patches, width 24, 3 blocks, 2 heads, like data.TINY.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dgpt_jax.data import segments
from dgpt_jax.weights import files
from tests.support import parity
from tests.support.conversions import change_json

Residual = Callable[[np.ndarray], np.ndarray]
"""Last residual (B, 1+N, D), CLS first, of normalized images (B, 16, 16, 3)."""


def timm(directory: Path, positions: np.ndarray | None = None) -> tuple[Path, Residual]:
    """Weights and config.json of a timm model; positions replace random ones."""
    model, state = _vision_transformer(positions)
    path = directory / "model.safetensors"
    files.write_safetensors(path, state, {"format": "pt"})
    change_json(directory, {"config.json": {"model_args.num_heads": 2}})
    return path, _last_block(model)


def mae(directory: Path) -> tuple[Path, Residual]:
    """A checkpoint of MAE, with sin-cos positions computed in float64 as in its code."""
    torch = pytest.importorskip("torch")
    model, state = _vision_transformer(_sincos_float64())
    state |= {"mask_token": np.zeros((1, 1, 8), np.float32)}
    state |= {"decoder_embed.weight": np.zeros((8, 24), np.float32)}
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    torch.save({"model": tensors, "epoch": 1}, directory / "mae.pth")
    return directory / "mae.pth", _last_block(model)


def hf(directory: Path) -> tuple[Path, Residual]:
    """A ViTModel as saved by transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**_hf_sizes(), intermediate_size=96)
    return _saved(directory, transformers.ViTModel(config))


def dinov2(directory: Path) -> tuple[Path, Residual]:
    """A Dinov2Model as saved by transformers, with LayerScale."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(**_hf_sizes(), mlp_ratio=4)
    return _saved(directory, transformers.Dinov2Model(config))


def _vision_transformer(positions: np.ndarray | None):
    """(randomized model of timm, its state dict)."""
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("timm").models
    model = models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0
    )
    model = parity.randomize(model)
    if positions is not None:
        model.pos_embed.data = torch.tensor(positions)
    return model, {name: x.numpy() for name, x in model.state_dict().items()}


def _last_block(model) -> Residual:
    import torch

    def residual(images: np.ndarray) -> np.ndarray:
        blocks = []
        hook = model.blocks[-1].register_forward_hook(lambda *args: blocks.append(args[-1]))
        with torch.no_grad():
            model(torch.tensor(images.transpose(0, 3, 1, 2).copy()))
        hook.remove()
        return blocks[0].numpy()

    return residual


def _hf_sizes() -> dict[str, int]:
    return dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16,
                patch_size=4)  # fmt: skip


def _saved(directory: Path, model) -> tuple[Path, Residual]:
    import torch

    model = parity.randomize(model)
    model.save_pretrained(directory)

    def residual(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            images_t = torch.tensor(images.transpose(0, 3, 1, 2).copy())
            return model(images_t, output_hidden_states=True).hidden_states[-1].numpy()

    return directory, residual


def _sincos_float64() -> np.ndarray:
    """Positions (1, 17, 24) of MAE's util/pos_embed.py, CLS zero."""
    omega = 1 / 10000 ** (np.arange(6, dtype=np.float64) / 6)
    row, col = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")

    def encode(position):
        angle = position.reshape(-1)[:, None] * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    table = np.concatenate([encode(col), encode(row)], axis=1)
    assert np.abs(table - segments.sincos_positions(24, 4, 4).reshape(16, 24)).max() < 1e-6
    return np.concatenate([np.zeros((1, 24)), table])[None].astype(np.float32)


MAKERS = {"timm": timm, "hf": hf, "mae": mae, "dinov2": dinov2}
# Config of a run that starts from each, beside data.TINY.
SETTINGS = {
    "timm": {"model": {"positions": "learned"}},
    "hf": {
        "model": {"positions": "learned", "eps": 1e-12},
        "data": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    },
    "mae": {},
    "dinov2": {"model": {"positions": "learned"}},
}
