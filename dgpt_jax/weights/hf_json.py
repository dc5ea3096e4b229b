"""config.json of Hugging Face's vision models: what it tells, and what of it is refused.

A model of a known `model_type` reads few keys: those of TAKEN and CLAIMS, and those of USUAL, which
have one value here. IGNORED are attributes that every config has, and what only training, the
text tower or a head reads; names that begin with _ are the library's own.
"""

from collections.abc import Mapping
from pathlib import Path

from dgpt_jax.convert.json_files import (
    count,
    group,
    is_timm,
    read_json,
    refuse_unknown,
    refuse_unusual,
    share,
    shown,
)
from dgpt_jax.schema import UserError

# Their names of activations, and ours; several names stand for the same function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
TAKEN = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size")
# What the arrays have too, by our names.
CLAIMS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "patch_size": "patch",
    "intermediate_size": "mlp_width",
    "num_register_tokens": "registers",
}
USUAL = {"num_channels": 3, "qkv_bias": True}
# Of the whole file: code that the model brings along, and weights that are no plain numbers.
ABSENT = {"auto_map": None, "quantization_config": None}
IGNORED = (
    "add_cross_attention", "apply_layernorm", "architectures", "attention_dropout",
    "attention_probs_dropout_prob", "attn_implementation", "bos_token_id",
    "chunk_size_feed_forward", "diversity_penalty", "do_sample", "drop_path_rate", "dropout",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_stride", "eos_token_id",
    "finetuning_task", "gradient_checkpointing", "hidden_dropout_prob", "id2label",
    "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "layerscale_value", "length_penalty", "logit_scale_init_value", "max_length", "min_length",
    "mlp_ratio", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "out_features", "out_indices", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "pooler_act", "pooler_output_size",
    "problem_type", "projection_dim", "remove_invalid_values", "repetition_penalty",
    "reshape_hidden_states", "return_dict", "return_dict_in_generate", "sep_token_id",
    "stage_names", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
    "use_bfloat16", "use_cache", "use_mask_token", "use_swiglu_ffn", "vision_use_head",
)  # fmt: skip


def config(directory: Path, types: Mapping[str, float], *, activation: str) -> tuple[dict, dict]:
    """(`told`, `claims`) of source.Source; both empty where there is no config.json, or timm's.

    types: values of `model_type` that the layout has, the usual one first, and their eps. Left-out
    values are those of their classes: 12 heads, the given activation (by its name), and that eps.
    Raises UserError on a key that changes numbers otherwise than what is computed here.
    """
    file = directory / "config.json"
    content = read_json(file) if file.is_file() else {}
    if not content or is_timm(content):
        return {}, {}
    vision = group(content, "vision_config", file)
    usual = next(iter(types))
    kinds = [part.get("model_type") or usual for part in (content, vision)]
    if other := next((kind for kind in kinds if kind not in types), None):
        raise UserError(
            f"{file}: model_type {shown(other)} is none of {', '.join(types)}, whose names these "
            f"arrays have"
        )
    refuse_unusual(content, ABSENT, file)
    eps = types[kinds[1] if vision.get("model_type") else kinds[0]]
    defaults = {"num_attention_heads": 12, "hidden_act": activation, "layer_norm_eps": eps}
    claims, vision = {}, _vision(content, defaults, file)
    width = content.get("projection_dim")
    if width is not None and "clip" in types:
        claims["out_width"] = (width, f"projection_dim in {file}")
    own = {name for name in vision if name.startswith("_")}
    refuse_unknown(vision, {*TAKEN, *CLAIMS, *USUAL, *IGNORED, *own}, file)
    refuse_unusual(vision, USUAL, file)
    claims |= {
        ours: (_size(vision[key]), f"{key} in {file}")
        for key, ours in CLAIMS.items()
        if vision.get(key) is not None
    }
    return _told(defaults | vision, file), claims


def _vision(content: Mapping, defaults: Mapping, file) -> dict:
    """The part of a config that the vision tower reads.

    A `vision_config_dict`, in older files, stands for all of it, its left-out values for defaults.
    Raises UserError where it contradicts what is there besides.
    """
    vision = group(content, "vision_config", file)
    older = group(content, "vision_config_dict", file)
    whole = {**defaults, **older} if older else {}
    odd = [name for name in whole if vision.get(name, whole[name]) != whole[name]]
    if odd:
        raise UserError(
            f"{file}: vision_config has {odd[0]} {shown(vision[odd[0]])}, vision_config_dict "
            f"{shown(whole[odd[0]])}: remove the one that is not of these weights"
        )
    return vision | whole or dict(content)


def _size(value):
    """One number of a pair of equal ones."""
    pair = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if pair else value


def _told(vision: Mapping, file) -> dict:
    """heads, activation, eps and image_size."""
    activation = vision["hidden_act"]
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{file}: hidden_act {shown(activation)} is none of {', '.join(ACTIVATIONS)}"
        )
    found = {
        "heads": count(vision["num_attention_heads"], f"{file}: num_attention_heads"),
        "activation": ACTIVATIONS[activation],
        "eps": share(vision["layer_norm_eps"], f"{file}: layer_norm_eps"),
    }
    if vision.get("image_size") is not None:
        found["image_size"] = count(vision["image_size"], f"{file}: image_size")
    return found
