"""tools/convert.py: round trips, parity with installed libraries, refusals that leave nothing."""

import json
import os
import sys

import flax.linen as nn
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dgpt_jax import cli, views, vit
from dgpt_jax.convert import export, files, formats, parity
from dgpt_jax.convert.weights import Preprocess, Weights, change, encoder_model, encoder_shapes
from tests import parity as towers
from tests.paths import GOLDEN

OFFICIAL = GOLDEN / "digpt_tiny.safetensors"
HEADS = ("--heads=3", "--decoder_heads=2")
HALF = (0.5, 0.5, 0.5)
LABELS = {"id2label", "label2id"}
SQUASH = Preprocess(HALF, HALF, "bilinear", 1.0, "squash")


def random_weights(pooling="cls", classes=0, preprocess=SQUASH, **changes) -> Weights:
    """An encoder with all parameters random."""
    sizes = dict(width=24, patch=4, heads=3, depth=2, mlp_width=40, image_size=16) | changes
    model = encoder_model(**sizes)
    rng = np.random.default_rng(0)
    params = {
        path: rng.standard_normal(shape).astype(np.float32) * (0.3 if len(shape) > 1 else 1)
        for path, shape in encoder_shapes(model, pooling, classes).items()
    }
    return Weights(model, params, pooling, "random", preprocess)


def convert(monkeypatch, *words):
    import convert as tool

    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    cli.run(tool.main)


