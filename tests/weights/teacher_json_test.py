"""JSON beside a teacher's weights: settings, and errors for unsupported keys and values."""

import json

import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.weights import files, teacher_loading
from tests.support.published import (
    HALF,
    HF,
    IMAGE,
    LISTS,
    MODEL,
    ONE,
    OPEN,
    OTHER,
    PRE,
    PROCESSOR,
    VISION,
    changed,
    write_all,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Directory of weights per layout, with JSON for all settings but mean and std."""
    root = tmp_path_factory.mktemp("published")
    write_all(root)
    return root


CLIP_JSON = {PRE: IMAGE}
# Non-empty values of a CLIPVisionConfig by transformers 4.16.
OLDER = {
    "add_cross_attention": False, "attention_dropout": 0.0, "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "id2label": {"0": "LABEL_0"}, "is_decoder": False,
    "is_encoder_decoder": False, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False,
    "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "temperature": 1.0, "tf_legacy_loss": False,
    "tie_encoder_decoder": False, "tie_word_embeddings": True, "top_k": 50, "top_p": 1.0,
    "torchscript": False, "typical_p": 1.0, "use_bfloat16": False, "bos_token_id": 0,
    "_attn_implementation_autoset": True, "transformers_version": "4.16.0.dev0",
}  # fmt: skip
FULL = {"model_type": "clip", "projection_dim": 24, "vision_config": VISION | OLDER}
SUPPORTED = [
    ("open_clip", {OPEN: {f"preprocess_cfg.{n}": v for n, v in LISTS.items()}}, OTHER),
    ("open_clip", {OPEN: {"preprocess_cfg.mean": 0.5, "preprocess_cfg.std": 1}},
     {"mean": HALF, "std": ONE}),
    ("open_clip", {PRE: IMAGE}, OTHER),
    ("open_clip", {PRE: IMAGE, OPEN: json.dumps(MODEL)}, OTHER | {"heads": 2}),
    ("open_clip", {OPEN: {"model_cfg.quick_gelu": False,
                          "model_cfg.vision_cfg.act_kwargs": {"approximate": "tanh"},
                          "model_cfg.vision_cfg.norm_kwargs": {"eps": 1e-6}}, PRE: IMAGE},
     OTHER | {"activation": "gelu_tanh", "eps": 1e-6}),
    ("open_clip", {OPEN: {"model_cfg.vision_cfg.pool_type": "avg",
                          "model_cfg.vision_cfg.patch_dropout": 0.5}, PRE: IMAGE}, OTHER),
    ("clip", {PRE: IMAGE}, OTHER),
    ("clip", {PRE: {"image_mean": 0.5, "image_std": [0.5] * 3}}, {"mean": HALF, "std": HALF}),
    ("clip", {PROCESSOR: {"image_processor": IMAGE}}, OTHER),
    ("clip", {PROCESSOR: {"processor_class": "CLIPProcessor"}, PRE: IMAGE}, OTHER),
    ("clip", {PRE: {"do_normalize": False}}, {"mean": (0.0,) * 3, "std": ONE}),
    ("clip", CLIP_JSON | {HF: {"layer_norm_eps": 1e-6, "hidden_act": "gelu_new"}},
     {"eps": 1e-6, "activation": "gelu_tanh"}),
    ("clip", CLIP_JSON | {HF: json.dumps({"model_type": "clip", "vision_config": VISION})},
     {"eps": 1e-5, "activation": "quick_gelu"}),
    ("clip", CLIP_JSON | {HF: json.dumps(FULL)}, {"activation": "quick_gelu", "heads": 2}),
    ("clip", CLIP_JSON | {HF: json.dumps(FULL | {"vision_config_dict": {
        "num_attention_heads": 2, "hidden_act": "gelu", "hidden_size": 32}})},
     {"activation": "gelu", "heads": 2}),
    ("clip", CLIP_JSON | {HF: {"image_size": [16, 16], "return_dict": True, "top_k": 50}}, OTHER),
    ("siglip", {}, {"mean": HALF, "std": HALF}),
    ("siglip", {PROCESSOR: {"image_processor": IMAGE}}, OTHER),
    ("siglip", {HF: {"vision_use_head": False}}, {"activation": "gelu_tanh", "eps": 1e-6}),
    ("dinov2", {PRE: IMAGE}, OTHER),
    ("dinov2", {PRE: IMAGE, HF: {"layerscale_value": 1e-5, "apply_layernorm": True}}, OTHER),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "expected"), SUPPORTED)
def test_supported(published, tmp_path, kind, changes, expected):
    tower = teacher_loading.load(str(changed(published, tmp_path, kind, changes))).tower
    assert {name: getattr(tower, name) for name in expected} == expected


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
VISION_CFG = "model_cfg.vision_cfg"
UNSUPPORTED = [
    # Unspecified mean and std.
    ("open_clip", {}, "config.teacher.mean and config.teacher.std"),
    ("open_clip", {OPEN: {"preprocess_cfg.mean": [0.1, 0.2, 0.3]}}, "config.teacher.std"),
    ("clip", {}, "config.teacher.mean and config.teacher.std"),
    ("clip", {PRE: {"image_mean": None, "image_std": None}}, "config.teacher.mean and config"),
    ("dinov2", {}, "config.teacher.mean and config.teacher.std"),
    # Invalid mean and std for images in [0, 1], and files that disagree.
    *(
        ("clip", {PRE: IMAGE | {key: value}}, key)
        for key, value in [
            ("image_mean", [123.675, 116.28, 103.53]), ("image_mean", [-0.1, 0, 0]),
            ("image_mean", [0.1, 0.2]), ("image_mean", [0.1] * 4), ("image_mean", "half"),
            ("image_mean", [0.1, 0.2, float("nan")]), ("image_mean", True),
            ("image_std", [0, 0.5, 0.5]), ("image_std", 0), ("image_std", [58.4, 57.1, 57.4]),
            ("image_std", [-0.5] * 3), ("image_std", [0.5, 0.5, None]),
        ]
    ),
    ("clip", {PRE: IMAGE | {"rescale_factor": 1}}, "rescale_factor"),
    ("clip", {PRE: IMAGE | {"do_rescale": False}}, "do_rescale"),
    ("clip", {PRE: IMAGE | {"do_flip_channel_order": True}}, "do_flip_channel_order"),
    ("clip", {PRE: IMAGE, PROCESSOR: {"image_processor": {"image_mean": 0.5}}}, "mean is "),
    ("open_clip", {PRE: IMAGE, OPEN: {"preprocess_cfg.mean": 0.5}}, "mean is "),
    ("open_clip", {PRE: IMAGE, OPEN: {"preprocess_cfg.mode": "BGR"}}, "BGR"),
    # Keys that change the outputs.
    *(
        ("open_clip", {OPEN: {f"{VISION_CFG}.{key}": value}, PRE: IMAGE}, key)
        for key, value in [
            ("act_kwargs", {"approximate": "tanh"}),  # of QuickGELU
            ("norm_kwargs", {"elementwise_affine": False}), ("norm_kwargs", {"eps": 2}),
            ("no_ln_pre", True), ("ls_init_value", 1e-4), ("attentional_pool", True),
            ("attentional_pool", "parallel"), ("final_ln_after_pool", True),
            ("block_type", "custom"), ("qk_norm", True), ("scaled_cosine_attn", True),
            ("scale_heads", True), ("scale_attn_inner", True), ("scale_attn", True),
            ("scale_fc", True), ("timm_model_name", "vit_b"), ("rope", True),
            ("bias", False),
            ("width", 48), ("layers", 3), ("layers", [3, 4, 6, 3]), ("patch_size", 8),
            ("head_width", 0.5), ("head_width", "16"), ("head_width", 64), ("image_size", 32),
        ]
    ),
    ("open_clip", {OPEN: {"model_cfg.embed_dim": 512}, PRE: IMAGE}, "embed_dim"),
    ("open_clip", {OPEN: {"model_cfg.vision_act": "relu"}, PRE: IMAGE}, "vision_act"),
    ("open_clip", {OPEN: {"model_cfg.quick_gelu": False,
                          f"{VISION_CFG}.act_kwargs": {"inplace": True}}, PRE: IMAGE},
     "act_kwargs"),
    *(
        ("clip", {HF: {key: value}, PRE: IMAGE}, key)
        for key, value in [
            ("hidden_act", "relu"), ("hidden_act", "gelu_10"), ("layer_norm_eps", 0),
            ("layer_norm_eps", "1e-5"), ("num_attention_heads", "two"), ("num_attention_heads", 0),
            ("num_channels", 4), ("hidden_size", 64), ("num_hidden_layers", 12),
            ("intermediate_size", 128), ("projection_dim", 512), ("patch_size", 8),
            ("patch_size", [4, 8]), ("image_size", 32), ("image_size", [16, 32]),
            ("pruned_heads", {"0": [1]}), ("quantization_config", {"bits": 8}),
            ("auto_map", {"AutoModel": "a.B"}), ("rope_theta", 100.0), ("model_type", "siglip"),
            ("attention_bias", False), ("use_cls_token", 0),
        ]
    ),
    ("clip", {PRE: IMAGE, HF: json.dumps(FULL | {"vision_config_dict": {"patch_size": 4}})},
     "num_attention_heads 2, vision_config_dict 12"),
    ("siglip", {HF: {"hidden_act": "gelu_10"}}, "hidden_act"),
    ("siglip", {HF: {"model_type": "siglip2_vision_model"}}, "model_type"),
    ("dinov2", {HF: {"qkv_bias": False}, PRE: IMAGE}, "qkv_bias"),
    ("dinov2", {HF: {"num_register_tokens": 4}, PRE: IMAGE}, "num_register_tokens"),
    ("dinov2", {HF: {"key_bias": False, "use_gated_attention": True}, PRE: IMAGE}, "use_gated"),
    # Files without a JSON object.
    *(
        (kind, {name: text} | ({PRE: IMAGE} if name != PRE else {}), message)
        for kind, name in [("open_clip", OPEN), ("clip", HF), ("clip", PRE), ("siglip", PROCESSOR)]
        for text, message in [
            ("", "empty"), ("{", "JSON"), ("[1, 2]", "JSON list"), ("7", "JSON int"),
            (POINTER, "git lfs pull"), ("[" * 99999, "JSON"),
            ("<!DOCTYPE html>\x1b[1m", "JSON"), ("\x1b[31m{", "JSON"),
        ]
    ),
    ("open_clip", {OPEN: json.dumps({"model_cfg": [1]})}, "model_cfg is [1]"),
    ("open_clip", {OPEN: "{}"}, "vision_cfg"),
    ("clip", {PROCESSOR: {"image_processor": "x"}}, 'image_processor is "x"'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), UNSUPPORTED)
def test_unsupported(published, tmp_path, kind, changes, message):
    path = changed(published, tmp_path, kind, changes)
    with pytest.raises(UserError) as error:
        teacher_loading.load(str(path))
    line = str(error.value)
    assert message in line and line.isprintable(), line
    assert str(path) in line


@pytest.mark.parametrize(("kind", "name"), [
    ("open_clip", "visual.conv1.weight"), ("open_clip", "visual.class_embedding"),
    ("clip", "vision_model.embeddings.position_embedding.weight"),
    ("siglip", "encoder.layers.0.mlp.fc1.bias"), ("dinov2", "embeddings.position_embeddings"),
])  # fmt: skip
def test_arrays_of_wrong_rank(published, tmp_path, kind, name):
    path = changed(published, tmp_path, kind, {PRE: IMAGE})
    (file,) = path.glob("*.safetensors")
    state = files.read_state(file)
    for shape in ((), (state[name].size,), (1, 2, 3, 4, 5)):
        files.write_safetensors(file, state | {name: np.zeros(shape, np.float32)}, {})
        if shape == state[name].shape:
            continue
        with pytest.raises(UserError) as error:
            teacher_loading.load(str(path))
        assert str(error.value).isprintable()


def test_json_that_is_not_utf8(published, tmp_path):
    path = changed(published, tmp_path, "clip", {PRE: IMAGE})
    (path / HF).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="config.json"):
        teacher_loading.load(str(path))
