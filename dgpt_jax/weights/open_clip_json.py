"""OpenCLIP's JSON (`open_clip/model.py`, CLIPVisionCfg): what it tells of a CLIP tower.

open_clip_config.json has it under `model_cfg`, beside the preprocessing; the files of
`open_clip/model_configs` are that model alone.
"""

from collections.abc import Mapping
from pathlib import Path

from dgpt_jax.convert.json_files import (
    count,
    group,
    objects,
    read_json,
    refuse_unknown,
    refuse_unusual,
    share,
    shown,
)
from dgpt_jax.schema import UserError

FILE = "open_clip_config.json"
TAKEN = ("head_width", "act_kwargs", "norm_kwargs", "image_size")
# What the arrays have too, by our names.
CLAIMS = {"width": "width", "layers": "depth", "patch_size": "patch"}
# What a tower here computes: a norm before the blocks and one on every token after them.
USUAL = {
    "timm_model_name": None, "no_ln_pre": False, "ls_init_value": None, "attentional_pool": False,
    "final_ln_after_pool": False, "block_type": "default", "qk_norm": False,
    "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False, "in_chans": 3,
}  # fmt: skip
# Read in training, by a head, by towers of timm, or for the shape of arrays and their first values.
IGNORED = (
    "mlp_ratio", "patch_dropout", "pos_embed_type", "pool_type", "output_tokens", "image_seq_len",
    "attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj",
    "timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path", "timm_model_kwargs",
)  # fmt: skip
# Of the model, what the vision tower does not read.
TEXT = (
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "multimodal_cfg",
    "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict", "cast_dtype",
    "preprocess_cfg",
)  # fmt: skip


def config(directory: Path) -> tuple[dict, dict]:
    """(`told`, `claims`) of source.Source; both empty where a directory holds no such JSON.

    Raises UserError on several, and on a key that changes numbers otherwise than what is computed
    here.
    """
    file = directory / FILE
    if not file.is_file():
        found = list(objects(directory, "vision_cfg"))
        if len(found) > 1:
            raise UserError(
                f"{' and '.join(map(str, found))} each describe a model of OpenCLIP: keep the one "
                f"of these weights, as {FILE}"
            )
        if not found:
            return {}, {}
        file = found[0]
    content = read_json(file)
    model = group(content, "model_cfg", file) or content
    vision = group(model, "vision_cfg", file)
    if not vision:
        raise UserError(f"{file} has no vision_cfg: it is no JSON of an OpenCLIP model")
    refuse_unknown(model, TEXT, file)
    refuse_unknown(vision, {*TAKEN, *CLAIMS, *USUAL, *IGNORED}, file)
    refuse_unusual(vision, USUAL, file)
    claims = {
        ours: (vision[key], f"{key} in {file}")
        for key, ours in CLAIMS.items()
        if vision.get(key) is not None
    }
    if model.get("embed_dim") is not None:
        claims["out_width"] = (model["embed_dim"], f"embed_dim in {file}")
    return _told(model, vision, file), claims


def _told(model: Mapping, vision: Mapping, file) -> dict:
    """head_width, activation, eps and image_size."""
    head_width = vision.get("head_width") or 64
    found = {
        "head_width": count(head_width, f"{file}: head_width"),
        "activation": _activation(model, vision, file),
        "eps": 1e-5,  # torch's LayerNorm
    }
    norm = group(vision, "norm_kwargs", file)
    refuse_unknown(norm, ("eps",), f"{file}: norm_kwargs")
    if "eps" in norm:
        found["eps"] = share(norm["eps"], f"{file}: norm_kwargs: eps")
    if vision.get("image_size") is not None:
        found["image_size"] = count(vision["image_size"], f"{file}: image_size")
    return found


def _activation(model: Mapping, vision: Mapping, file) -> str:
    """QuickGELU takes no arguments, nn.GELU its `approximate`."""
    given = group(vision, "act_kwargs", file)
    kinds = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = given.get("approximate", "none")
    quick = model.get("quick_gelu", False)
    if set(given) - {"approximate"} or approximate not in kinds or (quick and given):
        raise UserError(
            f"{file}: act_kwargs {shown(given)} (quick_gelu {shown(quick)}) are none of an exact, "
            f"a tanh or a quick GELU"
        )
    return "quick_gelu" if quick else kinds[approximate]
