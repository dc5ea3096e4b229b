"""MAE and DINOv2 encoders in; files that are broken or hostile; a large geometry; live timm."""

import json
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dgpt_jax.convert import dinov2_encoder, export, files, formats, layout, parity, timm
from dgpt_jax.convert.weights import Preprocess, change
from dgpt_jax.schema import UserError
from tests import parity as towers
from tests.conversions import convert, random_weights, refused
from tests.paths import GOLDEN

TOKEN = GOLDEN / "timm_vit_tiny_token.safetensors"


@pytest.fixture
def live_timm():
    pytest.importorskip("torch")
    return pytest.importorskip("timm")


def mae(path, width=768, **changes):
    """Writes a MAE checkpoint (decoder and all) and returns the encoder's weights."""
    torch = pytest.importorskip("torch")
    weights = random_weights(width=width, heads=12, depth=1, mlp_width=2 * width)
    state = layout.write(timm.LAYOUT.table(weights), weights.params)
    state |= {"mask_token": np.zeros((1, 1, 8), np.float32)}
    state |= {"decoder_embed.weight": np.zeros((8, width), np.float32)} | changes
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    torch.save({"model": tensors, "epoch": 1}, path)
    return weights


def test_mae(tmp_path, monkeypatch, capsys):
    weights = mae(tmp_path / "mae.pth")
    convert(monkeypatch, tmp_path / "mae.pth", tmp_path / "a.safetensors", "--to=safetensors")
    assert "MAE's decoder is left out" in capsys.readouterr().out
    found, again = formats.read(tmp_path / "a.safetensors")
    assert (found.name, again.model.heads, again.pooling) == ("safetensors", 12, "cls")
    assert formats.read(tmp_path / "mae.pth")[0].name == "mae"
    for path, array in weights.params.items():
        np.testing.assert_array_equal(again.params[path], array)
    mae(tmp_path / "b.pth", surplus=np.zeros(2, np.float32))
    message = refused(monkeypatch, tmp_path / "b.pth", tmp_path / "out", "--to=timm")
    assert "unknown surplus" in message and not (tmp_path / "out").exists()


def dinov2(kind, directory, **changes):
    transformers = pytest.importorskip("transformers")
    settings = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, image_size=40,
                    patch_size=8, mlp_ratio=2) | changes  # fmt: skip
    config = getattr(transformers, kind + "Config")(**settings)
    model = towers.randomise(getattr(transformers, kind + "Model")(config))
    model.save_pretrained(directory)
    return model


def test_dinov2(tmp_path, monkeypatch, capsys):
    model = dinov2("Dinov2", tmp_path / "theirs")
    convert(monkeypatch, tmp_path / "theirs", tmp_path / "ours", "--to=flax", "--keys")
    out = capsys.readouterr().out
    assert "LayerScale is folded" in out
    assert "encoder.layer.2.layer_scale1.lambda1  folded" in out
    found, weights = formats.read(tmp_path / "ours")
    assert found.name == "flax" and weights.model.eps == 1e-6
    expected = towers.hidden_state(model, parity.images(weights.model))[:, 0]
    np.testing.assert_allclose(parity.outputs(weights).features, expected, atol=2e-5)


@pytest.mark.parametrize(
    "kind,changes,message",
    [
        ("Dinov2WithRegisters", {}, "cannot have the registers"),
        ("Dinov2", dict(use_swiglu_ffn=True), "cannot have the gated MLPs"),
    ],
)
def test_dinov2_that_no_encoder_here_can_be(tmp_path, monkeypatch, kind, changes, message):
    dinov2(kind, tmp_path / "theirs", **changes)
    assert message in refused(monkeypatch, tmp_path / "theirs", tmp_path / "out", "--to=timm")
    assert not (tmp_path / "out").exists()


def own_dinov2(path, depth=2, **more):
    """Writes weights by the names of DINOv2's own code; returns them, their scales folded in."""
    weights = random_weights(width=384, heads=6, depth=depth, mlp_width=768)
    rng = np.random.default_rng(1)
    params = dict(weights.params)
    for name, projection in dinov2_encoder.SCALED.items():
        scale = 2.0 ** rng.integers(-3, 4, (depth, 384)).astype(np.float32)  # exact to divide by
        params[f"encoder/blocks/{name}"] = scale
        where = f"encoder/blocks/{projection}"
        params[f"{where}/kernel"] = params[f"{where}/kernel"] / scale[:, None]
        params[f"{where}/bias"] = params[f"{where}/bias"] / scale
    state = layout.write(dinov2_encoder.own_entries(depth), params)
    files.write_safetensors(path, state | {"mask_token": np.zeros((1, 384), np.float32)} | more, {})
    return weights


def test_dinov2_by_its_own_names(tmp_path, monkeypatch):
    """As torch.hub has them, and timm."""
    expected = own_dinov2(tmp_path / "a.safetensors")
    found, weights = formats.read(tmp_path / "a.safetensors")
    assert (found.name, weights.model.heads, weights.pooling) == ("dinov2_pth", 6, "cls")
    for name, array in expected.params.items():
        np.testing.assert_array_equal(weights.params[name], array, err_msg=name)
    some = np.zeros((1, 4, 384), np.float32)
    for more, message in [
        ({"register_tokens": some}, "cannot have the registers"),
        ({"blocks.0.mlp.w12.weight": some}, "cannot have the gated MLPs"),
        ({"surplus": some}, "unknown surplus"),
    ]:
        own_dinov2(tmp_path / "a.safetensors", **more)
        assert message in refused(
            monkeypatch, tmp_path / "a.safetensors", tmp_path / "out", "--to=timm"
        )