def refused(monkeypatch, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        convert(monkeypatch, *words)
    message = ended.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def same(a: Weights, b: Weights):
    assert (a.model, a.pooling, a.preprocess) == (b.model, b.pooling, b.preprocess)
    assert set(a.params) == set(b.params)
    for path in a.params:
        np.testing.assert_array_equal(a.params[path], b.params[path])


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
    """Parameters, geometry, eps, GELU and preprocessing come back to the bit; no file is left."""
    weights = random_weights(pooling, classes, **changes)
    path, verified = export.write(weights, formats.LAYOUTS[name], tmp_path / "out")
    found, again = formats.read(path)
    assert found.name == name
    same(weights, again)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out/README.md").is_file()
    assert name not in ("flax", "safetensors") or "at most 0.0e+00" in verified


def test_through_all_layouts(tmp_path):
    """timm, Hugging Face, big_vision and our own two, one out of the other: the same to the bit."""
    weights = random_weights("cls", 5, activation="gelu_tanh")
    weights.params["pos_embed"][:, 0] = 0  # big_vision's CLS has no position
    path = None
    for name in ("timm", "hf", "big_vision", "flax", "safetensors", "timm"):
        one = formats.LAYOUTS[name]
        before = weights if path is None else formats.read(path)[1]
        path, _ = export.write(before, one, tmp_path / f"{name}{path is None}")
    again = formats.read(path)[1]
    assert again.model == weights.model
    for name, array in weights.params.items():
        np.testing.assert_array_equal(again.params[name], array)


def test_big_vision_round_trip(tmp_path):
    weights = random_weights("cls", 5, activation="gelu_tanh")
    path, verified = export.write(weights, formats.LAYOUTS["big_vision"], tmp_path / "a.npz")
    assert verified == "not verified: big_vision is not installed"
    with np.load(path) as state:
        assert state["params/pos_embedding"].shape == (1, 16, 24)
        kernel = state[
            "params/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/kernel"
        ]
        assert kernel.shape == (24, 3, 8)
    _, once = formats.read(path)
    ours, theirs = parity.outputs(weights), parity.outputs(once)
    np.testing.assert_allclose(theirs.features, ours.features, atol=1e-5)
    path, _ = export.write(once, formats.LAYOUTS["big_vision"], tmp_path / "b.npz")
    same(once, formats.read(path)[1])


def test_big_vision_in_flax(tmp_path):
    """Its attention is Flax's own: query, key and value (D, heads, head), out (heads, head, D)."""
    weights = random_weights("cls", 0, activation="gelu_tanh", depth=1)
    path, _ = export.write(weights, formats.LAYOUTS["big_vision"], tmp_path / "a.npz")
    prefix = "params/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/"
    params: dict = {}
    for name, array in files.read_state(path).items():
        if name.startswith(prefix):
            part, leaf = name.removeprefix(prefix).split("/")
            params.setdefault(part, {})[leaf] = array
    x = np.random.default_rng(1).standard_normal((2, 5, 24)).astype(np.float32)
    theirs = nn.MultiHeadDotProductAttention(num_heads=3).apply({"params": params}, x, x)
    ours = {p.rsplit("/attn/")[1]: v[0] for p, v in weights.params.items() if "/attn/" in p}
    attn = {
        "qkv": {leaf: ours[f"qkv/{leaf}"] for leaf in ("kernel", "bias")},
        "proj": {leaf: ours[f"proj/{leaf}"] for leaf in ("kernel", "bias")},
    }
    np.testing.assert_allclose(
        vit.Attention(3, np.float32).apply({"params": attn}, x), theirs, atol=1e-5
    )


@pytest.mark.parametrize("suffix,by", [(".pth", "flax"), (".safetensors", "digpt")])
def test_the_official_layout_and_back(tmp_path, monkeypatch, capsys, suffix, by):
    """files_test holds what it computes; here, that nothing changes on the way."""
    pytest.importorskip("torch")
    source = OFFICIAL.with_suffix(suffix)
    between = tmp_path / ("run" if by == "flax" else "a.safetensors")
    convert(monkeypatch, source, between, f"--to={by}", *HEADS)
    if by == "flax":
        convert(monkeypatch, between, tmp_path / "a.pth", "--to=digpt")
    assert "verified: features in torch" in capsys.readouterr().out
    state, expected = files.read_state(tmp_path / f"a{suffix}"), load_file(OFFICIAL)
    assert set(expected) <= set(state)
    for name in expected:
        np.testing.assert_allclose(state[name], expected[name], atol=1e-6 if "pos" in name else 0)


def test_norms_that_must_be_equal(tmp_path, monkeypatch):
    state = load_file(OFFICIAL)
    state["kd_enc_norm.2.weight"] = state["kd_enc_norm.2.weight"] + 1e-3
    save_file(state, tmp_path / "a.safetensors")
    message = refused(
        monkeypatch, tmp_path / "a.safetensors", tmp_path / "out", "--to=flax", *HEADS
    )
    assert "kd_enc_norm.0.weight and kd_enc_norm.2.weight must be equal" in message
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_transformers_golden(tmp_path, monkeypatch):
    """Without transformers: numbers that it produced, an eps that shows, and back to the bit."""
    golden = GOLDEN / "hf_vit_tiny"
    found, weights = formats.read(golden)
    assert (found.name, weights.model.eps, weights.num_classes) == ("hf", 1e-3, 5)
    images = np.random.default_rng(19).standard_normal((2, 3, 16, 16)).astype(np.float32)
    monkeypatch.setattr(parity, "images", lambda model: images.transpose(0, 2, 3, 1))
    outputs, expected = parity.outputs(weights), np.load(golden / "expected.npz")
    np.testing.assert_allclose(outputs.blocks, expected["blocks"], atol=2e-5)
    np.testing.assert_allclose(outputs.features, expected["logits"], atol=2e-5)
    monkeypatch.setitem(sys.modules, "transformers", None)
    convert(monkeypatch, golden, tmp_path / "again", "--to=hf")
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "again", golden))
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((golden / "config.json").read_text())
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert all(config[name] == written[name] for name in set(config) & set(written) - LABELS)


