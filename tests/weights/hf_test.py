"""Hugging Face's ViT: numbers that transformers produced, and transformers itself."""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax import views, vit
from dgpt_jax.convert import export, formats, parity
from dgpt_jax.convert.weights import Preprocess
from tests import parity as towers
from tests.conversions import convert, random_weights, refused, same
from tests.paths import GOLDEN

LABELS = {"id2label", "label2id"}


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


@pytest.mark.parametrize(
    "size,crop_pct,edge", [(384, 0.875, 438), (64, 64 / 93, 93), (224, 0.9, 248)]
)
def test_pixels_in_the_place_of_crop_pct(tmp_path, size, crop_pct, edge):
    """Rounded as timm's transforms do it, and the same pixels again after the way back."""
    how = dataclasses.replace(Preprocess(), crop_pct=np.nextafter(crop_pct, 0))
    weights = random_weights(preprocess=how, image_size=size, patch=32)
    for step in ("a", "b"):
        (tmp_path / step).mkdir()
        formats.LAYOUTS["hf"].save(weights, tmp_path / step)
        told = json.loads((tmp_path / step / "preprocessor_config.json").read_text())
        assert told["size"] == {"shortest_edge": edge}
        _, weights = formats.read(tmp_path / step)
        assert int(size / weights.preprocess.crop_pct) == edge


def test_transformers_that_cannot_be_used(tmp_path, monkeypatch):
    """It imports its models, and torchvision, only when they are asked for."""
    transformers = pytest.importorskip("transformers")

    def broken(*_, **__):
        raise ModuleNotFoundError("Could not import module") from RuntimeError("no operator nms")

    monkeypatch.setattr(transformers.ViTModel, "from_pretrained", broken)
    _, told = export.write(random_weights(), formats.LAYOUTS["hf"], tmp_path / "hf")
    assert told == "not verified: transformers cannot be used: no operator nms"


def test_mean_pooling_is_nothing_for_hugging_face(tmp_path, monkeypatch):
    source = GOLDEN / "timm_vit_tiny_avg.safetensors"
    message = refused(monkeypatch, source, tmp_path / "out", "--to=hf", "--heads=3")
    assert "cannot hold mean pooling" in message and "--to=timm" in message
    assert os.listdir(tmp_path) == []
