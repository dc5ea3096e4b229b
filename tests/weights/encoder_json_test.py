"""JSON beside an encoder's weights (timm's, Hugging Face's): taken, refused by name, or assumed and
said."""

import dataclasses
import json

import numpy as np
import pytest

from dgpt_jax.convert import digpt, files, formats, layout, timm
from dgpt_jax.convert.weights import Preprocess
from dgpt_jax.schema import UserError
from tests.conversions import HALF, SQUASH, change_json, pretrained, random_weights

CONFIG, PRE, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
LISTS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
OTHER = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
IMAGENET = {"mean": Preprocess().mean, "std": Preprocess().std}


def directory(path, kind: str, changes: dict):
    """random_weights in a layout, its JSON files changed."""
    path.mkdir()
    formats.LAYOUTS[kind].save(random_weights("cls"), path)
    return change_json(path, changes)


TAKEN = [
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


@pytest.mark.parametrize(("kind", "changes", "expected"), TAKEN)
def test_taken(tmp_path, kind, changes, expected):
    expected = {"mean": SQUASH.mean, "std": SQUASH.std} | expected
    _, found = formats.read(directory(tmp_path / "a", kind, changes), heads=3)
    assert {name: getattr(found.preprocess, name) for name in expected} == expected


ARGS = "model_args"
REFUSED = [
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
    ("timm", {CONFIG: {"pretrained_cfg": [1]}}, "pretrained_cfg is [1], an object"),
    ("timm", {CONFIG: {"model_args": "x"}}, 'model_args is "x", an object'),
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
            ("", "is empty"), ("{'a': 1}", "is no JSON"), ("[]", "holds a JSON list"),
            ("null", "holds a JSON NoneType"), ("<html>\x1b[0m", "is no JSON"),
            ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_refused(tmp_path, kind, changes, message):
    path = directory(tmp_path / "a", kind, changes)
    with pytest.raises(UserError) as refused:
        formats.read(path)
    assert message in str(refused.value) and str(refused.value).isprintable(), refused.value
    assert str(path) in str(refused.value)


def of(kind: str, tmp_path):
    """The notes of weights beside which nothing tells the preprocessing."""
    path = tmp_path / "a.safetensors"
    weights = random_weights(width=384, heads=6)
    state = layout.write(timm.LAYOUT.table(weights), weights.params)
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
    found, weights = formats.read(path, **heads)
    assert found.name == kind and weights.preprocess == Preprocess()
    return weights.notes


@pytest.mark.parametrize("kind", ["timm", "mae", "dinov2_pth", "digpt"])
def test_what_is_assumed_is_said(tmp_path, kind):
    assert "does not tell its mean and std: ImageNet's" in of(kind, tmp_path)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({PRE: None}, ["mean and std and filter"]),
        ({PRE: json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})}, ["filter"]),
        ({PRE: json.dumps({"resample": 3})}, ["mean and std"]),
        ({}, []),
    ],
)
def test_hugging_faces_defaults_are_said(tmp_path, changes, said):
    _, found = formats.read(directory(tmp_path / "a", "hf", changes))
    assert (found.preprocess.mean, found.preprocess.std) == (HALF, HALF)
    assert [note.split(" its ")[1].split(":")[0] for note in found.notes] == said


def test_arrays_and_metadata_of_no_use(tmp_path):
    path = tmp_path / "a.safetensors"
    state = layout.write(timm.LAYOUT.table(random_weights()), random_weights().params)
    flat = {"patch_embed.proj.weight": state["patch_embed.proj.weight"].reshape(24, -1)}
    files.write_safetensors(path, state | flat, {})
    with pytest.raises(UserError, match="is no weights of layout timm: ValueError not enough"):
        formats.read(path, heads=3)
    for text in ("{", "[]", '{"format": "x"}', '{"format": 1}'):
        files.write_safetensors(path, state, {"dgpt_jax": text})
        with pytest.raises(UserError, match="is no weights of layout safetensors"):
            formats.read(path)


def test_a_change_of_one_value_is_read_back(tmp_path):
    """What is written is read as it was, so that no check here is in the way of an export."""
    for number, how in enumerate([SQUASH, dataclasses.replace(SQUASH, **OTHER)]):
        for kind in ("timm", "hf"):
            path = tmp_path / f"{kind}{number}"
            path.mkdir()
            formats.LAYOUTS[kind].save(random_weights(preprocess=how), path)
            _, found = formats.read(path)
            assert (found.preprocess, found.notes) == (how, ())
