"""Strict reader of config.json of Hugging Face's vision models.

READ_KEYS are settings, SIZE_KEYS are compared with the arrays, SUPPORTED_VALUES and FILE_VALUES
have one supported value each. IGNORED are attributes of all configs, and keys that only training,
the text tower or a head reads; names that start with _ are private. Other keys are errors.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dgpt_jax.errors import UserError
from dgpt_jax.weights.config_json import (
    format_value,
    fraction,
    get_object,
    is_timm,
    positive_int,
    read_json,
    refuse_unknown_keys,
    require_values,
)

# Hugging Face's activation names, several for the same function, and ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "swiglu",  # of gated MLPs; the arrays show whether they are
}
READ_KEYS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "rms_norm_eps", "image_size")
# Sizes that the arrays determine too, by our names.
SIZE_KEYS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "patch_size": "patch",
    "intermediate_size": "mlp_width",
    "num_register_tokens": "registers",
}
SUPPORTED_VALUES = {"num_channels": 3, "qkv_bias": True}
# At the top of the file: custom model code, and quantized weights.
FILE_VALUES = {"auto_map": None, "quantization_config": None}
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


def config(
    directory: Path,
    types: Mapping[str, float],
    *,
    activation: str,
    heads: int = 12,
    values: Mapping[str, Any] = MappingProxyType({}),
    any_of: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, tuple[Any, str]]]:
    """(`settings`, `expected`) of source.Source; both empty without config.json, or with timm's.

    types: {model_type: default eps} of the layout, its default type first. Other defaults are those
    of the library's classes: the given heads and activation (by its name). values, any_of: keys of
    the layout with one supported value, and with any, besides those above. Raises UserError on a
    key that changes the outputs in an unsupported way.
    """
    file = directory / "config.json"
    content = read_json(file) if file.is_file() else {}
    if not content or is_timm(content):
        return {}, {}
    vision = get_object(content, "vision_config", file)
    default = next(iter(types))
    kinds = [one.get("model_type") or default for one in (content, vision)]
    if other := next((kind for kind in kinds if kind not in types), None):
        raise UserError(
            f"{file}: model_type {format_value(other)} is none of {', '.join(types)}, whose names "
            f"these arrays have"
        )
    require_values(content, FILE_VALUES, file)
    eps = types[kinds[1] if vision.get("model_type") else kinds[0]]
    defaults = {"num_attention_heads": heads, "hidden_act": activation, "layer_norm_eps": eps}
    expected, vision = {}, _vision_config(content, defaults, file)
    width = content.get("projection_dim")
    if width is not None and "clip" in types:
        expected["out_width"] = (width, f"projection_dim in {file}")
    private = {name for name in vision if name.startswith("_")}
    supported = {**SUPPORTED_VALUES, **values}
    known = {*READ_KEYS, *SIZE_KEYS, *supported, *IGNORED, *any_of, *private}
    refuse_unknown_keys(vision, known, file)
    require_values(vision, supported, file)
    expected |= {
        name: (_single(vision[key]), f"{key} in {file}")
        for key, name in SIZE_KEYS.items()
        if vision.get(key) is not None
    }
    return _settings(defaults | vision, file), expected


def model_type(directory: Path) -> str | None:
    """The kind of model that config.json names, None without it."""
    file = directory / "config.json"
    return read_json(file).get("model_type") if file.is_file() else None


def _vision_config(content: Mapping, defaults: Mapping, file: Path) -> dict:
    """The part of a config that the vision tower reads.

    In older files `vision_config_dict` is complete, with defaults for omitted values. Raises
    UserError if it contradicts `vision_config`.
    """
    vision = get_object(content, "vision_config", file)
    older = get_object(content, "vision_config_dict", file)
    complete = {**defaults, **older} if older else {}
    different = [name for name in complete if vision.get(name, complete[name]) != complete[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{file}: vision_config has {name} {format_value(vision[name])}, vision_config_dict "
            f"{format_value(complete[name])}: remove the one that is not of these weights"
        )
    return vision | complete or dict(content)


def _single(value: Any) -> Any:
    """The value of a pair of equal ones; another value unchanged."""
    is_pair = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if is_pair else value


def _settings(vision: Mapping, file: Path) -> dict[str, Any]:
    """heads, activation, eps and image_size."""
    activation = vision["hidden_act"]
    eps = "rms_norm_eps" if "rms_norm_eps" in vision else "layer_norm_eps"
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{file}: hidden_act {format_value(activation)} is none of {', '.join(ACTIVATIONS)}"
        )
    settings = {
        "heads": positive_int(vision["num_attention_heads"], f"{file}: num_attention_heads"),
        "activation": ACTIVATIONS[activation],
        "eps": fraction(vision[eps], f"{file}: {eps}"),
    }
    if vision.get("image_size") is not None:
        settings["image_size"] = positive_int(vision["image_size"], f"{file}: image_size")
    return settings
