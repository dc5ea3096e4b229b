"""MAE and DINOv2 encoders; broken and malicious files; a large geometry; timm."""

import json
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dgpt_jax.errors import UserError
from dgpt_jax.weights import export, files, mapping, parity, registry
from dgpt_jax.weights.layouts import dinov2_encoder, timm
from dgpt_jax.weights.types import Preprocess, adapt
from tests.support import parity as towers
from tests.support.conversions import convert, convert_error, random_weights
from tests.support.paths import GOLDEN

TOKEN = GOLDEN / "timm_vit_tiny_token.safetensors"


@pytest.fixture
def installed_timm():
    pytest.importorskip("torch")
    return pytest.importorskip("timm")


def mae(path, width=768, **changes):
    """Writes a MAE checkpoint (decoder and all) and returns the encoder's weights."""
    torch = pytest.importorskip("torch")
    weights = random_weights(width=width, heads=12, depth=1, mlp_width=2 * width)
    state = mapping.write(timm.LAYOUT.table(weights), weights.params)
    state |= {"mask_token": np.zeros((1, 1, 8), np.float32)}
    state |= {"decoder_embed.weight": np.zeros((8, width), np.float32)} | changes
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    torch.save({"model": tensors, "epoch": 1}, path)
    return weights


def test_mae(tmp_path, monkeypatch, capsys):
    weights = mae(tmp_path / "mae.pth")
    convert(monkeypatch, tmp_path / "mae.pth", tmp_path / "a.safetensors", "--to=safetensors")
    assert "MAE's decoder" in capsys.readouterr().out
    layout, again = registry.read(tmp_path / "a.safetensors")
    assert (layout.name, again.model.heads, again.pooling) == ("safetensors", 12, "cls")
    assert registry.read(tmp_path / "mae.pth")[0].name == "mae"
    for path, array in weights.params.items():
        np.testing.assert_array_equal(again.params[path], array)
    mae(tmp_path / "b.pth", surplus=np.zeros(2, np.float32))
    message = convert_error(monkeypatch, tmp_path / "b.pth", tmp_path / "out", "--to=timm")
    assert "unknown surplus" in message and not (tmp_path / "out").exists()


def dinov2(kind, directory, **changes):
    transformers = pytest.importorskip("transformers")
    settings = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, image_size=40,
                    patch_size=8, mlp_ratio=2) | changes  # fmt: skip
    config = getattr(transformers, kind + "Config")(**settings)
    model = towers.randomize(getattr(transformers, kind + "Model")(config))
    model.save_pretrained(directory)
    return model


def test_dinov2(tmp_path, monkeypatch, capsys):
    model = dinov2("Dinov2", tmp_path / "source")
    convert(monkeypatch, tmp_path / "source", tmp_path / "native", "--to=flax", "--keys")
    out = capsys.readouterr().out
    assert "LayerScale" in out
    assert "encoder.layer.2.layer_scale1.lambda1  folded" in out
    layout, weights = registry.read(tmp_path / "native")
    assert layout.name == "flax" and weights.model.eps == 1e-6
    expected = towers.hidden_state(model, parity.images(weights.model))[:, 0]
    np.testing.assert_allclose(parity.outputs(weights).features, expected, atol=2e-5)


@pytest.mark.parametrize(
    "kind,changes,message",
    [
        ("Dinov2WithRegisters", {}, "registers"),
        ("Dinov2", dict(use_swiglu_ffn=True), "gated MLPs"),
    ],
)
def test_unsupported_dinov2(tmp_path, monkeypatch, kind, changes, message):
    dinov2(kind, tmp_path / "source", **changes)
    assert message in convert_error(monkeypatch, tmp_path / "source", tmp_path / "out", "--to=timm")
    assert not (tmp_path / "out").exists()


