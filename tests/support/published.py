"""Small random teachers in the layouts of OpenCLIP and Hugging Face, with their JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.models import teacher_vit
from dgpt_jax.weights import files, mapping
from dgpt_jax.weights.layouts import clip, dinov2
from tests.support import conversions
from tests.support.data import TOWER, random_siglip, random_teacher

DINOV2 = teacher_vit.TeacherArchitecture(
    image_size=16, patch=4, width=32, depth=2, heads=2, mlp_width=64, out_width=None,
    activation="gelu", eps=1e-6, pre_norm=False, patch_bias=True, layer_scale=True,
)  # fmt: skip
# JSON file names.
OPEN, HF, PRE, PROCESSOR = (
    "open_clip_config.json", "config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
# Mean and std, and the same in JSON.
HALF, ONE = (0.5,) * 3, (1.0,) * 3
OTHER = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
LISTS = {name: list(value) for name, value in OTHER.items()}
IMAGE = {f"image_{name}": value for name, value in LISTS.items()}
MODEL = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": {"head_width": 16, "width": 32}}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
CONFIGS = {
    "clip": VISION
    | {"model_type": "clip_vision_model", "intermediate_size": 64, "projection_dim": 24},
    "siglip": VISION | {"model_type": "siglip_vision_model", "intermediate_size": 64},
    "dinov2": VISION | {"model_type": "dinov2", "mlp_ratio": 2, "qkv_bias": True},
}


def hugging_face(directory, kind: str) -> dict:
    """Writes a tower with random weights in a layout of Hugging Face; returns its state dict."""
    tower, entries = {
        "clip": (TOWER, clip.hf_entries(2)),
        "dinov2": (DINOV2, dinov2.entries(2, registers=False, swiglu=False)),
    }[kind]
    params = jax.jit(teacher_vit.TeacherViT(tower).init)(
        jax.random.key(0), jnp.zeros((1, 16, 16, 3))
    )
    flat = {name: np.asarray(leaf) for name, leaf in mapping.flatten(params["params"]).items()}
    state = mapping.write(entries, flat)
    files.write_safetensors(directory / "model.safetensors", state, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIGS[kind]))
    return state


def write_all(root):
    """Writes a directory per layout, with JSON for all settings but mean and std."""
    random_teacher(root / "open_clip")
    path = root / "open_clip/open_clip_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"model_cfg": content["model_cfg"]}))
    random_siglip(root / "siglip")
    (root / "siglip/config.json").write_text(json.dumps(CONFIGS["siglip"]))
    hugging_face(root / "clip", "clip")
    hugging_face(root / "dinov2", "dinov2")


def changed(root, directory, kind: str, changes: dict):
    """Copies weights and changes their JSON (conversions.change_json)."""
    for file in (root / kind).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return conversions.change_json(directory, changes)
