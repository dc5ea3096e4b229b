"""Whether what was written computes what was read, in the framework that it was written for.

All is float32 on the CPU. No framework is imported before it is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dgpt_jax import vit
from dgpt_jax.convert import digpt, files, formats, layout
from dgpt_jax.convert.weights import Weights, encoder
from dgpt_jax.schema import UserError

# Of features, in units of their standard deviation where that is above 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outputs:
    """blocks: residuals after every block (L, B, 1+N, D), CLS first.

    features: (B, D), or logits where there is a head.
    """

    blocks: np.ndarray
    features: np.ndarray


def images(model) -> np.ndarray:
    """The fixed inputs: normalised images (2, size, size, 3)."""
    size = model.image_size
    return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)


def outputs(weights: Weights) -> Outputs:
    """What weights compute here; of a pretraining model, its encoder.

    A block after the other: JAX copies what it is given, and must not be given all at once.
    """
    weights = encoder(weights, None)
    module, model = weights.module(), weights.model
    block = vit.Block(model.heads, model.mlp_ratio, model.activation, model.eps)
    prefix = "encoder/blocks/"
    outside = {p: x for p, x in weights.params.items() if not p.startswith(prefix)}
    outside = {"params": layout.unflatten(outside)}
    step = jax.jit(block.apply)
    blocks = []
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        x = module.apply(outside, images(model), method="enter")
        for i in range(model.depth):
            params = {
                p.removeprefix(prefix): leaf[i]
                for p, leaf in weights.params.items()
                if p.startswith(prefix)
            }
            x = step({"params": layout.unflatten(params)}, x)
            blocks.append(np.asarray(x))
        features = module.apply(outside, x, method="leave")
    return Outputs(np.stack(blocks), np.asarray(features))


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
    found = compute(path, weights)
    if found.blocks.shape != expected.blocks.shape:
        raise UserError(f"{framework} computes {found.blocks.shape}, not {expected.blocks.shape}")
    scale = max(1.0, float(expected.features.std()))
    worst = float(np.abs(found.features - expected.features).max()) / scale
    by_block = np.abs(found.blocks - expected.blocks).max(axis=(1, 2, 3))
    block = int(by_block.argmax())
    told = (
        f"features in {framework} {version} differ by at most {worst:.1e}, the worst block is "
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
    """The encoder of the official file in plain torch; its decoders are not run."""
    import torch
    from torch.nn import functional

    state = {n: torch.from_numpy(np.array(x)) for n, x in files.read_state(path).items()}
    model = weights.model
    assert set(state) == {e.name for e in digpt.entries(model)} | {
        copy for e in digpt.entries(model) for copy in e.copies
    } | set(digpt.FIXED)

    def linear(name, x):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, model.eps)

    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = functional.conv2d(_torch_images(weights), kernel, bias, stride=model.patch)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
    x = x + state["pos_embed"]
    blocks = []
    for i in range(model.depth):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, model.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(f"blocks.{i}.attn.proj", mixed)
        hidden = functional.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
        blocks.append(x.numpy())
    features = functional.layer_norm(x[:, 0], x.shape[-1:], eps=model.eps)
    return Outputs(np.stack(blocks), features.numpy())


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