def test_dinov2_in_timm(live_timm, tmp_path):
    own_dinov2(tmp_path / "a.safetensors")
    _, weights = formats.read(tmp_path / "a.safetensors")
    model = live_timm.models.VisionTransformer(
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
        (state | {"blocks.1.attn.qkv.weight": kernel.T.copy()}, "has shape (48, 144), (144, 48)"),
        (state | {"blocks.1.attn.qkv.weight": kernel.astype(np.float64)}, "is float64"),
        (state | {"norm.bias": np.zeros(48, np.int32)}, "norm.bias is int32"),
        (state | {"pos_embed": state["pos_embed"][:, :-2]}, "not those of CLS and a square"),
        (state | {"fc_norm.weight": state["norm.weight"]}, "either fc_norm or norm, this has 2"),
        ({"a": np.zeros(3, np.float32)}, "in none of the layouts"),
    ]
    for broken, message in cases:
        save_file(broken, path)
        assert message in refused(monkeypatch, path, tmp_path / "out", "--to=flax", "--heads=3")
    truncated(path, state)
    assert "no readable safetensors" in refused(monkeypatch, path, tmp_path / "out", "--to=hf")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 nothing")
    assert "no readable .npz" in refused(
        monkeypatch, tmp_path / "b.npz", tmp_path / "out", "--to=hf"
    )
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.npz"]


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['DGPT_TEST_MARK']}",)


def test_pickles_with_code_are_not_run(tmp_path, monkeypatch):
    """As .pth (new and old), inside an official checkpoint's args, and as an object in an .npz."""
    torch = pytest.importorskip("torch")
    mark = tmp_path / "mark"
    monkeypatch.setenv("DGPT_TEST_MARK", str(mark))
    state = {n: torch.tensor(x) for n, x in load_file(TOKEN).items()}
    torch.save({"model": state, "args": Malicious()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"model": state, "args": Malicious()}))
    np.savez(tmp_path / "a.npz", cls=np.array([Malicious()], dtype=object))
    for name in ("new.pth", "old.pth", "a.npz"):
        message = refused(monkeypatch, tmp_path / name, tmp_path / "out", "--to=timm", "--heads=3")
        assert "not plain PyTorch weights" in message or "no readable .npz" in message
        assert not mark.exists() and not (tmp_path / "out").exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as bait:
        bait["cls"]
    assert mark.exists()  # it would have worked


def test_l14_at_336(tmp_path):
    """Names, shapes and metadata of a large geometry, of which one block is enough."""
    weights = random_weights(
        "cls", 7, Preprocess(), width=1024, heads=16, patch=14, depth=1, mlp_width=4096,
        image_size=224,
    )  # fmt: skip
    weights = change(weights, image_size=336)
    assert weights.params["pos_embed"].shape == (1, 577, 1024)
    path = tmp_path / "hf"
    path.mkdir()
    formats.LAYOUTS["hf"].save(weights, path)
    config = json.loads((path / "config.json").read_text())
    assert (config["patch_size"], config["image_size"], config["intermediate_size"]) == (
        14, 336, 4096,
    )  # fmt: skip
    size = json.loads((path / "preprocessor_config.json").read_text())
    assert size["size"] == {"shortest_edge": 384} and size["crop_size"]["height"] == 336
    _, again = formats.read(path)
    for name, array in weights.params.items():
        np.testing.assert_array_equal(again.params[name], array)


@pytest.mark.parametrize("pooling,classes", [("mean", 5), ("cls", 0), ("cls", 5), ("mean", 0)])
def test_timm_computes_the_same(live_timm, tmp_path, pooling, classes):
    weights = random_weights(pooling, classes, activation="gelu_tanh", depth=3)
    path, verified = export.write(weights, formats.LAYOUTS["timm"], tmp_path / "out")
    assert verified.startswith("verified: features in timm")
    model = live_timm.create_model(f"local-dir:{path}", pretrained=True)
    config = live_timm.data.resolve_data_config(model=model)
    assert list(config["mean"]) == [0.5, 0.5, 0.5] and config["crop_mode"] == "squash"
    assert config["interpolation"] == "bilinear" and config["input_size"] == (3, 16, 16)
    larger = change(weights, image_size=24)
    resized = live_timm.layers.resample_abs_pos_embed(
        __import__("torch").tensor(weights.params["pos_embed"]), (6, 6), num_prefix_tokens=1
    )
    np.testing.assert_allclose(larger.params["pos_embed"], resized.numpy(), atol=1e-5)


def test_a_wrong_timm_head_count_is_seen(live_timm, tmp_path, monkeypatch):
    weights = random_weights()
    wrong = timm.config_json(weights)
    wrong["model_args"]["num_heads"] = 6
    monkeypatch.setattr(timm, "config_json", lambda weights: wrong)
    with pytest.raises(UserError, match="more than 1e-04, the export is removed"):
        export.write(weights, formats.LAYOUTS["timm"], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_bfloat16_in(tmp_path):
    torch = pytest.importorskip("torch")
    state = {n: torch.tensor(x).bfloat16() for n, x in load_file(TOKEN).items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    _, weights = formats.read(tmp_path / "a.pth", heads=3)
    kernel = state["blocks.0.attn.proj.weight"].float().numpy()
    np.testing.assert_array_equal(weights.params["encoder/blocks/attn/proj/kernel"][0], kernel.T)
