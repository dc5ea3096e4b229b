"""Strict reader of OpenCLIP's JSON (`open_clip/model.py`, CLIPVisionCfg).

open_clip_config.json has the model under `model_cfg`, beside the preprocessing; the files of
`open_clip/model_configs` contain the model alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpt_jax.errors import UserError
from dgpt_jax.weights.config_json import (
    files_with_object,
    format_value,
    fraction,
    get_object,
    positive_int,
    read_json,
    refuse_unknown_keys,
    require_values,
)

FILE = "open_clip_config.json"
READ_KEYS = ("head_width", "act_kwargs", "norm_kwargs", "image_size")
# Sizes that the arrays determine too, by our names.
SIZE_KEYS = {"width": "width", "layers": "depth", "patch_size": "patch"}
# The supported tower: a norm before the blocks and one on every token after them.
SUPPORTED_VALUES = {
    "timm_model_name": None, "no_ln_pre": False, "ls_init_value": None, "attentional_pool": False,
    "final_ln_after_pool": False, "block_type": "default", "qk_norm": False,
    "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False, "in_chans": 3,
}  # fmt: skip
# Read in training, by a head, by timm towers, or for array shapes and initialization.
IGNORED = (
    "mlp_ratio", "patch_dropout", "pos_embed_type", "pool_type", "output_tokens", "image_seq_len",
    "attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj",
    "timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path", "timm_model_kwargs",
)  # fmt: skip
# Keys of the model that the vision tower does not read.
MODEL_KEYS = (
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "multimodal_cfg",
    "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict", "cast_dtype",
    "preprocess_cfg",
)  # fmt: skip


def config(directory: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, str]]]:
    """(`settings`, `expected`) of source.Source, with head_width for heads; empty without JSON.

    Raises UserError if there are several files, and on a key that changes the outputs in an
    unsupported way.
    """
    file = directory / FILE
    if not file.is_file():
        candidates = list(files_with_object(directory, "vision_cfg"))
        if len(candidates) > 1:
            raise UserError(
                f"{' and '.join(map(str, candidates))} each describe an OpenCLIP model: keep the "
                f"one of these weights, as {FILE}"
            )
        if not candidates:
            return {}, {}
        file = candidates[0]
    content = read_json(file)
    model = get_object(content, "model_cfg", file) or content
    vision = get_object(model, "vision_cfg", file)
    if not vision:
        raise UserError(f"{file} has no vision_cfg: it does not describe an OpenCLIP model")
    refuse_unknown_keys(model, MODEL_KEYS, file)
    refuse_unknown_keys(vision, {*READ_KEYS, *SIZE_KEYS, *SUPPORTED_VALUES, *IGNORED}, file)
    require_values(vision, SUPPORTED_VALUES, file)
    expected = {
        name: (vision[key], f"{key} in {file}")
        for key, name in SIZE_KEYS.items()
        if vision.get(key) is not None
    }
    if model.get("embed_dim") is not None:
        expected["out_width"] = (model["embed_dim"], f"embed_dim in {file}")
    return _settings(model, vision, file), expected


def _settings(model: Mapping, vision: Mapping, file: Path) -> dict[str, Any]:
    """head_width, activation, eps and image_size."""
    head_width = vision.get("head_width") or 64
    settings = {
        "head_width": positive_int(head_width, f"{file}: head_width"),
        "activation": _activation(model, vision, file),
        "eps": 1e-5,  # torch's LayerNorm
    }
    norm = get_object(vision, "norm_kwargs", file)
    refuse_unknown_keys(norm, ("eps",), f"{file}: norm_kwargs")
    if "eps" in norm:
        settings["eps"] = fraction(norm["eps"], f"{file}: norm_kwargs: eps")
    if vision.get("image_size") is not None:
        settings["image_size"] = positive_int(vision["image_size"], f"{file}: image_size")
    return settings


def _activation(model: Mapping, vision: Mapping, file: Path) -> str:
    """Name of the GELU. QuickGELU takes no arguments, nn.GELU its `approximate`."""
    kwargs = get_object(vision, "act_kwargs", file)
    kinds = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = kwargs.get("approximate", "none")
    quick = model.get("quick_gelu", False)
    if set(kwargs) - {"approximate"} or approximate not in kinds or (quick and kwargs):
        raise UserError(
            f"{file}: act_kwargs {format_value(kwargs)} (quick_gelu {format_value(quick)}) are not "
            f"an exact, tanh or quick GELU"
        )
    return "quick_gelu" if quick else kinds[approximate]
