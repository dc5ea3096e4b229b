"""Small teachers in the layouts of OpenCLIP and Hugging Face, as random weights with their JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import towers
from dgpt_jax.convert import clip, dinov2, files, layout
from tests import conversions
from tests.data import TOWER, random_siglip, random_teacher

DINOV2 = towers.Tower(
    image_size=16, patch=4, width=32, depth=2, heads=2, mlp_width=64, out_width=None,
    activation="gelu", eps=1e-6, pre_norm=False, patch_bias=True, layer_scale=True,
)  # fmt: skip
# Names of JSON files.
OPEN, HF, PRE, PROCESSOR = (
    "open_clip_config.json", "config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
# Mean and std of pictures, and the same in JSON.
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
    """Writes a tower's random weights in one of Hugging Face's layouts; returns their arrays."""
    tower, entries = {
        "clip": (TOWER, clip.hf_entries(2)),
        "dinov2": (DINOV2, dinov2.entries(2, registers=False, swiglu=False)),
    }[kind]
    params = jax.jit(towers.TeacherTower(tower).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    flat = {name: np.asarray(leaf) for name, leaf in layout.flatten(params["params"]).items()}
    state = layout.write(entries, flat)
    files.write_safetensors(directory / "model.safetensors", state, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIGS[kind]))
    return state


def write_all(root):
    """A directory a layout, of weights with JSON that tells all but mean and std."""
    random_teacher(root / "open_clip")
    path = root / "open_clip/open_clip_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"model_cfg": content["model_cfg"]}))
    random_siglip(root / "siglip")
    (root / "siglip/config.json").write_text(json.dumps(CONFIGS["siglip"]))
    hugging_face(root / "clip", "clip")
    hugging_face(root / "dinov2", "dinov2")


def changed(root, directory, kind: str, changes: dict):
    """A copy whose JSON files are changed."""
    for file in (root / kind).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return conversions.change_json(directory, changes)
