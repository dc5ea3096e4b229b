"""tools/convert.py: round trips, parity with installed libraries, errors that leave no files."""

import json
import os
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dgpt_jax.weights import export, files, parity, registry
from dgpt_jax.weights.types import adapt
from tests.support.conversions import convert, convert_error, random_weights, same
from tests.support.paths import GOLDEN

OFFICIAL = GOLDEN / "digpt_tiny.safetensors"
HEADS = ("--heads=3", "--decoder_heads=2")
CASES = [
    ("safetensors", "mean", 5, dict(eps=1e-5, activation="quick_gelu")),
    ("flax", "cls", 5, dict(eps=1e-5)),
    ("timm", "mean", 5, {}),
    ("timm", "cls", 0, dict(activation="gelu_tanh")),
    ("hf", "cls", 5, dict(eps=1e-12, activation="quick_gelu")),
    ("hf", "cls", 0, {}),
]


@pytest.mark.parametrize("name,pooling,classes,changes", CASES)
def test_round_trip(tmp_path, name, pooling, classes, changes):
    """Parameters, geometry, eps, GELU and preprocessing are bitwise equal; no temporary files."""
    weights = random_weights(pooling, classes, **changes)
    path, verified = export.write(weights, registry.LAYOUTS[name], tmp_path / "out")
    layout, again = registry.read(path)
    assert layout.name == name
    same(weights, again)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out/README.md").is_file()
    assert name not in ("flax", "safetensors") or "at most 0.0e+00" in verified


def test_official_layout_round_trip(tmp_path, monkeypatch, capsys):
    """official_torch_test covers the outputs."""
    pytest.importorskip("torch")
    convert(monkeypatch, OFFICIAL.with_suffix(".pth"), tmp_path / "run", "--to=flax", *HEADS)
    convert(monkeypatch, tmp_path / "run", tmp_path / "a.pth", "--to=digpt")
    assert "\nverified: " in capsys.readouterr().out
    state, expected = files.read_state(tmp_path / "a.pth"), load_file(OFFICIAL)
    assert set(expected) <= set(state)
    for name in expected:
        np.testing.assert_allclose(state[name], expected[name], atol=1e-6 if "pos" in name else 0)


def test_norms_that_must_be_equal(tmp_path, monkeypatch):
    state = load_file(OFFICIAL)
    state["kd_enc_norm.2.weight"] = state["kd_enc_norm.2.weight"] + 1e-3
    save_file(state, tmp_path / "a.safetensors")
    message = convert_error(
        monkeypatch, tmp_path / "a.safetensors", tmp_path / "out", "--to=flax", *HEADS
    )
    assert "kd_enc_norm.0.weight and kd_enc_norm.2.weight" in message
    assert os.listdir(tmp_path) == ["a.safetensors"]


ERRORS = [
    ("--to=digpt", "without decoders"),
    ("--to=flax --part=full", "without decoders"),
    ("--to=timm --part=full", "--part=encoder"),
    ("--to=big_vision", "--activation=gelu_tanh"),
    ("--to=timm --pooling=mean", "pooling cls, not mean"),
    ("--to=timm --image_size=30", "30 is not a multiple of the patch size 8"),
    ("--to=timm --from=hf", "config.json"),
    ("--to=timm --from=mae --heads=7", "multiple of 4"),
]


@pytest.mark.parametrize("words,message", ERRORS)
def test_errors(tmp_path, monkeypatch, words, message):
    source = GOLDEN / "timm_vit_tiny_token.safetensors"
    words = words.split() if "--heads" in words else [*words.split(), "--heads=3"]
    assert message in convert_error(monkeypatch, source, tmp_path / "out", *words)
    assert os.listdir(tmp_path) == []


def test_requested_changes(tmp_path, monkeypatch, capsys):
    source = GOLDEN / "timm_vit_tiny_token.safetensors"
    options = ("--image_size=48", "--activation=gelu_tanh", "--eps=1e-6", "--heads=3")
    convert(monkeypatch, source, tmp_path / "a.npz", "--to=big_vision", *options)
    out = capsys.readouterr().out
    assert "image_size changed from 32 to 48" in out
    assert "activation changed from gelu to gelu_tanh" in out
    _, weights = registry.read(tmp_path / "a.npz")
    assert weights.model.image_size == 48 and weights.num_classes == 10


@pytest.mark.parametrize("size", [384, 112])
def test_positions_are_resized_as_in_timm(size):
    """With torch's antialiased bicubic, without the position of CLS."""
    torch = pytest.importorskip("torch")
    weights = random_weights(patch=16, image_size=224, depth=1)
    positions = adapt(weights, image_size=size).params["pos_embed"]
    old = torch.tensor(weights.params["pos_embed"])
    grid = old[:, 1:].reshape(1, 14, 14, 24).permute(0, 3, 1, 2)
    new = torch.nn.functional.interpolate(
        grid, size=(size // 16, size // 16), mode="bicubic", antialias=True
    )
    expected = torch.cat([old[:, :1], new.flatten(2).mT], dim=1)
    np.testing.assert_allclose(positions, expected.numpy(), atol=1e-5)
    assert adapt(weights, image_size=224) is weights


def test_keys_of_source_and_target(tmp_path, monkeypatch, capsys):
    words = ("--keys", "--to=big_vision", "--activation=gelu_tanh", "--heads=3")
    convert(monkeypatch, GOLDEN / "timm_vit_tiny_token.safetensors", *words)
    lines = capsys.readouterr().out.splitlines()
    assert "pos_embed  (1, 17, 48)  pos_embed" in lines
    assert "pos_embedding  (1, 16, 48)  pos_embed" in lines
    name = "Transformer/encoderblock_2/MultiHeadDotProductAttention_0/value/bias"
    assert f"{name}  (3, 16)  encoder/blocks/attn/qkv/bias[2][2]" in lines
    assert os.listdir(tmp_path) == []


def test_keys(monkeypatch, capsys):
    convert(monkeypatch, OFFICIAL, "--keys", *HEADS)
    lines = capsys.readouterr().out.splitlines()
    assert "blocks.3.attn.qkv.weight  (144, 48)  encoder/blocks/attn/qkv/kernel[3]" in lines
    names = {line.split("  ")[0] for line in lines[1:]}
    assert names == set(load_file(OFFICIAL)) - {"mask", "pos_embed", "decoder_pos_embed"}


def test_an_export_with_other_outputs_is_removed(tmp_path, monkeypatch):
    """For example by a mistake in a table."""
    pytest.importorskip("transformers")
    source = tmp_path / "a.safetensors"
    export.write(random_weights(), registry.LAYOUTS["safetensors"], source)
    outputs = parity.outputs

    def wrong(weights):
        blocks = outputs(weights).blocks.copy()
        blocks[1] += 1
        return parity.Outputs(blocks, outputs(weights).features + 2e-4)

    monkeypatch.setattr(parity, "outputs", wrong)
    message = convert_error(monkeypatch, source, tmp_path / "hf", "--to=hf")
    assert "block is 1 (1.0e+00)" in message and "1e-04" in message
    assert sorted(os.listdir(tmp_path)) == ["README.md", "a.safetensors"]


def test_a_missing_framework(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    source = GOLDEN / "timm_vit_tiny_avg.safetensors"
    convert(monkeypatch, source, tmp_path / "out", "--to=timm", "--heads=3")
    remedy = "timm is not installed: tools/setup_venv.sh parity\n"
    assert f"not verified: {remedy}" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["global_pool"] == "avg" and config["num_classes"] == 10
