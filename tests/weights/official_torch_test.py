"""The official model in plain torch, against the official code's numbers, and as a check."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax.convert import digpt, export, formats, weights
from dgpt_jax.schema import UserError
from tests.conversions import HEADS, pretrained
from tests.paths import GOLDEN


def test_official_predictions():
    pytest.importorskip("torch")
    from dgpt_jax.convert import digpt_torch

    state = load_file(GOLDEN / "digpt_tiny.safetensors")
    model = digpt.model_of(state, heads=3, decoder_heads=2)
    expected = np.load(GOLDEN / "digpt_tiny_expected.npz")
    images = np.random.default_rng(7).standard_normal((2, 3, 224, 224)).astype(np.float32)
    images = images.transpose(0, 2, 3, 1)
    blocks, predictions = digpt_torch.predictions(state, model, images, expected["perm"])
    for tap in model.taps:
        np.testing.assert_allclose(blocks[tap - 1], expected[f"block{tap}"], atol=2e-5)
    for found, name in zip(predictions, ("next", "visible"), strict=True):
        np.testing.assert_allclose(found[..., :64], expected[f"{name}_pred"], atol=1e-5)


def test_the_encoder_in_use():
    """Its positions are the official table, CLS without one; its norm does nothing but norm."""
    path = GOLDEN / "digpt_tiny.safetensors"
    _, full = formats.read(path, **HEADS)
    used = weights.encoder(full, "mean")
    table = load_file(path)["pos_embed"]
    np.testing.assert_allclose(used.params["pos_embed"], table, atol=1e-6)
    assert not used.params["pos_embed"][:, 0].any()
    assert (used.params["norm/scale"] == 1).all() and not used.params["norm/bias"].any()
    kept = {name: x for name, x in full.params.items() if name.startswith("encoder/")}
    assert set(used.params) == set(kept) | {"pos_embed", "norm/scale", "norm/bias"}
    assert all(used.params[name] is x for name, x in kept.items())


MISTAKES = {
    "decoders' features exchanged": ("ar_enc2dec.weight", "kd_enc2dec.weight"),
    "a cross-attention's norms": ("ar_blocks.1.norm2_1.weight", "ar_blocks.1.norm2_2.weight"),
    "positions": ("decoder_pos_embed", None),
    "the mask": ("mask", None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_file_is_removed(tmp_path, monkeypatch, mistake):
    """The encoder is right in all of them."""
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
    with pytest.raises(UserError, match="predictions of the decoders in torch .* is removed"):
        export.write(pretrained(), formats.LAYOUTS["digpt"], tmp_path / "a.pth")
    assert os.listdir(tmp_path) == []


def test_a_right_file_is_verified(tmp_path):
    pytest.importorskip("torch")
    _, told = export.write(pretrained(), formats.LAYOUTS["digpt"], tmp_path / "a.pth")
    assert told.startswith("verified: predictions of the decoders in torch")
