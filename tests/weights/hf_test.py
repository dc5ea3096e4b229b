"""Hugging Face's ViT against outputs of transformers, recorded and live."""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax.data import image_ops
from dgpt_jax.models import vit
from dgpt_jax.weights import export, parity, registry
from dgpt_jax.weights.types import Preprocess
from tests.support import parity as towers
from tests.support.conversions import convert, convert_error, random_weights, same
from tests.support.paths import GOLDEN

LABELS = {"id2label", "label2id"}


def test_transformers_golden(tmp_path, monkeypatch):
    """Recorded outputs, with an eps that matters, and a bitwise round trip without transformers."""
    golden = GOLDEN / "hf_vit_tiny"
    layout, weights = registry.read(golden)
    assert (layout.name, weights.model.eps, weights.num_classes) == ("hf", 1e-3, 5)
    images = np.random.default_rng(19).standard_normal((2, 3, 16, 16)).astype(np.float32)
    monkeypatch.setattr(parity, "images", lambda model: images.transpose(0, 2, 3, 1))
    outputs, expected = parity.outputs(weights), np.load(golden / "expected.npz")
    np.testing.assert_allclose(outputs.blocks, expected["blocks"], atol=2e-5)
    np.testing.assert_allclose(outputs.features, expected["logits"], atol=2e-5)
    monkeypatch.setitem(sys.modules, "transformers", None)
    convert(monkeypatch, golden, tmp_path / "again", "--to=hf")
    again, source = (load_file(d / "model.safetensors") for d in (tmp_path / "again", golden))
    assert set(again) == set(source)
    assert all(np.array_equal(again[name], source[name]) for name in source)
    config = json.loads((golden / "config.json").read_text())
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert all(config[name] == written[name] for name in set(config) & set(written) - LABELS)


@pytest.mark.parametrize("classes", [0, 5])
def test_transformers_computes_the_same(tmp_path, monkeypatch, classes):
    """Conversion from transformers and to transformers, all parameters random."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        image_size=16, patch_size=4, hidden_act="gelu_pytorch_tanh", num_labels=classes or 2,
    )  # fmt: skip
    kind = transformers.ViTForImageClassification if classes else transformers.ViTModel
    model = towers.randomize(kind(config))
    model.save_pretrained(tmp_path / "source")
    layout, weights = registry.read(tmp_path / "source")
    assert (layout.name, weights.model.eps, weights.model.activation) == ("hf", 1e-12, "gelu_tanh")
    assert weights.num_classes == classes
    expected = parity._hf(tmp_path / "source", weights) if classes else None
    if not classes:
        tokens = towers.hidden_state(model, parity.images(weights.model))
        np.testing.assert_allclose(parity.outputs(weights).features, tokens[:, 0], atol=1e-5)
    else:
        np.testing.assert_allclose(parity.outputs(weights).features, expected.features, atol=1e-5)
    convert(monkeypatch, tmp_path / "source", tmp_path / "again", "--to=hf")
    _, again = registry.read(tmp_path / "again")
    same(weights, again)


def test_the_exported_image_processor_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    weights = random_weights(preprocess=Preprocess(), image_size=56, patch=14)
    export.write(weights, registry.LAYOUTS["hf"], tmp_path / "hf")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    except ImportError as e:
        pytest.skip(str(e))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    actual = vit.normalize(image_ops.center_crop(image, 64, 56, squash=False))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    "size,crop_pct,edge", [(384, 0.875, 438), (64, 64 / 93, 93), (224, 0.9, 248)]
)
def test_crop_pct_in_pixels(tmp_path, size, crop_pct, edge):
    """Rounded as in timm's transforms, and unchanged by a round trip."""
    preprocess = dataclasses.replace(Preprocess(), crop_pct=np.nextafter(crop_pct, 0))
    weights = random_weights(preprocess=preprocess, image_size=size, patch=32)
    for step in ("a", "b"):
        (tmp_path / step).mkdir()
        registry.LAYOUTS["hf"].save(weights, tmp_path / step)
        content = json.loads((tmp_path / step / "preprocessor_config.json").read_text())
        assert content["size"] == {"shortest_edge": edge}
        _, weights = registry.read(tmp_path / step)
        assert int(size / weights.preprocess.crop_pct) == edge


def test_a_broken_installation_of_transformers(tmp_path, monkeypatch):
    """It imports its models, and torchvision, lazily."""
    transformers = pytest.importorskip("transformers")

    def broken(*_, **__):
        raise ModuleNotFoundError("Could not import module") from RuntimeError("no operator nms")

    monkeypatch.setattr(transformers.ViTModel, "from_pretrained", broken)
    _, verified = export.write(random_weights(), registry.LAYOUTS["hf"], tmp_path / "hf")
    assert verified.startswith("not verified: ") and verified.endswith("no operator nms")


def test_mean_pooling_is_refused(tmp_path, monkeypatch):
    source = GOLDEN / "timm_vit_tiny_avg.safetensors"
    message = convert_error(monkeypatch, source, tmp_path / "out", "--to=hf", "--heads=3")
    assert "mean pooling" in message and "--to=timm" in message
    assert os.listdir(tmp_path) == []
