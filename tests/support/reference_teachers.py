"""Published vision towers with random weights: their files, and their own tokens.

Each builder writes weights and JSON as the model's authors publish them, and returns a function
from normalized images (B, size, size, 3) to the reference's tokens (B, N, C).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dgpt_jax.weights import files
from tests.support import parity

Reference = Callable[[np.ndarray], np.ndarray]
MEAN_STD = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
SMALL = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, image_size=40,
    patch_size=8,
)  # fmt: skip


def _hugging_face(
    kind: str, directory: Path, keep=None, rename=None, **settings
) -> tuple[Reference, dict]:
    """A model of transformers; rename: of its arrays to the names of another publisher."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**settings)
    model = parity.randomize(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(MEAN_STD))
    state = {name: array.numpy() for name, array in model.state_dict().items()}

    def reference(images):
        tokens = parity.hidden_state(model, images)
        return tokens if keep is None else tokens[:, keep(tokens.shape[1])]

    return reference, state


def _without(first: int, count: int):
    return lambda length: [i for i in range(length) if not first <= i < first + count]


def _timm(name: str, directory: Path, **changes) -> tuple[Reference, dict]:
    """A model of timm with random weights, written by timm's names; tokens of forward_features."""
    import timm
    import torch

    model = parity.randomize(timm.create_model(name, **changes))
    state = {key: array.numpy() for key, array in model.state_dict().items()}
    files.write_safetensors(directory / "model.safetensors", _contiguous(state), {"format": "pt"})
    config = {"architecture": name, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (directory / "config.json").write_text(json.dumps(config))

    def reference(images):
        with torch.no_grad():
            x = torch.tensor(images.transpose(0, 3, 1, 2).copy())
            tokens = model.forward_features(x)
            if isinstance(model.fc_norm, torch.nn.LayerNorm):
                tokens = model.fc_norm(tokens)
        return tokens.numpy()

    return reference, state


def _contiguous(state: dict) -> dict:
    return {name: np.ascontiguousarray(array, np.float32) for name, array in state.items()}


def _rewrite(directory: Path, state: dict, rules, name: str = "model.safetensors"):
    """Writes a state dict by other names, alone or with its JSON already there."""
    renamed = {}
    for key, array in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = array
    files.write_safetensors(directory / name, _contiguous(renamed), {"format": "pt"})


def dinov3(directory: Path, *, gated: bool = False, **settings) -> Reference:
    """DINOv3 by transformers: H+ has gated MLPs."""
    activation = "silu" if gated else "gelu"
    settings = {**SMALL, "num_register_tokens": 4, "use_gated_mlp": gated,
                "hidden_act": activation, **settings}  # fmt: skip
    return _hugging_face("DINOv3ViT", directory, _without(1, 4), **settings)[0]


def dinov3_original(directory: Path, *, gated: bool = False, **settings) -> Reference:
    """DINOv3 by Meta's names: q, k and v in one array, with a mask of the bias of the keys."""
    import torch

    activation = "silu" if gated else "gelu"
    settings = {**SMALL, "num_register_tokens": 4, "use_gated_mlp": gated,
                "hidden_act": activation, **settings}  # fmt: skip
    reference, state = _hugging_face("DINOv3ViT", directory, _without(1, 4), **settings)
    (directory / "config.json").unlink()
    (directory / "model.safetensors").unlink()
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    for i in range(settings["num_hidden_layers"]):
        block = f"model.layer.{i}.attention"
        parts = [state.pop(f"{block}.{part}_proj.weight") for part in "qkv"]
        state[f"blocks.{i}.attn.qkv.weight"] = np.concatenate(parts)
        query, value = (state.pop(f"{block}.{part}_proj.bias") for part in "qv")
        ignored = np.full(width, 7, np.float32)  # the mask removes it
        state[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([query, ignored, value])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = np.repeat([1.0, 0.0, 1.0], width)
    rules = (
        (r"^model\.layer\.", "blocks."), (r"^embeddings\.patch_embeddings", "patch_embed.proj"),
        (r"^embeddings\.register_tokens", "storage_tokens"), (r"^embeddings\.", ""),
        (r"\.attention\.o_proj", ".attn.proj"), (r"\.layer_scale(.)\.lambda1", r".ls\1.gamma"),
        (r"\.mlp\.gate_proj", ".mlp.w1"), (r"\.mlp\.up_proj", ".mlp.w2" if gated else ".mlp.fc1"),
        (r"\.mlp\.down_proj", ".mlp.w3" if gated else ".mlp.fc2"),
    )  # fmt: skip
    count = width // heads // 4
    periods = torch.tensor(100.0 ** (np.arange(count) / count)).bfloat16().float().numpy()
    state = {name: array for name, array in state.items() if "inv_freq" not in name}
    _rewrite(directory, state | {"rope_embed.periods": periods}, rules)
    return reference


def dinov3_timm(directory: Path, name: str = "vit_small_patch16_dinov3", **changes) -> Reference:
    """DINOv3 by timm, without biases of q, k and v, or with them (`_qkvb`)."""
    drop = _without(1, 4)
    reference, _ = _timm(name, directory, **changes)
    return lambda images: (tokens := reference(images))[:, drop(tokens.shape[1])]


def pe_core(directory: Path, name: str = "vit_pe_core_small_patch16_384", **changes) -> Reference:
    """Perception Encoder by timm."""
    return _timm(name, directory, **changes)[0]


def pe_core_original(directory: Path, **changes) -> Reference:
    """Perception Encoder by Meta's names, without JSON."""
    reference, state = _timm("vit_pe_core_tiny_patch16_384", directory, **changes)
    (directory / "config.json").unlink()
    state = {n: a for n, a in state.items() if not n.startswith(("head.", "attn_pool.", "rope"))}
    state["cls_token"], state["pos_embed"] = state["cls_token"][0, 0], state["pos_embed"][0]
    rules = (
        (r"^patch_embed\.proj", "conv1"), (r"^cls_token", "class_embedding"),
        (r"^pos_embed", "positional_embedding"), (r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
        (r"^blocks\.", "transformer.resblocks."), (r"\.norm(.)\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"), (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.mlp\.fc1", ".mlp.c_fc"), (r"\.mlp\.fc2", ".mlp.c_proj"), (r"^", "visual."),
    )  # fmt: skip
    probe = np.zeros((1, 1, 4), np.float32)
    state |= {"attn_pool.probe": probe, "proj": np.zeros((4, 4), np.float32)}
    _rewrite(directory, state, rules)
    return reference


def eva02_clip(directory: Path, name: str = "eva02_base_patch16_clip_224", **changes) -> Reference:
    """EVA-02-CLIP in OpenCLIP's file: the head projects all tokens."""
    import torch

    width = 24
    reference, state = _timm(name, directory, **changes, num_classes=width)
    (directory / "config.json").unlink()
    (directory / "model.safetensors").unlink()
    _rewrite(directory, state, ((r"^", "visual.trunk."),), "open_clip_model.safetensors")
    config = {"embed_dim": width, "vision_cfg": {
        "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "token",
        "timm_proj": None, "image_size": changes.get("img_size", 224)}}  # fmt: skip
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    weight, bias = (torch.tensor(state[f"head.{name}"]) for name in ("weight", "bias"))
    return lambda images: (torch.tensor(reference(images)) @ weight.T + bias).numpy()


def eva02_original(directory: Path, **changes) -> Reference:
    """EVA-02-CLIP by its authors' names, without JSON."""
    reference, state = _timm("eva02_base_patch16_clip_224", directory, **changes, num_classes=0)
    (directory / "config.json").unlink()
    rules = (
        (r"\.attn\.norm\.", ".attn.inner_attn_ln."), (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
        (r"\.mlp\.fc1_g", ".mlp.w1"), (r"\.mlp\.fc1_x", ".mlp.w2"), (r"\.mlp\.fc2", ".mlp.w3"),
        (r"\.attn\.([qv])_proj\.bias", r".attn.\1_bias"), (r"^", "visual."),
    )  # fmt: skip
    table = np.zeros((4, 4), np.float32)
    _rewrite(directory, state | {"rope.freqs_cos": table, "blocks.0.attn.rope.freqs_cos": table},
             rules)  # fmt: skip
    return reference


def open_clip_trunk(directory: Path, *, name: str, proj: bool = False, **changes) -> Reference:
    """A plain ViT of timm in OpenCLIP's file, with a linear projection of its own or without."""
    import torch

    reference, state = _timm(name, directory, **changes, num_classes=0)
    (directory / "config.json").unlink()
    (directory / "model.safetensors").unlink()
    state = {f"visual.trunk.{key}": array for key, array in state.items()}
    width = state["visual.trunk.patch_embed.proj.weight"].shape[0]
    head = np.random.default_rng(0).standard_normal((20, width)).astype(np.float32) * width**-0.5
    if proj:
        state["visual.head.proj.weight"] = head
    _rewrite(directory, state, (), "open_clip_model.safetensors")
    vision = {"timm_model_name": name, "image_size": changes.get("img_size", 224)}
    vision |= {"timm_pool": "token" if proj else "map", "timm_proj": "linear" if proj else "none"}
    config = {"embed_dim": 20 if proj else width, "vision_cfg": vision}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    if not proj:
        return reference
    return lambda images: (torch.tensor(reference(images)) @ torch.tensor(head).T).numpy()


def aimv2(directory: Path, *, original: bool = False, **settings) -> Reference:
    """AIMv2 by transformers, or by Apple's names."""
    settings = {**SMALL, **settings}
    reference, state = _hugging_face("Aimv2Vision", directory, **settings)
    if not original:
        return reference
    (directory / "model.safetensors").unlink()
    (directory / "config.json").unlink()
    for i in range(settings["num_hidden_layers"]):
        block = f"encoder.layers.{i}.attention"
        parts = [state.pop(f"{block}.{part}_proj.weight") for part in "qkv"]
        state[f"trunk.blocks.{i}.attn.qkv.weight"] = np.concatenate(parts)
    rules = (
        (r"^embeddings\.patch_embed", "preprocessor.patchifier.proj"),
        (r"^embeddings\.rms_norm", "preprocessor.patchifier.norm"),
        (r"^embeddings\.position_embedding\.weight", "preprocessor.pos_embed"),
        (r"^rms_norm", "trunk.post_trunk_norm"), (r"^encoder\.layers\.", "trunk.blocks."),
        (r"\.rms_norm(.)\.", r".norm_\1."), (r"\.attention\.out_proj", ".attn.proj"),
        (r"\.ffn\.gate_proj", ".mlp.fc1"), (r"\.ffn\.up_proj", ".mlp.fc3"),
        (r"\.ffn\.down_proj", ".mlp.fc2"),
    )  # fmt: skip
    state = {n: a for n, a in state.items() if not n.startswith("head.") and "_ids" not in n}
    _rewrite(directory, state, rules)
    return reference


def radio(directory: Path, *, original: bool = False, **settings) -> Reference:
    """C-RADIO by transformers, or by NVIDIA's names; the first class token and the patches."""
    import torch
    import transformers

    settings = {**SMALL, "max_img_size": 64, "num_cls_tokens": 2, "num_registers": 3, **settings}
    settings["mlp_ratio"] = settings.pop("intermediate_size") / settings["hidden_size"]
    _, state = _hugging_face(
        "Radio", directory, norm_mean=[0.0] * 3, norm_std=[1.0] * 3, **settings
    )

    model = transformers.RadioModel(transformers.RadioConfig(**settings, norm_mean=[0.0] * 3,
                                                             norm_std=[1.0] * 3))  # fmt: skip
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    (directory / "preprocessor_config.json").unlink()
    prefix = settings["num_cls_tokens"] + settings["num_registers"]
    if original:
        (directory / "config.json").unlink()
        names = files.read_state(directory / "model.safetensors")
        assert any(name.startswith("radio_model.") for name in names), list(names)[:3]
    else:
        (directory / "model.safetensors").unlink()
        _rewrite(directory, state, ())

    def reference(images):
        tokens = parity.hidden_state(model.eval(), images)
        return tokens[:, [0, *range(prefix, tokens.shape[1])]]

    return reference


def tips(directory: Path, **settings) -> Reference:
    """TIPSv2's vision tower by transformers."""
    settings = {**SMALL, **settings}
    settings["mlp_ratio"] = settings.pop("intermediate_size") / settings["hidden_size"]
    return _hugging_face("Tipsv2Vision", directory, _without(1, 1), **settings)[0]


def naflex(directory: Path, **settings) -> Reference:
    """SigLIP 2 of variable resolution, with square images."""
    import torch
    import transformers

    settings = {**SMALL, "num_patches": 25, **settings}
    settings.pop("image_size")
    config = transformers.Siglip2VisionConfig(**settings)
    model = parity.randomize(transformers.Siglip2VisionModel(config))
    model.save_pretrained(directory)
    patch = settings["patch_size"]

    def reference(images):
        batch, side = len(images), images.shape[1] // patch
        x = images.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        x = torch.tensor(x.reshape(batch, side * side, -1).copy())
        mask, shapes = torch.ones(batch, side * side), torch.tensor([[side, side]] * batch)
        with torch.no_grad():
            output = model(x, pixel_attention_mask=mask, spatial_shapes=shapes)
        return output.last_hidden_state.numpy()

    return reference
