"""The official model in plain torch: against outputs of the official code, and as a check."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax.errors import UserError
from dgpt_jax.weights import export, registry, types
from dgpt_jax.weights.layouts import digpt
from tests.support.conversions import HEADS, pretrained
from tests.support.paths import GOLDEN


def test_official_predictions():
    pytest.importorskip("torch")
    from dgpt_jax.weights import official_torch

    state = load_file(GOLDEN / "digpt_tiny.safetensors")
    model = digpt.model_of(state, heads=3, decoder_heads=2)
    expected = np.load(GOLDEN / "digpt_tiny_expected.npz")
    images = np.random.default_rng(7).standard_normal((2, 3, 224, 224)).astype(np.float32)
    images = images.transpose(0, 2, 3, 1)
    blocks, predictions = official_torch.predictions(state, model, images, expected["perm"])
    for tap in model.taps:
        np.testing.assert_allclose(blocks[tap - 1], expected[f"block{tap}"], atol=2e-5)
    for actual, name in zip(predictions, ("next", "visible"), strict=True):
        np.testing.assert_allclose(actual[..., :64], expected[f"{name}_pred"], atol=1e-5)


def test_the_extracted_encoder():
    """Positions are the official table, without one of CLS; the norm has no learned scale."""
    path = GOLDEN / "digpt_tiny.safetensors"
    _, full = registry.read(path, **HEADS)
    encoder = types.encoder(full, "mean")
    table = load_file(path)["pos_embed"]
    np.testing.assert_allclose(encoder.params["pos_embed"], table, atol=1e-6)
    assert not encoder.params["pos_embed"][:, 0].any()
    assert (encoder.params["norm/scale"] == 1).all() and not encoder.params["norm/bias"].any()
    source = {name: x for name, x in full.params.items() if name.startswith("encoder/")}
    assert set(encoder.params) == set(source) | {"pos_embed", "norm/scale", "norm/bias"}
    assert all(encoder.params[name] is x for name, x in source.items())


MISTAKES = {
    "swapped features of the decoders": ("ar_enc2dec.weight", "kd_enc2dec.weight"),
    "swapped norms of a cross-attention": (
        "ar_blocks.1.norm2_1.weight",
        "ar_blocks.1.norm2_2.weight",
    ),
    "positions": ("decoder_pos_embed", None),
    "the mask": ("mask", None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_export_is_removed(tmp_path, monkeypatch, mistake):
    """The encoder is correct in all of them."""
    pytest.importorskip("torch")
    write = digpt.write

    def wrong(params, model):
        state = write(params, model)
        a, b = MISTAKES[mistake]
        if b:
            state[a], state[b] = state[b], state[a]
        else:
            state[a] = np.zeros_like(state[a])
        return state

    monkeypatch.setattr(digpt, "write", wrong)
    with pytest.raises(UserError, match="torch .*1e-04.*removed"):
        export.write(pretrained(), registry.LAYOUTS["digpt"], tmp_path / "a.pth")
    assert os.listdir(tmp_path) == []


def test_a_correct_export_is_verified(tmp_path):
    pytest.importorskip("torch")
    _, verified = export.write(pretrained(), registry.LAYOUTS["digpt"], tmp_path / "a.pth")
    assert verified.startswith("verified: ") and "torch" in verified