@pytest.mark.parametrize("classes", [0, 5])
def test_transformers_computes_the_same(tmp_path, monkeypatch, classes):
    """Theirs to ours, and ours, all parameters random, to theirs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        image_size=16, patch_size=4, hidden_act="gelu_pytorch_tanh", num_labels=classes or 2,
    )  # fmt: skip
    kind = transformers.ViTForImageClassification if classes else transformers.ViTModel
    model = towers.randomise(kind(config))
    model.save_pretrained(tmp_path / "theirs")
    found, weights = formats.read(tmp_path / "theirs")
    assert (found.name, weights.model.eps, weights.model.activation) == ("hf", 1e-12, "gelu_tanh")
    assert weights.num_classes == classes
    expected = parity._hf(tmp_path / "theirs", weights) if classes else None
    if not classes:
        tokens = towers.hidden_state(model, parity.images(weights.model))
        np.testing.assert_allclose(parity.outputs(weights).features, tokens[:, 0], atol=1e-5)
    else:
        np.testing.assert_allclose(parity.outputs(weights).features, expected.features, atol=1e-5)
    convert(monkeypatch, tmp_path / "theirs", tmp_path / "again", "--to=hf")
    _, again = formats.read(tmp_path / "again")
    same(weights, again)


def test_an_image_processor_is_written_that_prepares_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    weights = random_weights(preprocess=Preprocess(), image_size=56, patch=14)
    export.write(weights, formats.LAYOUTS["hf"], tmp_path / "hf")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    except ImportError as e:
        pytest.skip(str(e))
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    theirs = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = vit.normalise(views.centre_crop(picture, 64, 56, squash=False))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_mean_pooling_is_nothing_for_hugging_face(tmp_path, monkeypatch):
    source = GOLDEN / "timm_vit_tiny_avg.safetensors"
    message = refused(monkeypatch, source, tmp_path / "out", "--to=hf", "--heads=3")
    assert "cannot hold mean pooling" in message and "--to=timm" in message
    assert os.listdir(tmp_path) == []


REFUSED = [
    ("--to=digpt", "holds an encoder without decoders"),
    ("--to=flax --part=full", "holds an encoder without decoders"),
    ("--to=timm --part=full", "layout timm holds an encoder only"),
    ("--to=big_vision", "has activation gelu_tanh, these weights gelu"),
    ("--to=timm --pooling=mean", "has pooling cls, not mean"),
    ("--to=timm --image_size=30", "30 is not a multiple of the patch size 8"),
    ("--to=timm --from=hf", "config.json must lie beside it"),
    ("--to=timm --from=mae --heads=7", "must be a multiple of 4"),
]


@pytest.mark.parametrize("words,message", REFUSED)
def test_what_cannot_be_held_is_one_line(tmp_path, monkeypatch, words, message):
    source = GOLDEN / "timm_vit_tiny_token.safetensors"
    words = words.split() if "--heads" in words else [*words.split(), "--heads=3"]
    assert message in refused(monkeypatch, source, tmp_path / "out", *words)
    assert os.listdir(tmp_path) == []


def test_changes_only_when_asked(tmp_path, monkeypatch, capsys):
    source = GOLDEN / "timm_vit_tiny_token.safetensors"
    asked = ("--image_size=48", "--activation=gelu_tanh", "--eps=1e-6", "--heads=3")
    convert(monkeypatch, source, tmp_path / "a.npz", "--to=big_vision", *asked)
    out = capsys.readouterr().out
    assert "image_size is 48, was 32" in out and "activation is gelu_tanh, was gelu" in out
    _, weights = formats.read(tmp_path / "a.npz")
    assert weights.model.image_size == 48 and weights.num_classes == 10


@pytest.mark.parametrize("size", [384, 112])
def test_positions_are_resized_as_timm_does(size):
    """timm: torch's bicubic with antialiasing, of the patches' positions alone."""
    torch = pytest.importorskip("torch")
    weights = random_weights(patch=16, image_size=224, depth=1)
    positions = change(weights, image_size=size).params["pos_embed"]
    old = torch.tensor(weights.params["pos_embed"])
    grid = old[:, 1:].reshape(1, 14, 14, 24).permute(0, 3, 1, 2)
    new = torch.nn.functional.interpolate(
        grid, size=(size // 16, size // 16), mode="bicubic", antialias=True
    )
    expected = torch.cat([old[:, :1], new.flatten(2).mT], dim=1)
    np.testing.assert_allclose(positions, expected.numpy(), atol=1e-5)
    assert change(weights, image_size=224) is weights


def test_keys_of_both_ends(tmp_path, monkeypatch, capsys):
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


def test_an_export_that_computes_otherwise_is_removed(tmp_path, monkeypatch):
    """A mistake in a table, as if q and k had been exchanged when it was written."""
    pytest.importorskip("transformers")
    source = tmp_path / "a.safetensors"
    export.write(random_weights(), formats.LAYOUTS["safetensors"], source)
    outputs = parity.outputs

    def other(weights):
        blocks = outputs(weights).blocks.copy()
        blocks[1] += 1
        return parity.Outputs(blocks, outputs(weights).features + 2e-4)

    monkeypatch.setattr(parity, "outputs", other)
    message = refused(monkeypatch, source, tmp_path / "hf", "--to=hf")
    assert "the worst block is 1 (1.0e+00): more than 1e-04, the export is removed" in message
    assert sorted(os.listdir(tmp_path)) == ["README.md", "a.safetensors"]


def test_without_the_framework(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    source = GOLDEN / "timm_vit_tiny_avg.safetensors"
    convert(monkeypatch, source, tmp_path / "out", "--to=timm", "--heads=3")
    assert "not verified: timm is not installed" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["global_pool"] == "avg" and config["num_classes"] == 10