def own_dinov2(path, depth=2, **arrays):
    """Writes weights by the names of DINOv2's own code; returns them with folded scales."""
    weights = random_weights(width=384, heads=6, depth=depth, mlp_width=768)
    rng = np.random.default_rng(1)
    params = dict(weights.params)
    for name, projection in dinov2_encoder.SCALED.items():
        scale = 2.0 ** rng.integers(-3, 4, (depth, 384)).astype(np.float32)  # division is exact
        params[f"encoder/blocks/{name}"] = scale
        prefix = f"encoder/blocks/{projection}"
        params[f"{prefix}/kernel"] = params[f"{prefix}/kernel"] / scale[:, None]
        params[f"{prefix}/bias"] = params[f"{prefix}/bias"] / scale
    state = mapping.write(dinov2_encoder.own_entries(depth), params)
    files.write_safetensors(
        path, state | {"mask_token": np.zeros((1, 384), np.float32)} | arrays, {}
    )
    return weights


def test_dinov2_by_its_own_names(tmp_path, monkeypatch):
    """Names of torch.hub and timm."""
    expected = own_dinov2(tmp_path / "a.safetensors")
    layout, weights = registry.read(tmp_path / "a.safetensors")
    assert (layout.name, weights.model.heads, weights.pooling) == ("dinov2_pth", 6, "cls")
    for name, array in expected.params.items():
        np.testing.assert_array_equal(weights.params[name], array, err_msg=name)
    array = np.zeros((1, 4, 384), np.float32)
    for extra, message in [
        ({"register_tokens": array}, "registers"),
        ({"blocks.0.mlp.w12.weight": array}, "gated MLPs"),
        ({"surplus": array}, "unknown surplus"),
    ]:
        own_dinov2(tmp_path / "a.safetensors", **extra)
        assert message in convert_error(
            monkeypatch, tmp_path / "a.safetensors", tmp_path / "out", "--to=timm"
        )


def test_dinov2_in_timm(installed_timm, tmp_path):
    own_dinov2(tmp_path / "a.safetensors")
    _, weights = registry.read(tmp_path / "a.safetensors")
    model = installed_timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=384, depth=2, num_heads=6, mlp_ratio=2,
        num_classes=0, init_values=1.0,
    )  # fmt: skip
    torch = pytest.importorskip("torch")
    state = {n: torch.tensor(x) for n, x in load_file(tmp_path / "a.safetensors").items()}
    state.pop("mask_token")
    model.load_state_dict(state)
    images = parity.images(weights.model)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(
        parity.outputs(weights).features, expected, atol=1e-4 * expected.std()
    )


def truncated(path, state):
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-100])


def test_broken_files_leave_nothing(tmp_path, monkeypatch):
    state, path = load_file(TOKEN), tmp_path / "a.safetensors"
    kernel = state["blocks.1.attn.qkv.weight"]
    cases = [
        (state | {"extra": np.zeros(3, np.float32)}, "unknown extra"),
        ({n: x for n, x in state.items() if n != "blocks.1.norm2.bias"}, "missing blocks.1.norm2"),
        (state | {"blocks.1.attn.qkv.weight": kernel.T.copy()}, "(48, 144), expected (144, 48)"),
        (
            state | {"blocks.1.attn.qkv.weight": kernel.astype(np.float64)},
            "blocks.1.attn.qkv.weight is float64",
        ),
        (state | {"norm.bias": np.zeros(48, np.int32)}, "norm.bias is int32"),
        (state | {"pos_embed": state["pos_embed"][:, :-2]}, "positions"),
        (state | {"fc_norm.weight": state["norm.weight"]}, "fc_norm"),
        ({"a": np.zeros(3, np.float32)}, "timm, hf"),
    ]
    for broken, message in cases:
        save_file(broken, path)
        assert message in convert_error(
            monkeypatch, path, tmp_path / "out", "--to=flax", "--heads=3"
        )
    truncated(path, state)
    assert str(path) in convert_error(monkeypatch, path, tmp_path / "out", "--to=hf")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 nothing")
    assert "b.npz" in convert_error(monkeypatch, tmp_path / "b.npz", tmp_path / "out", "--to=hf")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.npz"]


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['DGPT_TEST_MARK']}",)


