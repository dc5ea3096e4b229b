"""Whether what was written computes what was read, in the framework that it was written for.

All is float32 on the CPU. No framework is imported before it is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from dgpt_jax import segments, transformer
from dgpt_jax.convert import digpt, files, formats, layout
from dgpt_jax.convert.weights import Weights
from dgpt_jax.schema import UserError

# Of features, in units of their standard deviation where that is above 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outputs:
    """blocks: residuals after every block (L, B, N, D), CLS first in use, last in pretraining.

    features: (B, D); logits where there is a head; of a pretraining model, what its decoders
    predict, (decoders, B, V·T+1, C).
    """

    blocks: np.ndarray
    features: np.ndarray


def images(model) -> np.ndarray:
    """The fixed inputs: normalised images (2, size, size, 3)."""
    size = model.image_size
    return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)


def orders(model) -> np.ndarray:
    """The fixed orders of segments (2, S), for a pretraining model."""
    rng = np.random.default_rng(0)
    return np.stack([segments.sample_order(rng, model.segments) for _ in range(2)])


def outputs(weights: Weights) -> Outputs:
    """What weights compute here.

    A block, or a decoder, after the other: JAX copies what it is given, and must not be given all
    at once.
    """
    module, model = weights.module(), weights.model
    block = transformer.Block(model.heads, model.mlp_ratio, model.activation, model.eps)
    outside = _outside(weights)
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        if weights.full:
            x, mask = module.apply(outside, images(model), orders(model), method="enter")
        else:
            x, mask = module.apply(outside, images(model), method="enter"), None
        blocks = []
        for i in range(model.depth):
            x = _step(block, {"params": _part(weights, "encoder/blocks/", i)}, x, mask)
            blocks.append(np.asarray(x))
        if not weights.full:
            return Outputs(np.stack(blocks), np.asarray(module.apply(outside, x, method="leave")))
        taps = [blocks[tap - 1] for tap in model.taps]
        places = module.apply({}, orders(model), model.grid, method="query_positions")
        predicted = []
        for name in module.decoders:
            params = {"params": {name: _part(weights, f"{name}/")}}
            predicted.append(np.asarray(_decode(module, name, params, taps, places, mask)))
    return Outputs(np.stack(blocks), np.stack(predicted))


@partial(jax.jit, static_argnums=0)
def _step(block, params, x, mask):
    return block.apply(params, x, mask)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(module, name, params, taps, places, mask):
    return module.apply(params, name, taps, places, mask, method="decode")


def _outside(weights: Weights) -> dict:
    """Variables without blocks and decoders."""
    inside = ("encoder/blocks/", "next/", "visible/", "direct/")
    flat = {p: x for p, x in weights.params.items() if not p.startswith(inside)}
    return {"params": layout.unflatten(flat)}


def _part(weights: Weights, prefix: str, layer=...) -> dict:
    """Nested parameters under a prefix, of one layer where it is told."""
    flat = {
        p.removeprefix(prefix): x[layer] for p, x in weights.params.items() if p.startswith(prefix)
    }
    return layout.unflatten(flat)


def check(name: str, path: Path, weights: Weights, expected: Outputs) -> str:
    """A line that says how far an export is from `expected`. Raises UserError where it is too far.

    weights: what was written; of them only the geometry is read.
    """
    framework, compute = FRAMEWORKS[name]
    try:
        version = _version(framework)
    except ImportError:
        return f"not verified: {framework} is not installed"
    except Exception as e:  # a package that is there and broken
        return f"not verified: {framework} cannot be imported: {e}"
    try:
        found = compute(path, weights)
    except ImportError as e:  # transformers imports its parts, and theirs, when they are used
        return f"not verified: {framework} cannot be used: {e.__cause__ or e}"
    if found.blocks.shape != expected.blocks.shape:
        raise UserError(f"{framework} computes {found.blocks.shape}, not {expected.blocks.shape}")
    scale = max(1.0, float(expected.features.std()))
    worst = float(np.abs(found.features - expected.features).max()) / scale
    by_block = np.abs(found.blocks - expected.blocks).max(axis=(1, 2, 3))
    block = int(by_block.argmax())
    what = "predictions of the decoders" if weights.full else "features"
    told = (
        f"{what} in {framework} {version} differ by at most {worst:.1e}, the worst block is "
        f"{block} ({by_block[block]:.1e})"
    )
    if not worst <= TOLERANCE:  # NaN is too far, too
        raise UserError(f"{told}: more than {TOLERANCE:.0e}, the export is removed")
    return f"verified: {told}"


def _version(framework: str) -> str:
    if framework == "big_vision":  # not a package: its own script lives in its repository
        raise ImportError
    return getattr(__import__(framework), "__version__", "")


def _timm(path: Path, weights: Weights) -> Outputs:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
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
    kind, more = transformers.ViTForImageClassification, {}
    if not weights.num_classes:
        kind, more = transformers.ViTModel, {"add_pooling_layer": False}
    model, info = kind.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", **more
    )
    wrong = {what: names for what, names in info.items() if names}
    if wrong:
        raise UserError(f"transformers cannot load {path}: {wrong}")
    with torch.no_grad():
        out = model.eval()(_torch_images(weights), output_hidden_states=True)
    features = out.logits if weights.num_classes else out.last_hidden_state[:, 0]
    return Outputs(torch.stack(out.hidden_states[1:]).numpy(), features.numpy())


def _official(path: Path, weights: Weights) -> Outputs:
    from dgpt_jax.convert import digpt_torch

    model, state = weights.model, files.read_state(path)
    assert set(state) == {e.name for e in digpt.entries(model)} | {
        copy for e in digpt.entries(model) for copy in e.copies
    } | set(digpt.FIXED)
    return Outputs(*digpt_torch.predictions(state, model, images(model), orders(model)))


def _torch_images(weights: Weights):
    import torch

    return torch.from_numpy(images(weights.model).transpose(0, 3, 1, 2).copy())


def _ours(path: Path, weights: Weights) -> Outputs:
    return outputs(formats.read(path)[1])


# By layout: the package that reads it, and what it computes.
FRAMEWORKS: dict[str, tuple[str, Callable[[Path, Weights], Outputs]]] = {
    "timm": ("timm", _timm),
    "hf": ("transformers", _hf),
    "digpt": ("torch", _official),
    "flax": ("dgpt_jax", _ours),
    "safetensors": ("dgpt_jax", _ours),
    "big_vision": ("big_vision", _ours),
}
