"""JSON beside an encoder's weights (timm's, Hugging Face's): settings, errors and defaults."""

import dataclasses
import json

import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.weights import files, mapping, registry
from dgpt_jax.weights.layouts import digpt, timm
from dgpt_jax.weights.types import Preprocess
from tests.support.conversions import HALF, SQUASH, change_json, pretrained, random_weights

CONFIG, PRE, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
LISTS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
OTHER = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
IMAGENET = {"mean": Preprocess().mean, "std": Preprocess().std}


def directory(path, kind: str, changes: dict):
    """random_weights in a layout, with changed JSON files."""
    path.mkdir()
    registry.LAYOUTS[kind].save(random_weights("cls"), path)
    return change_json(path, changes)


SUPPORTED = [
    ("timm", {CONFIG: {"pretrained_cfg.mean": 0.5, "pretrained_cfg.std": [0.5] * 3}}, {}),
    ("timm", {CONFIG: {"model_args.img_size": [16, 16], "model_args.drop_path_rate": 0.1}}, {}),
    ("timm", {CONFIG: {"model_args.fc_norm": False, "model_args.block_fn": None}}, {}),
    ("timm", {CONFIG: json.dumps({"architecture": "x", "mean": [0.1, 0.2, 0.3],
                                  "std": [0.4, 0.5, 0.6]})}, OTHER),
    ("timm", {CONFIG: {"pretrained_cfg": {}}}, IMAGENET),
    ("hf", {PRE: LISTS}, OTHER),
    ("hf", {PRE: {"image_mean": 0.5, "image_std": 0.5}}, {}),
    ("hf", {PRE: None, PROCESSOR: {"image_processor": LISTS}}, OTHER),
    ("hf", {PROCESSOR: {"processor_class": "x"}, PRE: LISTS}, OTHER),
    ("hf", {PRE: {"do_normalize": False}}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
    ("hf", {CONFIG: {"pooler_act": "tanh", "problem_type": "x", "encoder_stride": 16}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "expected"), SUPPORTED)
def test_supported(tmp_path, kind, changes, expected):
    expected = {"mean": SQUASH.mean, "std": SQUASH.std} | expected
    _, weights = registry.read(directory(tmp_path / "a", kind, changes), heads=3)
    assert {name: getattr(weights.preprocess, name) for name in expected} == expected


ARGS = "model_args"
UNSUPPORTED = [
    *(
        ("timm", {CONFIG: {f"{ARGS}.{key}": value}}, key)
        for key, value in [
            ("scale_attn_norm", True), ("scale_mlp_norm", True), ("proj_bias", False),
            ("final_norm", False), ("qk_norm", True), ("embed_layer", "HybridEmbed"),
            ("embed_norm_layer", "layernorm"), ("norm_layer", "rmsnorm"),
            ("block_fn", "ResPostBlock"), ("mlp_layer", "SwiGLU"), ("attn_layer", "diff"),
            ("act_layer", "silu"), ("rope", True), ("num_heads", "three"), ("num_heads", 2.5),
            ("embed_dim", 48), ("depth", 12), ("patch_size", 16), ("img_size", 224),
            ("class_token", False), ("reg_tokens", 4),
        ]
    ),
    ("timm", {CONFIG: {f"{ARGS}.fc_norm": True}}, "fc_norm"),
    *(
        ("timm", {CONFIG: {f"pretrained_cfg.{key}": value}}, f"{key} ")
        for key, value in [
            ("mean", [123.7, 116.3, 103.5]), ("mean", [0.5, 0.5]), ("std", 0), ("std", [58.4] * 3),
            ("std", float("nan")), ("crop_pct", 0), ("crop_pct", "1"), ("interpolation", "cubic"),
            ("crop_mode", ["center"]),
        ]
    ),
    ("timm", {CONFIG: {"pretrained_cfg": [1]}}, "pretrained_cfg is [1]"),
    ("timm", {CONFIG: {"model_args": "x"}}, 'model_args is "x"'),
    *(
        ("hf", {CONFIG: {key: value}}, key)
        for key, value in [
            ("hidden_act", "relu"), ("qkv_bias", False), ("num_channels", 1), ("image_size", 224),
            ("image_size", [16, 32]), ("patch_size", 16), ("hidden_size", 48),
            ("num_hidden_layers", 12), ("intermediate_size", 41), ("layer_norm_eps", -1),
            ("num_attention_heads", [3]), ("use_rope", True), ("attention_bias", False),
            ("model_type", "deit"), ("pruned_heads", {"1": [0]}), ("auto_map", {"a": "b"}),
        ]
    ),
    *(
        ("hf", {PRE: {key: value}}, key)
        for key, value in [
            ("image_mean", [127.5] * 3), ("image_std", 0), ("image_std", [0.5] * 4),
            ("rescale_factor", 1 / 127.5), ("do_rescale", False), ("do_flip_channel_order", True),
        ]
    ),
    *(
        (kind, {name: text}, message)
        for kind, name in [("timm", CONFIG), ("hf", CONFIG), ("hf", PRE), ("hf", PROCESSOR)]
        for text, message in [
            ("", "empty"), ("{'a': 1}", "JSON"), ("[]", "JSON list"), ("null", "JSON NoneType"),
            ("<html>\x1b[0m", "JSON"),
            ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), UNSUPPORTED)
def test_unsupported(tmp_path, kind, changes, message):
    path = directory(tmp_path / "a", kind, changes)
    with pytest.raises(UserError) as error:
        registry.read(path)
    assert message in str(error.value) and str(error.value).isprintable(), error.value
    assert str(path) in str(error.value)


def notes_of(kind: str, tmp_path):
    """Notes of weights without JSON for the preprocessing."""
    path = tmp_path / "a.safetensors"
    weights = random_weights(width=384, heads=6)
    state = mapping.write(timm.LAYOUT.table(weights), weights.params)
    if kind == "mae":
        state |= {"mask_token": np.zeros((1, 1, 8), np.float32)}
        state["decoder_embed.weight"] = np.zeros((8, 384), np.float32)
    if kind == "dinov2_pth":
        for i in range(weights.model.depth):
            state |= {f"blocks.{i}.ls{n}.gamma": np.ones(384, np.float32) for n in (1, 2)}
    if kind == "digpt":
        weights = pretrained()
        state = digpt.write(weights.params, weights.model)
    files.write_safetensors(path, state, {})
    heads = {"heads": 6} if kind != "digpt" else {"heads": 3, "decoder_heads": 2}
    layout, weights = registry.read(path, **heads)
    assert layout.name == kind and weights.preprocess == Preprocess()
    return weights.notes


@pytest.mark.parametrize("kind", ["timm", "mae", "dinov2_pth", "digpt"])
def test_default_preprocessing_is_noted(tmp_path, kind):
    note = notes_of(kind, tmp_path)[0]
    assert "mean and std" in note and "ImageNet" in note


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({PRE: None}, "mean and std and filter"),
        ({PRE: json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})}, "filter"),
        ({PRE: json.dumps({"resample": 3})}, "mean and std"),
        ({}, None),
    ],
)
def test_hugging_face_defaults_are_noted(tmp_path, changes, names):
    _, weights = registry.read(directory(tmp_path / "a", "hf", changes))
    assert (weights.preprocess.mean, weights.preprocess.std) == (HALF, HALF)
    assert len(weights.notes) == (names is not None)
    assert all(f" {names}: " in note for note in weights.notes)


def test_malformed_arrays_and_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    state = mapping.write(timm.LAYOUT.table(random_weights()), random_weights().params)
    flat = {"patch_embed.proj.weight": state["patch_embed.proj.weight"].reshape(24, -1)}
    files.write_safetensors(path, state | flat, {})
    with pytest.raises(UserError, match="layout timm: ValueError"):
        registry.read(path, heads=3)
    for text in ("{", "[]", '{"format": "x"}', '{"format": 1}'):
        files.write_safetensors(path, state, {"dgpt_jax": text})
        with pytest.raises(UserError, match="layout safetensors"):
            registry.read(path)


def test_preprocessing_round_trip(tmp_path):
    """Own exports pass all checks."""
    for number, preprocess in enumerate([SQUASH, dataclasses.replace(SQUASH, **OTHER)]):
        for kind in ("timm", "hf"):
            path = tmp_path / f"{kind}{number}"
            path.mkdir()
            registry.LAYOUTS[kind].save(random_weights(preprocess=preprocess), path)
            _, weights = registry.read(path)
            assert (weights.preprocess, weights.notes) == (preprocess, ())
