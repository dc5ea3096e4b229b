"""Check that an export, run in its own framework, computes the same as the source weights.

In float32 on the CPU. Frameworks are imported only when needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgpt_jax import invocation
from dgpt_jax.config import ModelConfig
from dgpt_jax.data import segments
from dgpt_jax.errors import UserError
from dgpt_jax.models import transformer
from dgpt_jax.weights import files, mapping, registry
from dgpt_jax.weights.layouts import digpt
from dgpt_jax.weights.types import Weights

# For features, in units of their standard deviation if that is above 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model on the fixed inputs.

    blocks: residual stream after every block (L, B, N, D), CLS first in an encoder, last in a
    pretraining model. features: (B, D); logits with a head; of a pretraining model the decoders'
    predictions (decoders, B, V·T+1, C).
    """

    blocks: np.ndarray
    features: np.ndarray


def images(model: ModelConfig) -> np.ndarray:
    """Fixed input images (2, size, size, 3), normalized."""
    size = model.image_size
    return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)


def orders(model: ModelConfig) -> np.ndarray:
    """Fixed segment orders (2, S) for a pretraining model."""
    rng = np.random.default_rng(0)
    return np.stack([segments.sample_order(rng, model.segments) for _ in range(2)])


def outputs(weights: Weights) -> Outputs:
    """Runs the JAX model on the fixed inputs.

    Block by block and decoder by decoder, since JAX copies its arguments: a single call would need
    a second copy of all parameters.
    """
    module, model = weights.module(), weights.model
    block = transformer.Block(model.heads, model.mlp_ratio, model.activation, model.eps)
    params = _outer_params(weights)
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        if weights.full:
            x, mask = module.apply(params, images(model), orders(model), method="embed_tokens")
        else:
            x, mask = module.apply(params, images(model), method="embed_tokens"), None
        blocks = []
        for i in range(model.depth):
            x = _step(block, _subtree(weights, "encoder/blocks/", i), x, mask)
            blocks.append(np.asarray(x))
        if not weights.full:
            features = np.asarray(module.apply(params, x, method="forward_head"))
            return Outputs(np.stack(blocks), features)
        taps = [blocks[tap - 1] for tap in model.taps]
        positions = module.apply(params, orders(model), model.grid, method="query_positions")
        predictions = []
        for name in weights.decoders:
            decoder = {name: _subtree(weights, f"{name}/")["params"]}
            variables = {"params": params["params"] | decoder}
            predictions.append(np.asarray(_decode(module, name, variables, taps, positions, mask)))
    return Outputs(np.stack(blocks), np.stack(predictions))


@partial(jax.jit, static_argnums=0)
def _step(block, variables, x, mask):
    return block.apply(variables, x, mask)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(module, name, variables, taps, positions, mask):
    return module.apply(variables, name, taps, positions, mask, method="decode")[name]


def _outer_params(weights: Weights) -> dict[str, Any]:
    """Variables without blocks and decoders."""
    inside = ("encoder/blocks/", "next/", "visible/", "direct/")
    flat = {p: x for p, x in weights.params.items() if not p.startswith(inside)}
    return {"params": mapping.unflatten(flat)}


def _subtree(weights: Weights, prefix: str, layer: Any = ...) -> dict[str, Any]:
    """Variables under a prefix; layer: index on the leading axis."""
    flat = {
        p.removeprefix(prefix): x[layer] for p, x in weights.params.items() if p.startswith(prefix)
    }
    return {"params": mapping.unflatten(flat)}


def _installation(framework: str) -> str:
    """How to install a framework, after a colon; "" for those that are no packages."""
    if framework not in ("timm", "torch", "transformers"):
        return ""
    if framework == "timm" and not invocation.IN_CLONE:  # in no extra, as it asks for torchvision
        return ": pip install timm"
    return f": {invocation.installation('parity')}"


def check(name: str, path: Path, weights: Weights, expected: Outputs) -> str:
    """Compares an export in layout `name` with `expected`; returns a line for the user.

    weights: those that were written; only their shapes are used. Raises UserError if the difference
    exceeds TOLERANCE.
    """
    framework, compute = FRAMEWORKS[name]
    try:
        version = _version(framework)
    except ImportError:
        return f"not verified: {framework} is not installed{_installation(framework)}"
    except Exception as e:  # a broken installation
        return f"not verified: {framework} cannot be imported: {e}"
    try:
        actual = compute(path, weights)
    except ImportError as e:  # transformers imports its modules lazily
        return f"not verified: {framework} cannot be used: {e.__cause__ or e}"
    if actual.blocks.shape != expected.blocks.shape:
        raise UserError(
            f"{framework} computes blocks of shape {actual.blocks.shape}, expected "
            f"{expected.blocks.shape}"
        )
    scale = max(1.0, float(expected.features.std()))
    worst = float(np.abs(actual.features - expected.features).max()) / scale
    by_block = np.abs(actual.blocks - expected.blocks).max(axis=(1, 2, 3))
    block = int(by_block.argmax())
    outputs = "decoder predictions" if weights.full else "features"
    summary = (
        f"{outputs} in {framework} {version} differ by at most {worst:.1e}, the worst block is "
        f"{block} ({by_block[block]:.1e})"
    )
    if not worst <= TOLERANCE:  # also fails on NaN
        raise UserError(f"{summary}: more than {TOLERANCE:.0e}, so the export was removed")
    return f"verified: {summary}"


def _version(framework: str) -> str:
    if framework == "big_vision":  # not a package
        raise ImportError
    return getattr(__import__(framework), "__version__", "")


def _timm(path: Path, weights: Weights) -> Outputs:
    import timm
    import torch

    model: Any = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    blocks = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: blocks.append(out.numpy()))
    with torch.no_grad():
        features = model(_torch_images(weights))
    return Outputs(np.stack(blocks), features.numpy())


def _hf(path: Path, weights: Weights) -> Outputs:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind: Any = transformers.ViTForImageClassification
    options = {}
    if not weights.num_classes:
        kind, options = transformers.ViTModel, {"add_pooling_layer": False}
    model, info = kind.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", **options
    )
    if problems := {key: names for key, names in info.items() if names}:
        raise UserError(f"transformers cannot load {path}: {problems}")
    with torch.no_grad():
        out = model.eval()(_torch_images(weights), output_hidden_states=True)
    features = out.logits if weights.num_classes else out.last_hidden_state[:, 0]
    return Outputs(torch.stack(out.hidden_states[1:]).numpy(), features.numpy())


def _official(path: Path, weights: Weights) -> Outputs:
    from dgpt_jax.weights import official_torch

    model, state = weights.model, files.read_state(path)
    assert set(state) == {e.name for e in digpt.entries(model)} | {
        copy for e in digpt.entries(model) for copy in e.copies
    } | set(digpt.FIXED)
    return Outputs(*official_torch.predictions(state, model, images(model), orders(model)))


def _torch_images(weights: Weights):
    import torch

    return torch.from_numpy(images(weights.model).transpose(0, 3, 1, 2).copy())


def _native(path: Path, weights: Weights) -> Outputs:
    return outputs(registry.read(path)[1])


# {layout: (package that reads it, function that runs it)}
FRAMEWORKS: dict[str, tuple[str, Callable[[Path, Weights], Outputs]]] = {
    "timm": ("timm", _timm),
    "hf": ("transformers", _hf),
    "digpt": ("torch", _official),
    "flax": ("dgpt_jax", _native),
    "safetensors": ("dgpt_jax", _native),
    "big_vision": ("big_vision", _native),
}