def test_pickles_with_code_are_not_run(tmp_path, monkeypatch):
    """In .pth (new and old), an official checkpoint's args, and an object in an .npz."""
    torch = pytest.importorskip("torch")
    mark = tmp_path / "mark"
    monkeypatch.setenv("DGPT_TEST_MARK", str(mark))
    state = {n: torch.tensor(x) for n, x in load_file(TOKEN).items()}
    torch.save({"model": state, "args": Malicious()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"model": state, "args": Malicious()}))
    np.savez(tmp_path / "a.npz", cls=np.array([Malicious()], dtype=object))
    for name in ("new.pth", "old.pth", "a.npz"):
        message = convert_error(
            monkeypatch, tmp_path / name, tmp_path / "out", "--to=timm", "--heads=3"
        )
        assert name in message
        assert not mark.exists() and not (tmp_path / "out").exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as file:
        file["cls"]
    assert mark.exists()  # the pickle works


def test_l14_at_336(tmp_path):
    """Names, shapes and JSON of a large geometry, with one block."""
    weights = random_weights(
        "cls", 7, Preprocess(), width=1024, heads=16, patch=14, depth=1, mlp_width=4096,
        image_size=224,
    )  # fmt: skip
    weights = adapt(weights, image_size=336)
    assert weights.params["pos_embed"].shape == (1, 577, 1024)
    path = tmp_path / "hf"
    path.mkdir()
    registry.LAYOUTS["hf"].save(weights, path)
    config = json.loads((path / "config.json").read_text())
    assert (config["patch_size"], config["image_size"], config["intermediate_size"]) == (
        14, 336, 4096,
    )  # fmt: skip
    size = json.loads((path / "preprocessor_config.json").read_text())
    assert size["size"] == {"shortest_edge": 384} and size["crop_size"]["height"] == 336
    _, again = registry.read(path)
    for name, array in weights.params.items():
        np.testing.assert_array_equal(again.params[name], array)


@pytest.mark.parametrize("pooling,classes", [("mean", 5), ("cls", 0), ("cls", 5), ("mean", 0)])
def test_timm_computes_the_same(installed_timm, tmp_path, pooling, classes):
    weights = random_weights(pooling, classes, activation="gelu_tanh", depth=3)
    path, verified = export.write(weights, registry.LAYOUTS["timm"], tmp_path / "out")
    assert verified.startswith("verified: ") and "timm" in verified
    model = installed_timm.create_model(f"local-dir:{path}", pretrained=True)
    config = installed_timm.data.resolve_data_config(model=model)
    assert list(config["mean"]) == [0.5, 0.5, 0.5] and config["crop_mode"] == "squash"
    assert config["interpolation"] == "bilinear" and config["input_size"] == (3, 16, 16)
    larger = adapt(weights, image_size=24)
    resized = installed_timm.layers.resample_abs_pos_embed(
        __import__("torch").tensor(weights.params["pos_embed"]), (6, 6), num_prefix_tokens=1
    )
    np.testing.assert_allclose(larger.params["pos_embed"], resized.numpy(), atol=1e-5)


def test_a_wrong_timm_head_count_is_detected(installed_timm, tmp_path, monkeypatch):
    weights = random_weights()
    wrong = timm.config_json(weights)
    wrong["model_args"]["num_heads"] = 6
    monkeypatch.setattr(timm, "config_json", lambda weights: wrong)
    with pytest.raises(UserError, match="1e-04"):
        export.write(weights, registry.LAYOUTS["timm"], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_reading_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    state = {n: torch.tensor(x).bfloat16() for n, x in load_file(TOKEN).items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    _, weights = registry.read(tmp_path / "a.pth", heads=3)
    kernel = state["blocks.0.attn.proj.weight"].float().numpy()
    np.testing.assert_array_equal(weights.params["encoder/blocks/attn/proj/kernel"][0], kernel.T)
